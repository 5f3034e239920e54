"""Named models: a PyTorch module with its preprocessing and its classes.

    dinov2_vits14_lc …      DINOv2 with the ImageNet-1k linear head, by Torch Hub, pinned commit
    timm/<name>             any pretrained timm model
    vit_tiny_imagenet …     the small reference models of `weights/`, no network needed

Everything loads offline once its files are cached: TORCH_HOME holds the DINOv2 code and
checkpoints, HF_HOME timm's. Checkpoints are read with `weights_only=True` or as safetensors, so
that no foreign pickle runs.
"""

import hashlib
import http.client
import json
import pickle
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from utils.cli import UserError, check_name, first_line
from utils.data import ImageSet, Preprocessing
from utils.files import replace_file

WEIGHTS_DIR = Path(__file__).resolve().parent.parent / "weights"
WNIDS_FILE = Path(__file__).with_name("imagenet_wnids.txt")  # the 1000 ids in logit order

DINOV2_REPOSITORY = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"
DINOV2_WEIGHTS_URL = "https://dl.fbaipublicfiles.com/dinov2"
DINOV2_MODELS = tuple(
    f"dinov2_vit{size}14{registers}_lc" for size in "sbl" for registers in ("", "_reg")
)
DINOV2_INPUT_SIZE = 224  # pixels: 16 x 16 patches of 14, the size its accuracy is published at
REFERENCE_MODELS = ("vit_tiny_imagenet", "vit_digits")

# What torch.load and load_state_dict raise on a file that is damaged or not a state dict.
DAMAGED_CHECKPOINT = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,  # a truncated archive: "Invalid argument"
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class LoadedModel:
    """A float32 module in eval mode on the CPU: `[N, 3, S, S]` -> logits `[N, len(classes)]`."""

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None  # logit i is classes[i]; None where they are unknown
    trained: bool = True
    checkpoints: dict[str, str] = field(default_factory=dict)  # file name -> sha256


def load_model(name: str, untrained: bool = False) -> LoadedModel:
    """Load a model by name.

    Args:
        name: one of DINOV2_MODELS or REFERENCE_MODELS, or `timm/<name>`.
        untrained: skip the checkpoint and keep random weights (latency is the same, accuracy is
            not measurable).

    Raises:
        UserError: unknown name, unreachable hub, damaged or unsafe checkpoint.
    """
    if name.startswith("timm/"):
        model = _load_timm(name.removeprefix("timm/"), untrained)
    else:
        check_name(name, (*DINOV2_MODELS, *REFERENCE_MODELS, "timm/<name>"), "model")
        load = _load_dinov2 if name in DINOV2_MODELS else _load_reference
        model = load(name, untrained)
    model.module.eval().requires_grad_(False)
    return model


def scored_logits(model: LoadedModel, images: ImageSet) -> list[int] | None:
    """Which logit stands for each of the data set's classes.

    A model with 1000 ImageNet classes is scored on Tiny-ImageNet's 200 of them. None when the
    model was not trained, or not for these classes, so that accuracy would mean nothing.
    """
    if not model.trained or model.classes is None:
        return None
    position = {name: i for i, name in enumerate(model.classes)}
    if not all(name in position for name in images.classes):
        return None
    return [position[name] for name in images.classes]


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 WordNet ids of ImageNet-1k, sorted, which is the order of the logits."""
    return tuple(WNIDS_FILE.read_text().split())


# --- DINOv2 from Torch Hub ------------------------------------------------------------------------


def _load_dinov2(name: str, untrained: bool) -> LoadedModel:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the repository warns that xFormers is absent
            module: Any = torch.hub.load(
                DINOV2_REPOSITORY,
                name,
                pretrained=False,
                trust_repo=True,
                skip_validation=True,
                verbose=False,
            )
    except (OSError, RuntimeError, http.client.HTTPException, zipfile.BadZipFile) as error:
        raise UserError(
            f"cannot load {name} from Torch Hub ({error}): connect to github.com once, or use "
            f"--model {REFERENCE_MODELS[0]}, which needs no network"
        ) from error
    checkpoints = {}
    if not untrained:
        backbone = name.removesuffix("_lc")
        folder = f"{DINOV2_WEIGHTS_URL}/{backbone.removesuffix('_reg')}"
        file_stem = backbone.replace("_reg", "_reg4")
        for part, suffix in ((module.backbone, "pretrain"), (module.linear_head, "linear4_head")):
            path = _fetch_checkpoint(f"{folder}/{file_stem}_{suffix}.pth")
            _load_state(part, path)
            checkpoints[path.name] = sha256_of(path)
    preprocessing = Preprocessing(DINOV2_INPUT_SIZE, IMAGENET_MEAN, IMAGENET_STD)
    _fold_position_embedding(module.backbone, preprocessing.input_size)
    return LoadedModel(name, module, preprocessing, imagenet_classes(), not untrained, checkpoints)


def _fetch_checkpoint(url: str) -> Path:
    """Download a checkpoint into Torch Hub's cache unless it is there; return its path."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {url} ({error}): put the file at {path}, add --untrained to measure "
            f"latency only, or use --model {REFERENCE_MODELS[0]}, which needs no network"
        ) from error
    return path


def _load_state(module: nn.Module, path: Path) -> None:
    """Load a `.pth` state dict without running any pickled code."""
    try:
        module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except DAMAGED_CHECKPOINT as error:
        raise UserError(
            f"{path} is not the checkpoint it should be, or holds more than weights "
            f"({first_line(error)}): delete it and run again"
        ) from error


def _fold_position_embedding(backbone: Any, input_size: int) -> None:
    """Replace the 518-pixel position embedding by the one interpolated to the input size.

    DINOv2 interpolates in every forward pass; folded, the graph holds a constant instead.
    """
    with torch.no_grad():
        image = torch.zeros(1, 3, input_size, input_size)
        tokens = torch.cat([backbone.cls_token, backbone.patch_embed(image)], dim=1)
        folded = backbone.interpolate_pos_encoding(tokens, input_size, input_size)
    backbone.pos_embed = nn.Parameter(folded.clone())


# --- timm -----------------------------------------------------------------------------------------


def _load_timm(name: str, untrained: bool) -> LoadedModel:
    import timm

    architecture = name.partition(".")[0]
    check_name(architecture, timm.list_models(), "timm model")
    try:
        module = timm.create_model(name, pretrained=not untrained)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot load timm/{name} ({first_line(error)}): connect to huggingface.co once, or "
            "add --untrained to measure latency only"
        ) from error
    if untrained:
        _open_layer_scale(module)
    config = timm.data.resolve_model_data_config(module)
    preprocessing = Preprocessing(
        config["input_size"][-1], config["mean"], config["std"], config["interpolation"]
    )
    classes = imagenet_classes() if module.num_classes == 1000 else None
    return LoadedModel(f"timm/{name}", module, preprocessing, classes, not untrained)


def _open_layer_scale(module: nn.Module) -> None:
    """Set LayerScale to 1: at its initial 1e-5 an untrained block does nothing, and any
    quantisation of it would look perfect. timm calls it gamma, gamma_1 or gamma1."""
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[2].startswith("gamma"):
            nn.init.ones_(parameter)


# --- the reference models of weights/ -------------------------------------------------------------


class ConvStem(nn.Module):
    """3x3 convolutions from pixels down to the patch grid, then a 1x1 projection.

    Replaces a ViT's patch embedding (Xiao et al. 2021, "Early Convolutions Help Transformers See
    Better"): `[N, 3, S, S]` -> tokens `[N, (S / patch_size)^2, embed_dim]`. The first convolution
    keeps the resolution, each of the others halves it.
    """

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **_: Any
    ) -> None:
        super().__init__()
        halvings = patch_size.bit_length() - 1
        # Width 384 gives 32, 64, 96, 128 channels: 6 % of the whole model's multiply-adds.
        widths = [in_chans] + [embed_dim * i // 12 for i in range(1, halvings + 2)]
        layers: list[nn.Module] = []
        for i, (narrow, wide) in enumerate(pairwise(widths)):
            layers += [
                nn.Conv2d(narrow, wide, 3, stride=1 if i == 0 else 2, padding=1, bias=False),
                nn.BatchNorm2d(wide),
                nn.GELU(),
            ]
        layers.append(nn.Conv2d(widths[-1], embed_dim, 1))
        self.layers = nn.Sequential(*layers)
        self.num_patches = (img_size // patch_size) ** 2

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(2).transpose(1, 2)


def build_reference_vit(
    image_size: int,
    patch_size: int,
    width: int,
    depth: int,
    heads: int,
    num_classes: int,
    drop_path: float = 0.0,
) -> nn.Module:
    """A small ViT of timm's blocks: convolutional stem, average pooling, no class token.

    Sizes in pixels; `patch_size` is a power of two; `drop_path` is the last block's rate of
    stochastic depth and matters only in training.
    """
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=num_classes,
        class_token=False,
        global_pool="avg",
        drop_path_rate=drop_path,
        embed_layer=ConvStem,
    )


def _load_reference(name: str, untrained: bool) -> LoadedModel:
    """Rebuild a model from `weights/<name>.json` and `.safetensors`, written by train_reference."""
    path = WEIGHTS_DIR / f"{name}.safetensors"
    remedy = "git checkout weights, or python -m utils.train_reference"
    return load_checkpoint(path, build_reference_vit, remedy, untrained)


# --- weights with a card: NAME.safetensors and NAME.json ------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A trained network as it is saved."""

    state: dict[str, Tensor]  # on the CPU, floating-point tensors in fp16
    architecture: dict[str, Any]  # arguments that build the network
    preprocessing: Preprocessing
    top1: float  # percent of the labelled test images, with these weights


def round_to_half(module: nn.Module) -> dict[str, Tensor]:
    """Round a module's floating-point state to fp16 in place; return it as fp16, on the CPU."""
    state = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in module.state_dict().items()
    }
    module.load_state_dict(state)
    return state


@torch.no_grad()
def sample_logits(module: nn.Module, image_size: int) -> list[list[float]]:
    """The first eight logits of two images of noise, which guard a file of weights."""
    # NumPy's legacy generator gives the same numbers in every version.
    noise = np.random.RandomState(0).standard_normal((2, 3, image_size, image_size))
    logits = module(torch.from_numpy(noise).float())[:, :8]
    return [[round(value, 4) for value in row] for row in logits.tolist()]


def write_checkpoint(
    path: Path,
    checkpoint: Checkpoint,
    network: nn.Module,
    test_set: ImageSet,
    about: dict[str, Any],
    device: torch.device,
) -> None:
    """Write the weights, then the card that vouches for them, each renamed when it is whole.

    Args:
        network: built with the checkpoint's architecture, on the CPU; gets its weights.
        test_set: the images of its accuracy.
        about: how it came about, for the card.
        device: where it was trained, for the card.
    """
    network.load_state_dict(checkpoint.state)
    how = checkpoint.preprocessing
    card = {
        "architecture": checkpoint.architecture,
        "image_size": how.input_size,
        "mean": how.mean,
        "std": how.std,
        "classes": test_set.classes,
        "dataset": test_set.dataset,
        "split": test_set.split,
        "n_images": len(test_set),
        "top1": round(checkpoint.top1, 2),
        "sample_logits": sample_logits(network.eval(), how.input_size),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        **about,
    }
    weights = save(checkpoint.state)
    card["sha256"] = hashlib.sha256(weights).hexdigest()
    replace_file(path, weights)
    replace_file(path.with_suffix(".json"), (json.dumps(card, indent=1) + "\n").encode())


def load_checkpoint(
    path: Path, build: Callable[..., nn.Module], remedy: str, untrained: bool = False
) -> LoadedModel:
    """Load what `write_checkpoint` wrote.

    Args:
        path: the weights, `.safetensors`; the card lies beside it.
        build: makes the network from the card's architecture.
        remedy: a command that restores the files, for error messages.
        untrained: keep random weights.

    Raises:
        UserError: missing, damaged or foreign files.
    """
    card_path = path.with_suffix(".json")
    try:
        card = json.loads(card_path.read_text())
        network = build(**card["architecture"])
        # Cards of the first reference models have the size among the architecture only.
        size = card.get("image_size") or card["architecture"]["image_size"]
        how = Preprocessing(size, tuple(card["mean"]), tuple(card["std"]))
        classes, digest = tuple(card["classes"]), card["sha256"]
        if not untrained:
            if not path.is_file() or sha256_of(path) != digest:
                raise UserError(f"{path} is missing or differs from its card: run {remedy}")
            network.load_state_dict(load_file(path))
    except OSError as error:
        raise UserError(f"cannot read {card_path} ({error.strerror}): run {remedy}") from error
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"{card_path} is damaged or foreign ({reason}): run {remedy}") from error
    network.eval().requires_grad_(False)
    checkpoints = {} if untrained else {path.name: digest}
    return LoadedModel(path.stem, network, how, classes, not untrained, checkpoints)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
