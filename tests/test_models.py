"""Loading models by name, with a stand-in for the hub repository; the network is never used."""

import hashlib
import http.client
import io
import json
import pickle
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from utils import models
from utils.cli import UserError
from utils.data import ImageSet, Preprocessing
from utils.models import LoadedModel, build_reference_vit, load_model, scored_logits

NAME, REGISTERS = "dinov2_vits14_lc", "dinov2_vits14_reg_lc"
BACKBONE_FILE, HEAD_FILE = "dinov2_vits14_pretrain.pth", "dinov2_vits14_linear4_head.pth"

# The interface of the real repository that the loader relies on, at width 4.
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


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + 37 * 37, 4))

    def interpolate_pos_encoding(self, x, width, height):
        if x.shape[1] == self.pos_embed.shape[1] and width == height:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, 37, 37, 4).permute(0, 3, 1, 2)
        size = (width // 14, height // 14)
        grid = nn.functional.interpolate(grid, size, mode="bicubic", antialias=False)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, x):
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        return tokens + self.interpolate_pos_encoding(tokens, *x.shape[-2:])


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


def error_of(name: str, untrained: bool = False) -> str:
    """The text of the UserError that load_model must raise."""
    with pytest.raises(UserError) as caught:
        load_model(name, untrained)
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
    model = torch.hub.load(str(repository), NAME, source="local", pretrained=False)
    folder = hub / "checkpoints"
    folder.mkdir()
    for infix in ("", "_reg4"):
        torch.save(model.backbone.state_dict(), folder / f"dinov2_vits14{infix}_pretrain.pth")
        torch.save(
            model.linear_head.state_dict(), folder / f"dinov2_vits14{infix}_linear4_head.pth"
        )
    return model


def test_dinov2_comes_with_its_checkpoints(hub: Path, original: Any) -> None:
    loaded = load_model(NAME)
    images = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), original(images))
    assert loaded.trained
    assert not loaded.module.training
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert loaded.preprocessing == Preprocessing(224, models.IMAGENET_MEAN, models.IMAGENET_STD)
    assert loaded.classes == models.imagenet_classes()
    expected = {
        name: hashlib.sha256((hub / "checkpoints" / name).read_bytes()).hexdigest()
        for name in (BACKBONE_FILE, HEAD_FILE)
    }
    assert loaded.checkpoints == expected


def test_dinov2_position_embedding_is_folded(original: Any) -> None:
    module: Any = load_model(NAME).module
    tokens = torch.zeros(1, 257, 4)
    expected = original.backbone.interpolate_pos_encoding(tokens, 224, 224)
    assert module.backbone.pos_embed.shape == (1, 257, 4)
    torch.testing.assert_close(module.backbone.pos_embed.data, expected.data)
    assert "pos_embed" in module.backbone.state_dict()


@pytest.mark.usefixtures("original")
def test_dinov2_with_registers_has_its_own_files() -> None:
    assert sorted(load_model(REGISTERS).checkpoints) == [
        "dinov2_vits14_reg4_linear4_head.pth",
        "dinov2_vits14_reg4_pretrain.pth",
    ]


@pytest.mark.usefixtures("hub")
def test_dinov2_downloads_into_the_hub_folder(
    torch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls: list[str] = []

    def download(url: str, path: str, progress: bool) -> None:
        urls.append(url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    error_of(NAME)
    error_of(REGISTERS)
    base = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14"
    assert urls == [f"{base}/{BACKBONE_FILE}", f"{base}/dinov2_vits14_reg4_pretrain.pth"]


@pytest.mark.usefixtures("hub")
def test_dinov2_untrained_needs_no_checkpoint() -> None:
    loaded = load_model(NAME, untrained=True)
    module: Any = loaded.module
    assert not loaded.trained
    assert loaded.checkpoints == {}
    assert module.backbone.pos_embed.shape == (1, 257, 4)
    assert module(torch.rand(1, 3, 224, 224)).shape == (1, 1000)


def write_garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def write_broken_pickle(path: Path) -> None:
    path.write_bytes(b"\x80\x02}q\x00(")


def write_html(path: Path) -> None:
    path.write_text("<!DOCTYPE html>\n<html><body>Sign in to this network</body></html>\n")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def keep_a_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def write_another_model(path: Path) -> None:
    torch.save(nn.Linear(3, 3).state_dict(), path)


def write_another_shape(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.save({name: torch.zeros(2, *tensor.shape) for name, tensor in state.items()}, path)


def write_list(path: Path) -> None:
    torch.save([torch.zeros(2)], path)


def write_numbered_tensors(path: Path) -> None:
    torch.save({0: torch.zeros(2)}, path)


@pytest.mark.parametrize("file", [BACKBONE_FILE, HEAD_FILE])
@pytest.mark.parametrize(
    "spoil",
    [
        write_garbage,
        write_broken_pickle,
        write_html,
        truncate,
        keep_a_header,
        empty,
        write_another_model,
        write_another_shape,
        write_list,
        write_numbered_tensors,
    ],
)
@pytest.mark.usefixtures("original")
def test_dinov2_spoilt_checkpoint(hub: Path, spoil: Callable[[Path], None], file: str) -> None:
    path = hub / "checkpoints" / file
    spoil(path)
    text = error_of(NAME)
    assert text.startswith(f"{path} is not the checkpoint it should be")
    assert "delete it and run again" in text
    assert "\n" not in text


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.usefixtures("original")
def test_dinov2_checkpoint_with_code_in_it_does_not_run(
    hub: Path, tmp_path: Path, zipped: bool
) -> None:
    mark = tmp_path / "payload-ran"
    path = hub / "checkpoints" / BACKBONE_FILE
    if zipped:
        torch.save({"weight": Payload(mark)}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Payload(mark)}, protocol=2))
    assert str(path) in error_of(NAME)
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


@pytest.mark.usefixtures("hub")
def test_dinov2_download_that_breaks_off(torch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Response(io.BytesIO):
        def info(self) -> http.client.HTTPMessage:
            return http.client.HTTPMessage()

        def read(self, size: int | None = -1, /) -> bytes:
            raise http.client.IncompleteRead(b"half")

    monkeypatch.setattr("torch.hub.urlopen", lambda _: Response())
    assert f"put the file at {torch_home}" in error_of(NAME)
    assert list((torch_home / "hub" / "checkpoints").iterdir()) == []


@pytest.mark.usefixtures("torch_home")
def test_dinov2_hub_offline() -> None:
    text = error_of(NAME, untrained=True)
    assert f"cannot load {NAME} from Torch Hub" in text
    assert "no network" in text
    assert "--model vit_tiny_imagenet" in text


@pytest.mark.usefixtures("torch_home")
def test_dinov2_hub_sends_a_page_instead_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(url: str, path: str, progress: bool) -> None:
        Path(path).write_text("<html>Sign in to this network</html>")

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    assert "from Torch Hub" in error_of(NAME)


def test_dinov2_hub_repository_without_the_entry_point(hub: Path) -> None:
    (hubconf,) = hub.glob("*/hubconf.py")
    hubconf.write_text("dependencies = []\n")
    assert NAME in error_of(NAME)


def test_dinov2_is_pinned_and_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load(repository: str, name: str, **options: Any) -> None:
        asked.update(options, repository=repository)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.load", load)
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


# --- timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_vit2", "test_convnext"])
def test_timm_untrained_opens_layer_scale_and_keeps_its_own_preprocessing(name: str) -> None:
    loaded = load_model(f"timm/{name}", untrained=True)
    scales = [p for n, p in loaded.module.named_parameters() if n.endswith(".gamma")]
    assert scales
    assert all((scale == 1).all() for scale in scales)
    assert loaded.preprocessing == Preprocessing(160, (0.5,) * 3, (0.5,) * 3, "bicubic")
    assert loaded.name == f"timm/{name}"
    assert loaded.classes == models.imagenet_classes()
    assert not loaded.trained
    assert not loaded.module.training
    assert loaded.module(torch.rand(2, 3, 160, 160)).shape == (2, 1000)


def test_layer_scale_by_any_of_timms_names() -> None:
    module = nn.Module()
    names = ("gamma", "gamma_1", "gamma2", "gamma_xca", "weight")
    for name in names:
        module.register_parameter(name, nn.Parameter(torch.full((3,), 1e-5)))
    models._open_layer_scale(module)
    opened = {name for name, parameter in module.named_parameters() if (parameter == 1).all()}
    assert opened == set(names) - {"weight"}


def test_timm_trained_keeps_the_weights_of_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create, asked = timm.create_model, []

    def create_offline(name: str, pretrained: bool) -> nn.Module:
        asked.append(pretrained)
        return create(name, pretrained=False)

    monkeypatch.setattr(timm, "create_model", create_offline)
    loaded = load_model("timm/test_vit2")
    assert asked == [True]
    assert loaded.trained
    scale = dict(loaded.module.named_parameters())["blocks.0.ls1.gamma"]
    assert scale.max() < 1e-4


def test_timm_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = error_of("timm/test_vit")
    assert text.startswith("cannot load timm/test_vit (")
    assert "huggingface.co" in text
    assert "--untrained" in text
    assert "\n" not in text


def test_timm_unknown_tag() -> None:
    assert "Invalid pretrained tag (nonsense)" in error_of("timm/test_vit.nonsense")


def test_timm_model_of_other_classes_has_no_class_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, num_classes=7))
    assert load_model("timm/test_vit").classes is None


# --- classes --------------------------------------------------------------------------------------


def test_imagenet_classes_are_in_logit_order() -> None:
    import timm

    assert list(models.imagenet_classes()) == list(timm.data.ImageNetInfo().label_names())
    assert len(set(models.imagenet_classes())) == 1000


def image_set(*classes: str) -> ImageSet:
    return ImageSet("folder", "test", torch.zeros(1, 3, 4, 4).byte(), None, classes)


def model_of(classes: tuple[str, ...] | None, trained: bool = True) -> LoadedModel:
    return LoadedModel("model", nn.Identity(), Preprocessing(4, (0.5,), (0.5,)), classes, trained)


def test_scored_logits_of_the_same_classes() -> None:
    assert scored_logits(model_of(("a", "b", "c")), image_set("a", "b", "c")) == [0, 1, 2]
    assert scored_logits(model_of(("a", "b", "c")), image_set("c", "a", "b")) == [2, 0, 1]


def test_scored_logits_of_a_subset() -> None:
    classes = models.imagenet_classes()
    chosen = (classes[3], classes[500], classes[999])
    assert scored_logits(model_of(classes), image_set(*chosen)) == [3, 500, 999]


def test_no_scored_logits_where_accuracy_means_nothing() -> None:
    abc = ("a", "b", "c")
    assert scored_logits(model_of(abc), image_set("a", "z")) is None
    assert scored_logits(model_of(None), image_set("a")) is None
    assert scored_logits(model_of(abc, trained=False), image_set(*abc)) is None


# --- the reference models -------------------------------------------------------------------------

ARCHITECTURE = {
    "image_size": 8,
    "patch_size": 2,
    "width": 24,
    "depth": 1,
    "heads": 2,
    "num_classes": 10,
}


@pytest.fixture
def weights_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `weights` with a small `vit_digits` and its card."""
    monkeypatch.setattr(models, "WEIGHTS_DIR", tmp_path)
    torch.manual_seed(2)
    state = {k: v.half() for k, v in build_reference_vit(**ARCHITECTURE).state_dict().items()}
    save_file(state, tmp_path / "vit_digits.safetensors")
    content = (tmp_path / "vit_digits.safetensors").read_bytes()
    card = {
        "architecture": ARCHITECTURE,
        "mean": [0.3, 0.4, 0.5],
        "std": [0.1, 0.2, 0.3],
        "classes": list("0123456789"),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (tmp_path / "vit_digits.json").write_text(json.dumps(card))
    return tmp_path


def test_reference_model_is_its_file_in_float32(weights_dir: Path) -> None:
    loaded = load_model("vit_digits")
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
    loaded = load_model("vit_digits", untrained=True)
    assert not loaded.trained
    assert loaded.checkpoints == {}


def test_reference_model_without_its_card(weights_dir: Path) -> None:
    text = error_of("vit_tiny_imagenet")
    assert str(weights_dir / "vit_tiny_imagenet.json") in text
    assert "python -m utils.train_reference" in text


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


def test_build_reference_vit_is_decided_by_the_seed() -> None:
    outputs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        module = build_reference_vit(8, 2, 24, 2, 2, 5).eval()
        outputs.append(module(torch.ones(1, 3, 8, 8)))
    assert outputs[0].equal(outputs[1])
    assert not outputs[0].equal(outputs[2])
