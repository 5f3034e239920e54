"""Loading models: names, hubs, a user's own weights and classes. The network is never used."""

import dataclasses
import hashlib
import json
import math
import pickle
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from utils import models
from utils.cli import UserError
from utils.data import ImageSet, Preprocessing
from utils.evaluation import centred_cosine
from utils.models import (
    LoadedModel,
    ModelSource,
    build_reference_vit,
    describe_preprocessing,
    load_model,
    name_classes,
    run_name,
    scored_logits,
)

NAME, REGISTERS = "dinov2_vits14_lc", "dinov2_vits14_reg_lc"
BACKBONE_FILE, HEAD_FILE = "dinov2_vits14_pretrain.pth", "dinov2_vits14_linear4_head.pth"

# What the loader relies on in the real repository: entry points, modules and their names, at width
# 4 and with two blocks.
HUBCONF = """
import torch
from torch import nn

dependencies = ["torch"]


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Conv2d(3, 4, 14, 14)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


def named(**modules):
    return nn.ModuleDict(modules)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.attn = named(qkv=nn.Linear(4, 12), proj=nn.Linear(4, 4))
        self.mlp = named(fc1=nn.Linear(4, 16), fc2=nn.Linear(16, 4))
        self.ls1, self.ls2 = Scale(), Scale()

    def forward(self, x):
        value = self.attn["qkv"](self.norm1(x))[..., 8:].mean(1, keepdim=True)
        x = x + self.ls1.gamma * self.attn["proj"](value)
        hidden = self.mlp["fc1"](self.norm2(x)).relu()
        return x + self.ls2.gamma * self.mlp["fc2"](hidden)


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + 37 * 37, 4))
        self.mask_token = nn.Parameter(torch.zeros(1, 4))
        self.patch_embed = PatchEmbed()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(4)

    def interpolate_pos_encoding(self, x, width, height):
        if x.shape[1] == self.pos_embed.shape[1] and width == height:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, 37, 37, 4).permute(0, 3, 1, 2)
        size = (width // 14, height // 14)
        grid = nn.functional.interpolate(grid, size, mode="bicubic", antialias=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x):
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        tokens = tokens + self.interpolate_pos_encoding(tokens, *x.shape[-2:])
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


class Classifier(nn.Module):
    def __init__(self, pretrained):
        super().__init__()
        if pretrained:
            raise ValueError("the repository would unpickle the checkpoint itself")
        self.backbone = Backbone()
        self.linear_head = nn.Linear(8, 1000)

    def forward(self, x):
        tokens = self.backbone(x)
        return self.linear_head(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1))


def dinov2_vits14_lc(*, pretrained=True):
    return Classifier(pretrained)


def dinov2_vits14_reg_lc(*, pretrained=True):
    return Classifier(pretrained)
"""
# The names of the tensors in the files that facebookresearch/dinov2 publishes, of two blocks.
LAYERS_OF_A_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
BLOCK_KEYS = [f"{layer}.{kind}" for layer in LAYERS_OF_A_BLOCK for kind in ("weight", "bias")]
BACKBONE_KEYS = {
    "cls_token",
    "pos_embed",
    "mask_token",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    *(f"blocks.{block}.{key}" for block in (0, 1) for key in BLOCK_KEYS),
    *(f"blocks.{block}.ls{number}.gamma" for block in (0, 1) for number in (1, 2)),
    "norm.weight",
    "norm.bias",
}


def load(name: str, **options: Any) -> LoadedModel:
    return load_model(ModelSource(name, **options))


def error_of(name: str, **options: Any) -> str:
    """The text of the UserError that load_model must raise: one line."""
    with pytest.raises(UserError) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def refuse(*_: Any, **__: Any) -> None:
    raise urllib.error.URLError("no network")


# --- DINOv2 ---------------------------------------------------------------------------------------


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty TORCH_HOME, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    return tmp_path / "torch"


@pytest.fixture
def hub(torch_home: Path) -> Path:
    """Torch Hub's folder with the stand-in repository where the pinned commit would be."""
    repository = "facebookresearch_dinov2_" + models.DINOV2_REPOSITORY.partition(":")[2]
    folder = torch_home / "hub" / repository
    folder.mkdir(parents=True)
    (folder / "hubconf.py").write_text(HUBCONF)
    return folder.parent


@pytest.fixture
def original(hub: Path) -> Any:
    """A stand-in model whose weights are saved as the checkpoints of both entry points."""
    (repository,) = hub.iterdir()
    torch.manual_seed(1)
    model: Any = torch.hub.load(str(repository), NAME, source="local", pretrained=False)
    folder = hub / "checkpoints"
    folder.mkdir()
    backbone = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    head = {"weight": model.linear_head.weight.data, "bias": model.linear_head.bias.data}
    assert backbone.keys() == BACKBONE_KEYS
    for infix in ("", "_reg4"):
        torch.save(backbone, folder / f"dinov2_vits14{infix}_pretrain.pth")
        torch.save(head, folder / f"dinov2_vits14{infix}_linear4_head.pth")
    return model


def test_dinov2_comes_with_its_checkpoints(hub: Path, original: Any) -> None:
    loaded = load(NAME)
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), original(images))
    assert loaded.trained
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert loaded.preprocessing == Preprocessing(224, models.IMAGENET_MEAN, models.IMAGENET_STD)
    assert loaded.classes == models.imagenet_classes()
    assert loaded.num_classes == 1000
    expected = {
        name: hashlib.sha256((hub / "checkpoints" / name).read_bytes()).hexdigest()
        for name in (BACKBONE_FILE, HEAD_FILE)
    }
    assert loaded.checkpoints == expected


@pytest.mark.parametrize(("size", "tokens"), [(224, 257), (98, 50)])
def test_dinov2_position_embedding_is_folded(original: Any, size: int, tokens: int) -> None:
    module: Any = load(NAME, input_size=size).module
    expected = original.backbone.interpolate_pos_encoding(torch.zeros(1, tokens, 4), size, size)
    torch.testing.assert_close(module.backbone.pos_embed.data, expected.data)
    assert module.backbone.pos_embed.shape == (1, tokens, 4)
    assert "pos_embed" in module.backbone.state_dict()


def test_dinov2_takes_whole_patches() -> None:
    assert "multiples of 14" in error_of(NAME, input_size=96)


@pytest.mark.usefixtures("hub")
def test_dinov2_downloads_from_where_it_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    urls: list[str] = []

    def download(url: str, *_: Any, **__: Any) -> None:
        urls.append(url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    error_of(NAME)
    error_of(REGISTERS)
    base = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14"
    assert urls == [f"{base}/{BACKBONE_FILE}", f"{base}/dinov2_vits14_reg4_pretrain.pth"]


@pytest.mark.usefixtures("hub")
def test_dinov2_untrained_needs_no_checkpoint() -> None:
    loaded = load(NAME, untrained=True)
    assert not loaded.trained
    assert loaded.checkpoints == {}
    assert loaded.module(torch.rand(1, 3, 224, 224)).shape == (1, 1000)


def write_html(path: Path) -> None:
    path.write_text("<!DOCTYPE html>\n<html><body>Sign in to this network</body></html>\n")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def write_another_model(path: Path) -> None:
    torch.save(nn.Linear(3, 3).state_dict(), path)


def write_list(path: Path) -> None:
    torch.save([torch.zeros(2)], path)


@pytest.mark.parametrize("file", [BACKBONE_FILE, HEAD_FILE])
@pytest.mark.parametrize("spoil", [write_html, truncate, write_another_model, write_list])
@pytest.mark.usefixtures("original")
def test_dinov2_spoilt_checkpoint(hub: Path, spoil: Callable[[Path], None], file: str) -> None:
    path = hub / "checkpoints" / file
    spoil(path)
    text = error_of(NAME)
    assert text.startswith(f"{path} is not the checkpoint it should be")
    assert "delete it and run again" in text


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.usefixtures("original")
def test_checkpoint_with_code_in_it_does_not_run(
    hub: Path, tmp_path: Path, zipped: bool, own: bool
) -> None:
    mark = tmp_path / "payload-ran"
    path = tmp_path / "mine.pth" if own else hub / "checkpoints" / BACKBONE_FILE
    if zipped:
        torch.save({"weight": Payload(mark)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Payload(mark)}, protocol=2))
    text = error_of("timm/test_resnet", checkpoint=path) if own else error_of(NAME)
    assert str(path) in text
    assert "holds more than weights" in text
    assert not mark.exists()
    # The payload is a real one: an ordinary unpickling runs it.
    if zipped:
        torch.load(path, weights_only=False)["weight"].close()
    else:
        pickle.loads(path.read_bytes())["weight"].close()
    assert mark.exists()


@pytest.mark.usefixtures("original")
def test_dinov2_missing_checkpoint_offline(hub: Path) -> None:
    path = hub / "checkpoints" / HEAD_FILE
    path.unlink()
    text = error_of(NAME)
    assert "no network" in text
    assert f"put the file at {path}" in text
    assert "--untrained" in text
    assert [file.name for file in path.parent.iterdir() if "linear4" in file.name] == [
        "dinov2_vits14_reg4_linear4_head.pth"
    ]  # nothing half-written


@pytest.mark.usefixtures("torch_home")
def test_dinov2_hub_offline() -> None:
    text = error_of(NAME, untrained=True)
    assert f"cannot load {NAME} from Torch Hub" in text
    assert "no network" in text
    assert "--model vit_tiny_imagenet" in text


def test_cache_that_cannot_be_written_is_not_blamed_on_the_network(torch_home: Path) -> None:
    torch_home.write_text("a file where the folder should be")
    text = error_of(NAME)
    assert "cannot write to the folder of TORCH_HOME" in text
    assert str(torch_home) in text
    assert "github" not in text


@pytest.mark.usefixtures("torch_home")
def test_dinov2_is_pinned_and_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_from_hub(repository: str, name: str, **options: Any) -> None:
        asked.update(options, repository=repository)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.load", load_from_hub)
    error_of(NAME)
    assert len(asked["repository"].partition(":")[2]) == 40  # a commit, not a branch
    assert asked["trust_repo"] is True
    assert asked["pretrained"] is False


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dinov2_vits14", "dinov2_vits14_lc"),
        ("vit_tiny", "vit_tiny_imagenet"),
        ("smallcnn", "smallcnn_cifar100"),
        ("resnet18", "timm/<name>"),
        ("timm/resnet1", "resnet18"),
        ("timm/", "choose from"),
    ],
)
def test_unknown_model_names_the_nearest(name: str, hint: str) -> None:
    text = error_of(name)
    assert "unknown" in text
    assert hint in text
    assert len(text) < 1000  # not all of timm


@pytest.mark.parametrize(
    "name", ["mine.pth", "timm/mine.pth", "a/mine.pt", "timm/mine.safetensors"]
)
def test_weights_alone_are_sent_to_checkpoint(name: str) -> None:
    file = name.removeprefix("timm/")
    assert f"use --model timm/NAME --checkpoint {file}" in error_of(name)


def test_options_that_exclude_each_other(tmp_path: Path) -> None:
    assert "goes with --model timm/NAME" in error_of("vit_digits", checkpoint=tmp_path / "a.pth")
    text = error_of("timm/test_resnet", checkpoint=tmp_path / "a.pth", untrained=True)
    assert "not with --untrained" in text
    assert "is no file" in error_of("timm/test_resnet", checkpoint=tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (ModelSource("vit_digits"), "vit_digits"),
        (ModelSource("timm/resnet18.a1_in1k"), "timm-resnet18.a1_in1k"),
        (ModelSource("timm/resnet18", Path("runs/3/best.pth")), "timm-resnet18-runs-3-best"),
        (ModelSource("timm/hf-hub:owner/name"), "timm-hf-hub-owner-name"),
        (ModelSource("vit_digits", untrained=True), "vit_digits-untrained"),
        (ModelSource("/tmp/part2/best.safetensors"), "tmp-part2-best"),
    ],
)
def test_run_name_is_one_folder(source: ModelSource, name: str) -> None:
    assert run_name(source) == name


def test_run_name_leaves_room_for_the_names_of_engines() -> None:
    deep = [ModelSource("timm/vit", Path("deep/" * 50, f"{i}.pth")) for i in range(2)]
    names = [run_name(source) for source in deep]
    assert names[0] != names[1]
    assert {len(name) for name in names} == {120}
    assert names[0].startswith("timm-vit-deep-deep-")


def test_reference_model_may_be_named_by_its_file() -> None:
    path = models.WEIGHTS_DIR / "vit_digits.safetensors"
    assert load(str(path)).num_classes == 10


# --- timm -----------------------------------------------------------------------------------------


def test_input_size_that_cuts_a_patch_is_refused() -> None:
    text = error_of("timm/vit_tiny_patch16_224", untrained=True, input_size=40)
    assert text == "--input-size 40: vit_tiny_patch16_224 takes multiples of 16 pixels"


@pytest.fixture(scope="module")
def own_state() -> dict[str, Tensor]:
    """What fine-tuning a network of timm to seven classes would leave."""
    torch.manual_seed(4)
    state = timm.create_model("test_resnet", num_classes=7).state_dict()
    return {
        key: value + 0.01 if value.is_floating_point() else value for key, value in state.items()
    }


def save_as(state: dict[str, Tensor], path: Path, form: str) -> None:
    others = {key: torch.zeros_like(value) for key, value in state.items()}
    parallel = {f"module.{key}": value for key, value in state.items()}
    compiled = {f"_orig_mod.{key}": value for key, value in state.items()}
    reverse = dict(reversed(state.items()))
    content = {
        "bare": state,
        "reversed": reverse,
        "model": {"model": state, "epoch": 3},
        "model_state_dict": {"model_state_dict": parallel, "loss": 0.1},
        "state_dict": {"state_dict": parallel, "args": None},
        "compiled": compiled,
        "average": {"model": others, "model_ema": parallel},
        "half": {key: value.half() for key, value in state.items()},
    }
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save(content[form], path)


@pytest.mark.parametrize(
    "form",
    [
        *("bare", "reversed", "model", "model_state_dict", "state_dict", "compiled", "average"),
        *("half", "safetensors"),
    ],
)
def test_own_checkpoint_in_its_usual_forms(
    own_state: dict[str, Tensor], tmp_path: Path, form: str
) -> None:
    path = tmp_path / ("mine.safetensors" if form == "safetensors" else "mine.pth")
    save_as(own_state, path, form)
    loaded = load("timm/test_resnet", checkpoint=path)
    tolerance = 1e-3 if form == "half" else 0
    for key, value in loaded.module.state_dict().items():
        torch.testing.assert_close(value, own_state[key], atol=tolerance, rtol=tolerance)
    assert loaded.trained
    assert loaded.num_classes == 7
    assert loaded.classes is None  # the images may know
    assert loaded.checkpoints == {path.name: models.sha256_of(path)}


def test_own_checkpoint_of_two_heads(tmp_path: Path) -> None:
    name, options = "deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1}
    state = timm.create_model(name, num_classes=3, **options).state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("blocks")}
    torch.save(state, tmp_path / "mine.pth")
    text = error_of(f"timm/{name}", checkpoint=tmp_path / "mine.pth", input_size=32)
    assert 'Missing key(s) in state_dict: "blocks.0.norm1.weight", "blocks.0.norm1.bias",' in text
    assert "shape" not in text  # both heads were built for three classes


def quantized(*shape: int) -> Tensor:
    return torch.quantize_per_tensor(torch.zeros(shape), 1.0, 0, torch.qint8)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"fc.bias": None, "fc.weight": None},
            'Missing key(s) in state_dict: "fc.weight", "fc.bias". ',
        ),
        ({"head.weight": torch.zeros(7, 3)}, 'Unexpected key(s) in state_dict: "head.weight". '),
        (
            {"conv1.0.weight": torch.zeros(16, 1, 3, 3)},
            "mismatch for conv1.0.weight: copying a param with shape torch.Size([16, 1, 3, 3])",
        ),
        ({"epoch": 3, "net": {}}, 'Unexpected key(s) in state_dict: "epoch", "net". '),
        ({"conv1.0.weight": quantized(16, 3, 3, 3)}, "quantized Tensor"),
        ({"fc.bias": torch.full((7,), math.nan)}, "fc.bias holds NaN or infinity"),
        ({"bn1.running_var": torch.full((32,), math.inf)}, "bn1.running_var holds NaN or infinity"),
        ({"fc.weight": torch.tensor(1.0)}, "mismatch for fc.weight"),
    ],
)
def test_own_checkpoint_that_does_not_fit_names_the_keys(
    own_state: dict[str, Any], tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    assert "conv1.0.weight" in own_state
    state = {key: value for key, value in (own_state | change).items() if value is not None}
    torch.save(state, tmp_path / "mine.pth")
    assert expected in error_of("timm/test_resnet", checkpoint=tmp_path / "mine.pth")


@pytest.mark.parametrize("spoil", [write_html, truncate, write_list])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_own_checkpoint_that_is_damaged(
    own_state: dict[str, Tensor], tmp_path: Path, spoil: Callable[[Path], None], suffix: str
) -> None:
    path = tmp_path / f"mine{suffix}"
    save_as(own_state, path, "safetensors" if suffix == ".safetensors" else "bare")
    spoil(path)
    text = error_of("timm/test_resnet", checkpoint=path)
    assert text.startswith(f"--checkpoint {path} is damaged, or holds more than weights (")


def test_own_preprocessing_wins(own_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(own_state, tmp_path / "mine.pth")
    chosen = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"}
    loaded = load("timm/test_resnet", checkpoint=tmp_path / "mine.pth", input_size=96, **chosen)
    assert dataclasses.asdict(loaded.preprocessing) == {"input_size": 96, **chosen}
    assert describe_preprocessing(loaded) == (
        "96x96 pixels, bilinear, mean 0.1, 0.2, 0.3, standard deviation 0.4, 0.5, 0.6"
    )
    partly = load("timm/test_vit2", untrained=True, mean=(0.1, 0.2, 0.3))
    assert partly.preprocessing == Preprocessing(160, (0.1, 0.2, 0.3), (0.5,) * 3, "bicubic")


@pytest.mark.parametrize(
    "chosen",
    [
        {"mean": (0.5,)},
        {"std": (0.5, 0.5)},
        {"std": (0.5, 0, 0.5)},
        {"mean": (123.0, 117.0, 104.0)},
        {"std": (58.0, 57.0, 57.0)},
    ],
)
def test_preprocessing_that_cannot_be(chosen: dict[str, Any]) -> None:
    assert "--mean and --std" in error_of("vit_digits", **chosen)


def test_a_network_tied_to_a_size_is_built_for_another(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    module = load(f"timm/{name}", untrained=True, input_size=64).module
    assert module(torch.rand(1, 3, 64, 64)).shape == (1, 1000)
    torch.save(module.state_dict(), tmp_path / "mine.pth")
    assert load(f"timm/{name}", checkpoint=tmp_path / "mine.pth", input_size=64).trained
    text = error_of(f"timm/{name}", checkpoint=tmp_path / "mine.pth")
    assert "mismatch for pos_embed: copying a param with shape torch.Size([1, 17, 192])" in text
    assert "another --input-size" in text
    assert "does not take 16x16 pixels" in error_of("vit_digits", input_size=16)


def local_folder(folder: Path, state: dict[str, Tensor] | None = None, **config: Any) -> str:
    """The name of a model in timm's own form of a folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "test_resnet"} | config))
    if state is not None:
        save_file(state, folder / "model.safetensors")
    return f"timm/local-dir:{folder}"


def test_timms_own_folders(own_state: dict[str, Tensor], tmp_path: Path) -> None:
    own = {"input_size": [3, 64, 64], "mean": [0.1] * 3, "std": [0.2] * 3}
    config = {"num_classes": 7, "pretrained_cfg": own | {"interpolation": "bilinear"}}
    loaded = load(local_folder(tmp_path / "mine", own_state, **config))
    assert loaded.module.state_dict()["fc.weight"].equal(own_state["fc.weight"])
    assert loaded.preprocessing == Preprocessing(64, (0.1,) * 3, (0.2,) * 3, "bilinear")
    assert loaded.classes is None
    names = local_folder(tmp_path / "named", own_state, label_names=list("gfedcba"), **config)
    logits, sentence = scored_logits(load(names), image_set(*"abcdefg"))
    assert logits == [6, 5, 4, 3, 2, 1, 0]
    assert sentence == "classes: its configuration's"
    assert "config.json" in error_of(f"timm/local-dir:{tmp_path / 'none'}")


def test_images_that_a_network_cannot_take_are_refused(tmp_path: Path) -> None:
    wide = local_folder(tmp_path / "wide", pretrained_cfg={"input_size": [3, 64, 48]})
    text = error_of(wide, untrained=True)
    assert "3 channels of 64x48 pixels" in text
    assert "--input-size 48" in text
    assert load(wide, untrained=True, input_size=48).preprocessing.input_size == 48
    for channels in (1, 4):
        size = {"input_size": [channels, 64, 64]}
        name = local_folder(tmp_path / f"of-{channels}", pretrained_cfg=size)
        assert f"{channels} channels" in error_of(name, untrained=True)


def test_a_network_without_a_classifier(tmp_path: Path) -> None:
    vit: dict[str, Any] = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": {}}
    features = load(local_folder(tmp_path / "features", **vit), untrained=True)
    assert features.num_classes == 0
    assert features.classes is None
    trained = dataclasses.replace(features, trained=True)
    assert scored_logits(trained, image_set("a")) == (
        None,
        "no accuracy: the network has no classifier",
    )
    tokens = local_folder(tmp_path / "tokens", **vit, model_args={"global_pool": ""})
    assert "gives [1, 197, 64] for one image, not [1, C]" in error_of(tokens, untrained=True)


def test_timm_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("timm/test_vit", "timm/hf-hub:owner/name"):
        text = error_of(name)
        assert text.startswith(f"cannot load {name} (")
        assert "huggingface.co" in text
        assert "--untrained" in text


def test_timm_unknown_tag() -> None:
    assert "Invalid pretrained tag (nonsense)" in error_of("timm/test_vit.nonsense")


def test_timm_pretrained_weights_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    create, asked = timm.create_model, []

    def create_offline(name: str, pretrained: bool) -> nn.Module:
        asked.append(pretrained)
        return create(name, pretrained=False)

    monkeypatch.setattr(timm, "create_model", create_offline)
    loaded = load("timm/test_vit2")
    assert asked == [True]
    assert loaded.trained
    assert loaded.classes == models.imagenet_classes()
    scale = dict(loaded.module.named_parameters())["blocks.0.ls1.gamma"]
    assert scale.max() < 1e-4


# --- random weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",  # the last norm of a branch starts at zero
        "nf_resnet26",  # the gain of the last convolution
        "poolformer_s12",  # LayerScale
        "test_vit2",
        "mixer_s32_224",  # the head
    ],
)
def test_untrained_networks_depend_on_all_their_weights(name: str) -> None:
    module = load(f"timm/{name}", untrained=True, input_size=64).module
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits = module(images)
        assert logits.abs().max() < 1000  # fp16 holds no more than 65,504
        matrices = {n: p for n, p in module.named_parameters() if p.ndim > 1 and p.numel() > 4000}
        for key, weight in list(matrices.items())[::-4]:
            before = weight.clone()
            weight.zero_()
            assert centred_cosine(module(images), logits) < 0.9999, key
            weight.copy_(before)


def test_opened_scales_are_ones_and_what_is_added_stays_zero() -> None:
    module: Any = nn.Module()
    for name in ("gamma", "gamma_1", "ls2", "scale", "gain", "weight"):
        module.register_parameter(name, nn.Parameter(torch.full((3, 1, 1), 1e-5)))
    for name in ("bias", "beta", "cls_token", "pos_embed", "relative_position_bias_table"):
        module.register_parameter(name, nn.Parameter(torch.zeros(3, 4)))
    module.head = nn.Linear(4, 3)
    nn.init.zeros_(module.head.weight)
    kept = module.register_parameter("alpha", nn.Parameter(torch.tensor(0.1)))
    models.open_scales(module, 8)
    state = module.state_dict()
    assert kept is None
    assert state.pop("alpha") == torch.tensor(0.1)
    assert state.pop("head.weight").std() > 0.1
    state.pop("head.bias")
    opened = {name for name, value in state.items() if (value == 1).all()}
    assert opened == {"gamma", "gamma_1", "ls2", "scale", "gain", "weight"}
    assert all((state[name] == 0).all() for name in state.keys() - opened)


class Residual(nn.Module):
    """A branch whose last norm starts at zero, as in ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x.relu()))


def test_deep_untrained_networks_do_not_overflow() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), *(Residual() for _ in range(60))).eval()
    models.open_scales(module, 16)
    assert not any(part.training for part in module.modules())
    with torch.no_grad():
        assert module(torch.randn(2, 3, 16, 16)).abs().max() < 1000  # 65,504 is fp16's largest


def test_random_weights_are_decided_by_the_seed_alone() -> None:
    torch.manual_seed(9)
    expected, threads = torch.rand(3), torch.get_num_threads()
    torch.manual_seed(9)
    states = []
    for count, seed in ((1, 0), (2, 0), (1, 1)):
        torch.set_num_threads(count)
        module = load("timm/test_resnet", untrained=True, seed=seed).module
        assert torch.get_num_threads() == count
        states.append(torch.cat([value.flatten() for value in module.state_dict().values()]))
    torch.set_num_threads(threads)
    assert states[0].equal(states[1])
    assert not states[0].equal(states[2])
    assert torch.rand(3).equal(expected)  # the caller's generator is where it was


# --- classes --------------------------------------------------------------------------------------


def test_imagenet_classes_are_in_logit_order() -> None:
    classes = models.imagenet_classes()
    assert len(set(classes)) == 1000
    assert list(classes) == sorted(classes)
    assert (classes[0], classes[1], classes[999]) == ("n01440764", "n01443537", "n15075141")


def image_set(*classes: str) -> ImageSet:
    return ImageSet("folder", "test", torch.zeros(1, 3, 4, 4).byte(), None, classes)


def model_of(classes: tuple[str, ...] | None, trained: bool = True, count: int = 0) -> LoadedModel:
    half = Preprocessing(4, (0.5,), (0.5,))
    module = nn.Identity()
    return LoadedModel("model", module, half, classes, trained=trained, num_classes=count)


def test_scored_logits_of_the_models_own_classes() -> None:
    assert scored_logits(model_of(("a", "b", "c")), image_set("c", "a")) == (
        [2, 0],
        "classes: the model's own",
    )


def named_and_scored(model: LoadedModel, images: ImageSet) -> tuple[list[int] | None, str]:
    return scored_logits(name_classes(model, images.classes), images)


def test_scored_logits_of_sorted_names_where_the_counts_agree() -> None:
    logits, sentence = named_and_scored(model_of(None, count=3), image_set("a", "b", "c"))
    assert logits == [0, 1, 2]
    assert sentence == "classes: the sorted names of the 3 classes of images"


def test_scored_logits_of_a_thousand_outputs() -> None:
    classes = models.imagenet_classes()
    images = image_set(classes[3], classes[500], classes[999])
    logits, sentence = named_and_scored(model_of(None, count=1000), images)
    assert logits == [3, 500, 999]
    assert "ImageNet-1k" in sentence
    names = [f"class {i:04}" for i in range(1000)]
    logits, sentence = named_and_scored(model_of(None, count=1000), image_set(*names))
    assert logits == list(range(1000))
    assert "sorted names of the 1000" in sentence


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (model_of(("a", "b"), trained=False), "the weights are random (--untrained)"),
        (model_of(None), "the network has no classifier"),
        (model_of(None, count=5), "5 outputs for 2 classes of images; name the outputs with"),
        (model_of(("a", "c")), "(the model's own) lack 'z', one of 1 of the images' 2"),
        (model_of(None, count=1000), "as there are 1000 outputs) lack 'a', one of 2"),
    ],
)
def test_no_accuracy_has_its_reason(model: LoadedModel, reason: str) -> None:
    logits, sentence = named_and_scored(model, image_set("a", "z"))
    assert logits is None
    assert sentence.startswith("no accuracy: ")
    assert reason in sentence


def test_classes_from_a_file(own_state: dict[str, Tensor], tmp_path: Path) -> None:
    checkpoint, file = tmp_path / "mine.pth", tmp_path / "names.txt"
    torch.save(own_state, checkpoint)
    file.write_text("g\nf\ne\nd\nc\nb\nbig dog\n\n", "utf-8-sig")
    loaded = load("timm/test_resnet", checkpoint=checkpoint, classes_file=file)
    assert loaded.classes == ("g", "f", "e", "d", "c", "b", "big dog")
    logits, sentence = scored_logits(loaded, image_set("b", "big dog", "c"))
    assert logits == [5, 6, 4]
    assert sentence == f"classes: --classes {file}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a\nb\n", "has 2 names, 2 of them different: name each of the 10 classes"),
        (b"\n".join([b"a"] * 10), "has 10 names, 1 of them different"),
        (b"\xff\xfe", "cannot read"),
        (None, "cannot read"),
    ],
)
def test_classes_that_do_not_fit(tmp_path: Path, content: bytes | None, reason: str) -> None:
    file = tmp_path / "names.txt"
    if content is not None:
        file.write_bytes(content)
    text = error_of("vit_digits", classes_file=file)
    assert str(file) in text
    assert reason in text


# --- models with a card ---------------------------------------------------------------------------

ARCHITECTURE = {
    "image_size": 8,
    "patch_size": 2,
    "width": 24,
    "depth": 1,
    "heads": 2,
    "num_classes": 10,
}


def write_with_card(path: Path) -> None:
    torch.manual_seed(2)
    state = {k: v.half() for k, v in build_reference_vit(**ARCHITECTURE).state_dict().items()}
    save_file(state, path)
    card = {
        "architecture": ARCHITECTURE,
        "mean": [0.3, 0.4, 0.5],
        "std": [0.1, 0.2, 0.3],
        "classes": list("0123456789"),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    path.with_suffix(".json").write_text(json.dumps(card))


@pytest.fixture
def weights_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `weights` with a small `vit_digits` and its card."""
    monkeypatch.setattr(models, "WEIGHTS_DIR", tmp_path)
    write_with_card(tmp_path / "vit_digits.safetensors")
    return tmp_path


def test_reference_model_is_its_file_in_float32(weights_dir: Path) -> None:
    loaded = load("vit_digits")
    torch.manual_seed(2)
    original = build_reference_vit(**ARCHITECTURE).state_dict()
    for name, tensor in loaded.module.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32
        assert tensor.equal(original[name].half().to(tensor.dtype))
    assert loaded.preprocessing == Preprocessing(8, (0.3, 0.4, 0.5), (0.1, 0.2, 0.3))
    assert loaded.classes == tuple("0123456789")
    assert loaded.trained
    card = json.loads((weights_dir / "vit_digits.json").read_text())
    assert loaded.checkpoints == {"vit_digits.safetensors": card["sha256"]}
    assert loaded.module(torch.rand(2, 3, 8, 8)).shape == (2, 10)


def test_checkpoint_of_part_2_is_built_by_its_constructor(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    write_with_card(path)
    loaded = load(str(path), network=build_reference_vit, mean=(0.5, 0.5, 0.5))
    assert loaded.classes == tuple("0123456789")
    assert loaded.preprocessing.mean == (0.5, 0.5, 0.5)
    assert list(loaded.checkpoints) == ["best.safetensors"]
    assert scored_logits(loaded, image_set("7"))[1] == "classes: its card's"
    path.with_suffix(".json").unlink()
    text = error_of(str(path), network=build_reference_vit)
    assert str(path.with_suffix(".json")) in text
    assert "part2_tune.py" in text
    assert f"--checkpoint {path}" in text


def test_reference_model_that_differs_from_its_card(weights_dir: Path) -> None:
    path = weights_dir / "vit_digits.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    text = error_of("vit_digits")
    assert text.startswith(f"{path} is missing or differs from its card: run git checkout weights")


def test_reference_model_without_its_weights(weights_dir: Path) -> None:
    path = weights_dir / "vit_digits.safetensors"
    path.unlink()
    assert str(path) in error_of("vit_digits")
    loaded = load("vit_digits", untrained=True)
    assert not loaded.trained
    assert loaded.checkpoints == {}


def test_reference_model_without_its_card(weights_dir: Path) -> None:
    text = error_of("vit_tiny_imagenet")
    assert str(weights_dir / "vit_tiny_imagenet.json") in text


def test_reference_model_with_a_damaged_card(weights_dir: Path) -> None:
    path = weights_dir / "vit_digits.json"
    path.write_text(path.read_text()[:40])
    assert error_of("vit_digits").startswith(f"{path} is damaged")


@pytest.mark.parametrize(("image_size", "patch_size", "tokens"), [(8, 2, 16), (32, 8, 16)])
def test_build_reference_vit_shapes(image_size: int, patch_size: int, tokens: int) -> None:
    module: Any = build_reference_vit(image_size, patch_size, 24, 2, 2, 5).eval()
    images = torch.rand(3, 3, image_size, image_size)
    assert module.patch_embed(images).shape == (3, tokens, 24)
    assert module.pos_embed.shape == (1, tokens, 24)
    assert len(module.blocks) == 2
    assert module(images).shape == (3, 5)
