"""Models by name, and your own: a PyTorch module with its preprocessing and its classes.

    dinov2_vits14_lc …      DINOv2 with the ImageNet-1k linear head, by Torch Hub, pinned commit
    timm/<name>             a timm network with its pretrained weights, or yours by --checkpoint;
                            also timm/hf-hub:<owner>/<name> and timm/local-dir:<folder>
    vit_tiny_imagenet …     the small reference models of `weights/`, no network needed
    <path>.safetensors      what Part 2 trained, with its card beside it

Everything loads offline once its files are cached: TORCH_HOME holds the DINOv2 code and
checkpoints, HF_HOME timm's. Checkpoints are read with `weights_only=True` or as safetensors, so
that no foreign pickle runs.
"""

import contextlib
import functools
import hashlib
import json
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from utils.cli import UserError, check_name, first_line, make_output_dir
from utils.data import ImageSet, Preprocessing
from utils.results import replace_file

WEIGHTS_DIR = Path(__file__).resolve().parent.parent / "weights"

DINOV2_REPOSITORY = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"
DINOV2_WEIGHTS_URL = "https://dl.fbaipublicfiles.com/dinov2"
DINOV2_MODELS = tuple(
    f"dinov2_vit{size}14{registers}_lc" for size in "sbl" for registers in ("", "_reg")
)
DINOV2_INPUT_SIZE = 224  # pixels: 16 x 16 patches of 14, the size its accuracy is published at
REFERENCE_MODELS = ("vit_tiny_imagenet", "vit_digits")
PART2_MODEL = "smallcnn_cifar100"
LONGEST_NAME = 120  # of a run's folder, in characters

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

WEIGHT_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors", ".tar")


@dataclass(frozen=True)
class ModelSource:
    """Which model, with whose weights, classes and preprocessing; workers load from it."""

    name: str
    checkpoint: Path | None = None  # weights for `timm/<name>`
    untrained: bool = False  # random weights: the same latency, no accuracy
    classes_file: Path | None = None  # the class of each logit, one a line
    mean: tuple[float, ...] | None = None  # this and the next three: instead of the model's own
    std: tuple[float, ...] | None = None
    input_size: int | None = None  # pixels
    interpolation: str | None = None
    seed: int = 0  # of random weights
    network: Callable[..., Any] | None = None  # builds Part 2's network


@dataclass(frozen=True)
class LoadedModel:
    """A float32 module in eval mode on the CPU: `[N, 3, S, S]` -> logits `[N, C]`."""

    name: str
    module: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None  # logit i is classes[i]; None where they are unknown
    classes_from: str = "the model's own"  # in words
    checkpoints: dict[str, str] = field(default_factory=dict)  # file name -> sha256
    trained: bool = True
    num_classes: int = 0  # C; 0 where the outputs are features, not classes


def load_model(source: ModelSource) -> LoadedModel:
    """Load a model; random weights are the same in every process.

    Raises:
        UserError: unknown name, unreachable hub, a checkpoint that is damaged, unsafe or of another
            network, or a network that does not turn square RGB images into logits.
    """
    load = _loader_of(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        model = load(source)
        model.module.eval().requires_grad_(False)
        own = model.preprocessing
        preprocessing = Preprocessing(
            source.input_size or own.input_size,
            source.mean or own.mean,
            source.std or own.std,
            source.interpolation or own.interpolation,
        )
        model = replace(model, preprocessing=preprocessing, trained=not source.untrained)
        model = replace(model, num_classes=_count_classes(model))
        if source.untrained:
            open_scales(model.module, preprocessing.input_size)
    if source.classes_file is None:
        return model
    classes = _read_classes(source.classes_file, model)
    return replace(model, classes=classes, classes_from=f"--classes {source.classes_file}")


def run_name(source: ModelSource) -> str:
    """The folder of a model's results, `<model>[-<checkpoint>|-untrained]`, `-` for slashes."""
    which = "-untrained" if source.untrained else ""
    if source.checkpoint is not None:
        which = f"-{source.checkpoint.with_suffix('')}"
    name = re.sub("[/:]+", "-", source.name.removesuffix(".safetensors") + which).strip("-")
    if len(name) > LONGEST_NAME:  # a file system allows 255 bytes, the names of engines need some
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def describe_preprocessing(model: LoadedModel) -> str:
    """How images are made the model's input, for the screen."""
    own = model.preprocessing
    mean, std = (", ".join(f"{x:.4g}" for x in values) for values in (own.mean, own.std))
    size = f"{own.input_size}x{own.input_size}"
    return f"{size} pixels, {own.interpolation}, mean {mean}, standard deviation {std}"


def name_classes(model: LoadedModel, of_images: tuple[str, ...]) -> LoadedModel:
    """Name a model's outputs, if it does not itself: as the images' classes, or ImageNet-1k's."""
    if model.classes is not None or model.num_classes == 0:
        return model
    if model.num_classes == len(of_images):
        origin = f"the sorted names of the {len(of_images)} classes of images"
        return replace(model, classes=of_images, classes_from=origin)
    if model.num_classes == 1000:
        origin = "ImageNet-1k's, as there are 1000 outputs"
        return replace(model, classes=imagenet_classes(), classes_from=origin)
    return model


def scored_logits(model: LoadedModel, images: ImageSet) -> tuple[list[int] | None, str]:
    """Which logit stands for each of the data set's classes, and where that is known from.

    A model with 1000 ImageNet classes is scored on Tiny-ImageNet's 200 of them. None, and the
    reason in words, where accuracy would mean nothing.
    """
    classes, origin, count = model.classes, model.classes_from, len(images.classes)
    if not model.trained:
        return None, "no accuracy: the weights are random (--untrained)"
    if classes is None and model.num_classes == 0:
        return None, "no accuracy: the network has no classifier"
    if classes is None:
        counts = f"{model.num_classes} outputs for {count} classes of images"
        return None, f"no accuracy: {counts}; name the outputs with --classes FILE"
    position = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in images.classes if name not in position]
    if unknown:
        lacking = f"{unknown[0]!r}, one of {len(unknown)} of the images' {count}"
        remedy = "name the outputs as the images' folders are named with --classes FILE"
        return None, f"no accuracy: the model's classes ({origin}) lack {lacking}; {remedy}"
    return [position[name] for name in images.classes], f"classes: {origin}"


def imagenet_classes() -> tuple[str, ...]:
    """The 1000 WordNet ids of ImageNet-1k, sorted, which is the order of the logits."""
    import timm

    return tuple(timm.data.ImageNetInfo().label_names())


def _loader_of(source: ModelSource) -> Callable[[ModelSource], LoadedModel]:
    """The function that loads this kind of model; UserError for options that do not go with it."""
    mean, std = source.mean or IMAGENET_MEAN, source.std or IMAGENET_STD
    scaled = 0 <= min(mean) <= max(mean) <= 1 and 0 < min(std) <= max(std) <= 1
    if not (len(mean) == len(std) == 3 and scaled):
        raise UserError("--mean and --std: give red's, green's and blue's, of pixels from 0 to 1")
    name, is_timm = source.name, source.name.startswith("timm/")
    has_network = ":" in name if is_timm else name.endswith(".safetensors")
    if name.endswith(WEIGHT_SUFFIXES) and not has_network:
        remedy = f"--model timm/NAME --checkpoint {name.removeprefix('timm/')}"
        raise UserError(f"--model {name} names weights without their network: use {remedy}")
    if source.checkpoint is not None and (source.untrained or not is_timm):
        raise UserError("--checkpoint goes with --model timm/NAME alone, and not with --untrained")
    if is_timm:
        return _load_timm
    if name in DINOV2_MODELS:
        return _load_dinov2
    if not name.endswith(".safetensors"):
        known = (*DINOV2_MODELS, *REFERENCE_MODELS, PART2_MODEL, "timm/<name>")
        check_name(name, known, "model")
    return _load_with_card


def _count_classes(model: LoadedModel) -> int:
    """C of a model's logits `[N, C]`, from one black image; 0 if they are features."""
    size = model.preprocessing.input_size
    try:
        with torch.no_grad():
            output = model.module(torch.zeros(1, 3, size, size))
    except Exception as error:  # networks that do not fit an image raise all kinds
        raise UserError(
            f"{model.name} does not take {size}x{size} pixels ({first_line(error)}): "
            "choose another --input-size"
        ) from error
    if isinstance(output, Tensor) and output.ndim == 2:
        # timm sets num_classes to 0 where a network ends before a classifier.
        return 0 if getattr(model.module, "num_classes", None) == 0 else output.shape[1]
    found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise UserError(f"{model.name} gives {found} for one image, not [1, C]: choose a classifier")


def _read_classes(path: Path, model: LoadedModel) -> tuple[str, ...]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
        names = [line.strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --classes {path} ({first_line(error)})") from error
    if len(names) == len(set(names)) == model.num_classes:
        return tuple(names)
    found = f"{len(names)} names, {len(set(names))} of them different"
    wanted = f"each of the {model.num_classes} classes of {model.name}, one a line"
    raise UserError(f"--classes {path} has {found}: name {wanted}, in the order of the outputs")


# --- DINOv2 from Torch Hub ------------------------------------------------------------------------


def _load_dinov2(source: ModelSource) -> LoadedModel:
    name, size = source.name, source.input_size or DINOV2_INPUT_SIZE
    if size % 14:
        raise UserError(f"--input-size {size}: DINOv2 takes multiples of 14 pixels")
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
    except Exception as error:  # what the hub sent is run as Python
        task = f"load {name} from Torch Hub"
        raise _hub_error(task, error, "connect to github.com once") from error
    checkpoints = {}
    if not source.untrained:
        backbone = name.removesuffix("_lc")
        folder = f"{DINOV2_WEIGHTS_URL}/{backbone.removesuffix('_reg')}"
        file_stem = backbone.replace("_reg", "_reg4")
        for part, suffix in ((module.backbone, "pretrain"), (module.linear_head, "linear4_head")):
            path = _load_from_url(part, f"{folder}/{file_stem}_{suffix}.pth")
            checkpoints[path.name] = sha256_of(path)
    _fold_position_embedding(module.backbone, size)
    published = Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD)
    return LoadedModel(name, module, published, imagenet_classes(), "ImageNet-1k's", checkpoints)


def _load_from_url(module: nn.Module, url: str) -> Path:
    """Load a state dict from Torch Hub's cache, downloaded if it is not there; return its path."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    try:
        state = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=sys.stderr.isatty(), weights_only=True
        )
        module.load_state_dict(state)
    except Exception as error:  # no connection, or a file that is damaged, foreign or unsafe
        if path.is_file():
            raise UserError(
                f"{path} is not the checkpoint it should be, or holds more than weights "
                f"({first_line(error)}): delete it and run again"
            ) from error
        remedy = f"put the file at {path}, add --untrained to measure latency only"
        raise _hub_error(f"download {url}", error, remedy) from error
    return path


def _hub_error(task: str, error: Exception, remedy: str) -> UserError:
    """What to do about a hub that cannot be reached, or about a cache that cannot be written."""
    make_output_dir(Path(torch.hub.get_dir()), "the folder of TORCH_HOME,")
    other = f"or use --model {REFERENCE_MODELS[0]}, which needs no network"
    return UserError(f"cannot {task} ({first_line(error)}): {remedy}, {other}")


def _fold_position_embedding(backbone: Any, input_size: int) -> None:
    """Replace the 518-pixel position embedding by the one interpolated to the input size.

    DINOv2 interpolates in every forward pass; folded, an ONNX export holds a constant instead.
    """
    with torch.no_grad():
        image = torch.zeros(1, 3, input_size, input_size)
        tokens = torch.cat([backbone.cls_token, backbone.patch_embed(image)], dim=1)
        folded = backbone.interpolate_pos_encoding(tokens, input_size, input_size)
    backbone.pos_embed = nn.Parameter(folded.clone())


# --- timm -----------------------------------------------------------------------------------------


def _load_timm(source: ModelSource) -> LoadedModel:
    import timm

    name, checkpoint = source.name.removeprefix("timm/"), source.checkpoint
    is_listed = ":" not in name  # else in timm's own forms, hf-hub: and local-dir:
    if is_listed:
        check_name(name.partition(".")[0], timm.list_models(), "timm model")
    checkpoints = {}
    if checkpoint is None:
        module = _create_timm(source, pretrained=not source.untrained)
    else:
        module = _create_with_weights(source, checkpoint)
        checkpoints = {checkpoint.name: sha256_of(checkpoint)}
    patches = getattr(module, "patch_embed", None)
    side = timm.layers.to_2tuple(getattr(patches, "patch_size", None) or 1)[0]
    pads, size = getattr(patches, "dynamic_img_pad", False), source.input_size or side
    if size % side and not pads:  # timm would cut off the rest
        raise UserError(f"--input-size {size}: {name} takes multiples of {side} pixels")
    config = timm.data.resolve_model_data_config(module)
    channels, height, width = config["input_size"]
    if channels != 3 or (height != width and source.input_size is None):
        wanted = f"{channels} channels of {height}x{width} pixels"
        remedy = f"--input-size {min(height, width)}" if channels == 3 else "another model"
        raise UserError(f"{source.name} takes {wanted}, images here are RGB and square: {remedy}?")
    own = Preprocessing(width, tuple(config["mean"]), tuple(config["std"]), config["interpolation"])
    names, origin = module.pretrained_cfg.get("label_names") or (), "its configuration's"
    classes = tuple(names) if names and len(names) == module.num_classes else None
    if is_listed and checkpoint is None and module.num_classes == 1000:
        classes, origin = imagenet_classes(), "ImageNet-1k's"
    return LoadedModel(source.name, module, own, classes, origin, checkpoints)


def _create_timm(source: ModelSource, pretrained: bool, **options: Any) -> Any:
    import timm

    name = source.name.removeprefix("timm/")
    create = functools.partial(timm.create_model, name, pretrained=pretrained, **options)
    try:
        if source.input_size is not None:
            with contextlib.suppress(TypeError):  # a network that is not tied to one size
                return create(img_size=source.input_size)
        return create()
    except Exception as error:  # timm's, the hub's, or of a file that came from there
        remedy = "check the name"
        if pretrained and not name.startswith("local-dir:"):
            remedy += ", connect to huggingface.co once, or add --untrained to measure latency only"
        raise UserError(f"cannot load {source.name} ({first_line(error)}): {remedy}") from error


def _read_weights(path: Path) -> dict[str, Any]:
    """A user's safetensors file or state dict.

    It may lie under `model_ema`, `state_dict`, `model` or `model_state_dict` (the first of these
    that is there is taken); the prefixes of DataParallel and torch.compile are taken off.
    """
    import timm

    if not path.is_file():
        raise UserError(f"--checkpoint {path} is no file")
    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
        return timm.models.clean_state_dict(state.get("model_state_dict", state))
    except Exception as error:  # of a file that anyone may have made
        reason = first_line(error).split(". ")[0]  # what follows is timm's advice
        what = "is damaged, or holds more than weights"
        raise UserError(f"--checkpoint {path} {what} ({reason})") from error


def _create_with_weights(source: ModelSource, path: Path) -> Any:
    """A timm network with a user's weights, matched by the names of the tensors.

    The classifier has as many outputs as in the file.
    """
    state = _read_weights(path)
    module = _create_timm(source, pretrained=False)
    heads = module.pretrained_cfg.get("classifier") or ""
    head = state.get(f"{heads if isinstance(heads, str) else heads[0]}.weight")
    if isinstance(head, Tensor) and head.ndim and len(head) != module.num_classes:
        module = _create_timm(source, pretrained=False, num_classes=len(head))
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = [textwrap.shorten(line, 400) for line in str(error).splitlines()[1:4]]
        remedy = "is it of another network, or of another --input-size?"
        raise UserError(f"--checkpoint {path}: {' '.join(lines)} {remedy}") from error
    for name, weight in module.state_dict().items():
        if not weight.isfinite().all():
            raise UserError(f"--checkpoint {path}: {name} holds NaN or infinity")
    return module


# --- random weights -------------------------------------------------------------------------------

NOTHING = 1e-3  # weights no larger are as good as zero; an ordinary start reaches 0.04
ADDED = re.compile("bias|beta|token|pos|embed")  # names of what is added and may well be zero


@torch.no_grad()
def open_scales(module: nn.Module, input_size: int) -> None:
    """Make an untrained network depend on all its weights, as a trained one does.

    A branch whose last norm, LayerScale or gain starts near zero hides its weights, as does a head
    that does: any quantisation of them would look perfect. And a BatchNorm that has seen no image
    normalises nothing, so that branches fade or explode from block to block.
    """
    for name, weight in module.named_parameters():
        if (weight.abs() > NOTHING).any() or ADDED.search(name.rpartition(".")[2]):
            continue
        if sum(side > 1 for side in weight.shape) > 1:
            nn.init.kaiming_uniform_(weight)
        else:  # one factor, or one for each channel
            nn.init.ones_(weight)
    coarse, fine = torch.randn(8, 3, 4, 4), torch.randn(8, 3, input_size, input_size)
    images = nn.functional.interpolate(coarse, fine.shape[2:], mode="bicubic") + fine / 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # last digits depend on it, and every process must find the same
    torch.optim.swa_utils.update_bn([images], module)
    torch.set_num_threads(threads)


# --- the network of the reference models ----------------------------------------------------------


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


# --- weights with a card: NAME.safetensors and NAME.json ------------------------------------------


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
    network: nn.Module,
    preprocessing: Preprocessing,
    test_set: ImageSet,
    about: dict[str, Any],
) -> None:
    """Write the weights, then the card that vouches for them, each renamed when it is whole.

    Args:
        network: where it was trained, rounded by `round_to_half`; it is moved to the CPU.
        test_set: the images of its accuracy.
        about: the rest of the card; `architecture`, which builds the network, and `top1`, percent
            of the test set with these weights, must be there.
    """
    device = next(network.parameters()).device
    network.cpu().to(memory_format=torch.contiguous_format).eval()
    state = round_to_half(network)  # again, which changes nothing
    card = {
        "image_size": preprocessing.input_size,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "classes": test_set.classes,
        "dataset": test_set.dataset,
        "split": test_set.split,
        "n_images": len(test_set),
        "sample_logits": sample_logits(network, preprocessing.input_size),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        **about,
    }
    weights = save(state)
    card["sha256"] = hashlib.sha256(weights).hexdigest()
    replace_file(path, weights)
    replace_file(path.with_suffix(".json"), (json.dumps(card, indent=1) + "\n").encode())


def _load_with_card(source: ModelSource) -> LoadedModel:
    """What `write_checkpoint` wrote: a reference model, or a network of Part 2."""
    name, build, remedy = source.name, source.network, "git checkout weights"
    path = Path(name) if name.endswith(".safetensors") else WEIGHTS_DIR / f"{name}.safetensors"
    if path.stem in REFERENCE_MODELS:
        build = build_reference_vit
    elif name != PART2_MODEL:
        remedy = f"python part2_tune.py (other weights: --model timm/NAME --checkpoint {name})"
    assert build is not None, "pass Part 2's constructor as ModelSource.network"
    card_path = path.with_suffix(".json")
    try:
        card = json.loads(card_path.read_text())
        network = build(**card["architecture"])
        # Cards of the first reference models have the size among the architecture only.
        size = card.get("image_size") or card["architecture"]["image_size"]
        own = Preprocessing(size, tuple(card["mean"]), tuple(card["std"]))
        classes, digest = tuple(card["classes"]), card["sha256"]
        if not source.untrained:
            if not path.is_file() or sha256_of(path) != digest:
                raise UserError(f"{path} is missing or differs from its card: run {remedy}")
            network.load_state_dict(load_file(path))
    except OSError as error:
        raise UserError(f"cannot read {card_path} ({error.strerror}): run {remedy}") from error
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"{card_path} is damaged or foreign ({reason}): run {remedy}") from error
    checkpoints = {} if source.untrained else {path.name: digest}
    return LoadedModel(path.stem, network, own, classes, "its card's", checkpoints)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
