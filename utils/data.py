"""Named data sets and image folders as tensors: images uint8 `[N, 3, H, W]`, labels int64 `[N]`.

Images are decoded once, in parallel, and cached as one safetensors file under `data/cache`, which
holds good while the name, size and modification time of every source file stay. Normalisation and
resizing are batched tensor operations on the target device (`preprocess`); only the photographs of
a `folder`, each of its own size, are resized and cropped as they are decoded.
"""

import functools
import hashlib
import http.client
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.contrib.concurrent import thread_map

from utils import cli
from utils.cli import UserError
from utils.results import replacing

ROOT = Path(__file__).resolve().parent.parent
SMALL_PART = 4  # a subset of at most a fourth of the images is decoded alone, and not kept
CACHE_DIR = Path(os.environ.get("DATA_CACHE_DIR", ROOT / "data" / "cache"))
CACHE_VERSION = 2  # raise it when decoding changes
DECODING_THREADS = 4  # more wait for Python's lock: 32 took 37 s for what 2 do in 10
DECODING_CHUNK = 100  # images a thread takes at once: one by one, threads mostly wait in turn
HELD_OUT_SEED = 0  # fixed, so that recipes and seeds are compared on the same images

DATASETS = ("tiny-imagenet", "cifar100", "digits", "folder")
# Speed is measured on the test split; Tiny-ImageNet's has no labels.
ACCURACY_SPLIT = {"tiny-imagenet": "val", "cifar100": "test", "digits": "test", "folder": "test"}

INTERPOLATIONS = ("bicubic", "bilinear")  # PyTorch's names, and Pillow's in lower case
# Said on the screen, and in the --help of the scripts.
FOLDER_CROP = "each image is resized by its shorter side and cropped to its central square"
DATASETS_HELP = f"one of {', '.join(DATASETS)}; of a folder {FOLDER_CROP}"
# What ends so must be an image; other files are asked for the first bytes of one of these formats.
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tga", ".tif", ".tiff", ".webp"}
SNIFFED = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "PSD", "QOI", "TIFF", "WEBP")
NOT_AN_IMAGE = (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set: images uint8 `[N, 3, H, W]`, labels int64 `[N]` or None."""

    dataset: str
    split: str  # of a `folder` the name of the folder that served
    images: Tensor
    labels: Tensor | None
    classes: tuple[str, ...]  # label i is classes[i]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its input: whole images resized to a square, scaled, normalised."""

    input_size: int  # pixels
    mean: tuple[float, ...]  # per channel, on the 0-1 scale
    std: tuple[float, ...]
    interpolation: str = "bicubic"


def load_images(
    dataset: str,
    split: str,
    data_dir: Path | None = None,
    image_size: int | None = None,
    num_images: int | None = None,
    seed: int = 0,
    fewer: bool = False,
    interpolation: str = "bicubic",
) -> ImageSet:
    """Load one split of a named data set.

    Args:
        dataset: one of DATASETS.
        split: `train`, `test`, or for Tiny-ImageNet also `val`.
        data_dir: folder of the set itself, `data/<dataset>` by default; `digits` has none.
        image_size: side in pixels to which `folder` images are resized and cropped; None takes
            them as they are, all of one size.
        num_images: class-balanced subset drawn with `seed`; None takes all.
        fewer: take all, too, if there are fewer than `num_images`; else that is an error.
        interpolation: one of INTERPOLATIONS, with which `folder` images are resized.

    Raises:
        UserError: missing, damaged or foreign data, with the path and what to do.
    """
    cli.check_name(dataset, DATASETS, "data set")
    cli.check_name(interpolation, INTERPOLATIONS, "interpolation")
    folder = data_dir or ROOT / "data" / dataset
    if dataset == "digits":
        if data_dir is not None:
            raise UserError(
                f"--data-dir {data_dir}: digits has none; --dataset folder is for yours"
            )
        images = _load_digits(split)
    elif dataset == "cifar100" and not (folder / "train").is_dir():
        images = _load_cifar100_archive(folder, split)
    else:
        side = image_size if dataset == "folder" else None
        images = _load_files(dataset, folder, split, side, interpolation, num_images, seed)
    if num_images in (None, len(images)) or (fewer and num_images > len(images)):
        return images
    return take_subset(images, num_images, seed)


def take_subset(images: ImageSet, num_images: int, seed: int) -> ImageSet:
    """Draw a class-balanced random subset (class counts differ by at most one), order kept."""
    if num_images > len(images):
        raise UserError(
            f"{images.dataset} {images.split} has {len(images)} images, not {num_images}: "
            "ask for fewer"
        )
    return _select(images, _draw(images.labels, len(images), num_images, seed))


def _draw(labels: Tensor | None, count: int, num_images: int, seed: int) -> Tensor:
    """Indices of `num_images` of `count` images: one of each class, then a second, and so on."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if labels is not None:
        shuffled = labels.cpu()[order].numpy()
        rank_in_class = pd.Series(shuffled).groupby(shuffled).cumcount()
        order = order[np.argsort(rank_in_class.to_numpy(), kind="stable")]
    return order[:num_images]


def _select(images: ImageSet, chosen: Tensor) -> ImageSet:
    """The images with these indices, in the order of the set."""
    chosen = chosen.sort().values.to(images.images.device)
    labels = None if images.labels is None else images.labels[chosen]
    return replace(images, images=images.images[chosen], labels=labels)


def labels_of(images: ImageSet) -> Tensor:
    """The labels of a set that must have them."""
    assert images.labels is not None, f"{images.dataset} {images.split} has no labels"
    return images.labels


def to_device(images: ImageSet, device: torch.device) -> ImageSet:
    """The same set with images and labels in the device's memory."""
    labels = None if images.labels is None else images.labels.to(device)
    return replace(images, images=images.images.to(device), labels=labels)


def channel_statistics(images: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel on the 0-1 scale, to four decimals."""
    channels = images.images.cpu().unbind(1)
    found = [torch.std_mean(c.float().div_(255), correction=0) for c in channels]
    mean = tuple(round(mean.item(), 4) for _, mean in found)
    std = tuple(max(0.01, round(std.item(), 4)) for std, _ in found)  # 0 in a constant channel
    return mean, std


def hold_out(images: ImageSet, share: float) -> tuple[ImageSet, ImageSet]:
    """Split off `share` of each class, at least one image, always the same: (rest, held out).

    Raises:
        UserError: a class has only one image.
    """
    labels = labels_of(images).cpu()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    rest, held_out = [], []
    for label in labels.unique():
        members = order[labels[order] == label]
        if len(members) < 2:
            raise UserError(
                f"{images.dataset} {images.split}: class {images.classes[label]!r} has a single "
                "image, and one of each class is held out: add or take more images"
            )
        count = max(1, round(share * len(members)))
        held_out.append(members[:count])
        rest.append(members[count:])
    return _select(images, torch.cat(rest)), _select(images, torch.cat(held_out))


def preprocess(
    images: Tensor, preprocessing: Preprocessing, device: torch.device | str = "cpu"
) -> Tensor:
    """Turn uint8 `[N, 3, H, W]` into normalised float32 `[N, 3, S, S]` on `device`.

    The whole image is resized (antialiased, no crop): Tiny-ImageNet's are only 64 pixels wide.
    """
    x = images.to(device).float().div_(255)
    size = (preprocessing.input_size, preprocessing.input_size)
    if x.shape[-2:] != size:
        mode = preprocessing.interpolation
        x = torch.nn.functional.interpolate(x, size, mode=mode, antialias=True)
        x.clamp_(0, 1)  # bicubic overshoots; an 8-bit image could not
    mean = torch.tensor(preprocessing.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, device=device).view(1, 3, 1, 1)
    return x.sub_(mean).div_(std)


# --- sets that are no image files -----------------------------------------------------------------


def _load_digits(split: str) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits (8x8 grey), 80 % train and 20 % test, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    indices, classes = np.arange(len(digits.target)), digits.target
    train, test = train_test_split(indices, test_size=0.2, stratify=classes, random_state=0)
    chosen = np.sort(train if split == "train" else test)
    grey = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    images = torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1)
    labels = torch.from_numpy(classes[chosen]).long()
    return ImageSet("digits", split, images, labels, tuple(str(i) for i in range(10)))


def _load_cifar100_archive(folder: Path, split: str) -> ImageSet:
    """CIFAR-100 as torchvision unpacks it, md5-checked; written to `folder` if it is not there."""
    from torchvision.datasets import CIFAR100

    try:
        cifar = CIFAR100(str(folder), train=split == "train", download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot get CIFAR-100 ({error}): put {CIFAR100.filename} (md5 {CIFAR100.tgz_md5}) "
            f"into {folder}, or name a folder that can be written to, or one of images, with "
            "--data-dir"
        ) from error
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(cifar.targets, dtype=torch.int64)
    return ImageSet("cifar100", split, images, labels, tuple(cifar.classes))


# --- sets of image files --------------------------------------------------------------------------

Listing = tuple[list[Path], Tensor | None, list[str]]  # files, their labels, the classes


def _load_files(
    dataset: str,
    folder: Path,
    split: str,
    side: int | None,
    interpolation: str,
    num_images: int | None,
    seed: int,
) -> ImageSet:
    """All images, kept in the cache; or only those of a subset that is a small part of them."""
    try:
        root = folder / split if dataset == "tiny-imagenet" else _find_split(folder, split)
        listing = list_tiny_imagenet if dataset == "tiny-imagenet" else _list_image_folder
        paths, labels, classes = listing(root)
        key = _fingerprint(paths)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {folder}: {error}") from error
    if side:
        _say_once(f"{folder}: {FOLDER_CROP}, {side}x{side} pixels, {interpolation}")
    source = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]
    size = f"{side}-{interpolation}" if side else "native"
    cache = CACHE_DIR / f"{dataset}-{root.name}-{size}-{source}.safetensors"
    decode = functools.partial(_decode_one, side=side, interpolation=interpolation)
    images = _read_cache(cache, key)
    if images is None and num_images is not None and num_images * SMALL_PART <= len(paths):
        chosen = _draw(labels, len(paths), num_images, seed).sort().values
        images = _decode_all([paths[i] for i in chosen], decode)
        labels = None if labels is None else labels[chosen]
    elif images is None:
        images = _decode_all(paths, decode)
        _write_cache(cache, key, images)
    return ImageSet(dataset, root.name, images, labels, tuple(classes))


def _find_split(folder: Path, split: str) -> Path:
    names = ["test", "val", "valid"] if split == "test" else [split]
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise UserError(
        f"{folder} has no folder {' or '.join(names)}: an image folder looks like "
        "DIR/train/<class>/* and DIR/test/<class>/*; name it with --data-dir"
    )


def list_tiny_imagenet(root: Path) -> Listing:
    """One split, DIR/{train,val,test}, in the layout of the original archive.

    Returns:
        The image files, their labels (int64 `[N]`; None for the test split), and the class ids.

    Raises:
        UserError, OSError: something is missing, or a class id is unknown.
    """
    wnids = root.with_name("wnids.txt")
    if not wnids.is_file():
        raise UserError(
            f"{root.parent} does not hold Tiny-ImageNet (no wnids.txt): run "
            "python utils/download_tiny_imagenet.py, or name its folder with --data-dir; images of "
            "your own need --dataset folder"
        )
    classes = sorted(wnids.read_text().split())  # a label is the position among the sorted ids
    paths = sorted(root.glob("*/images/*.JPEG" if root.name == "train" else "images/*.JPEG"))
    if not paths:
        raise UserError(f"{root} holds no images: download Tiny-ImageNet again")
    if root.name == "test":
        return paths, None, classes
    if root.name == "train":
        found = [path.parts[-3] for path in paths]
    else:
        lines = (root / "val_annotations.txt").read_text().splitlines()
        wnid_of = dict(line.split("\t")[:2] for line in lines if "\t" in line)
        found = [wnid_of.get(path.name, "no class id") for path in paths]
    index = {wnid: label for label, wnid in enumerate(classes)}
    for path, wnid in zip(paths, found, strict=True):
        if wnid not in index:
            raise UserError(f"{path} has {wnid}, which is none of {wnids}")
    if missing := set(classes) - set(found):
        raise UserError(f"{root} holds no images of {min(missing)}")
    return paths, torch.tensor([index[wnid] for wnid in found]), classes


def _list_image_folder(root: Path) -> Listing:
    """One split of an image folder: images at any depth below their class's folder.

    The classes are those of the training images, if there are any.
    """
    from torchvision.datasets import ImageFolder  # seconds that the embedded set need not take

    train = root.with_name("train")
    classes = (train.is_dir() and _class_names(train)) or _class_names(root)
    if not classes:
        raise UserError(f"{root} holds no class folders")
    if unknown := sorted(set(_class_names(root)) - set(classes)):
        raise UserError(f"{root / unknown[0]} has no counterpart under {train}")
    skipped: Counter[str] = Counter()
    for path in sorted(root.iterdir()):  # images beside the class folders are of no class
        if not path.is_dir():
            _is_taken(path, root, skipped)
    index = {name: label for label, name in enumerate(classes)}
    samples = ImageFolder.make_dataset(
        str(root),
        index,
        is_valid_file=lambda file: _is_taken(Path(file), root, skipped),
        allow_empty=True,  # its own complaint names no path
    )
    labels = [label for _, label in samples]
    if skipped:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in skipped.most_common())
        files = "1 file" if skipped.total() == 1 else f"{skipped.total()} files"
        _say_once(f"{root}: {files} skipped: {kinds}")
    if empty := set(index.values()) - set(labels):
        raise UserError(f"{root / classes[min(empty)]} is missing or holds no images")
    return [Path(file) for file, _ in samples], torch.tensor(labels), classes


def _class_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not _is_clutter(p.name))


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db")


def _is_taken(path: Path, root: Path, skipped: Counter[str]) -> bool:
    """Whether a file is an image of a class; what is not, and is no clutter, is counted."""
    if any(map(_is_clutter, path.relative_to(root).parts)):
        return False
    if not path.exists():
        raise UserError(f"{path} is a dead link: remove it, or bring back what it points to")
    if path.parent != root and path.is_file() and _is_image(path):
        return True
    skipped[path.suffix.lower() or "without ending"] += 1
    return False


def _is_image(path: Path) -> bool:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    try:
        with Image.open(path, formats=SNIFFED):
            return True
    except NOT_AN_IMAGE:
        return False


@functools.cache  # the splits of a run share some sentences
def _say_once(text: str) -> None:
    """Print a note, but not in a worker process: its parent has loaded the same images."""
    if multiprocessing.parent_process() is None:
        print(f"note: {text}")


# --- decoding, and a cache of it ------------------------------------------------------------------


def _fingerprint(paths: Sequence[Path]) -> str:
    """Another one when decoding, or a file's name, inode, size or time has changed."""
    stats = ((path.name, path.stat()) for path in paths)
    files = [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(repr((CACHE_VERSION, files)).encode()).hexdigest()


def _read_cache(path: Path, key: str) -> Tensor | None:
    """The cached images, or None if there is no whole cache file of these very sources."""
    try:
        with safe_open(path, framework="pt") as file:
            fresh = (file.metadata() or {}).get("sources") == key
            return file.get_tensor("images") if fresh else None
    except (OSError, SafetensorError):
        return None


def _write_cache(path: Path, key: str, images: Tensor) -> None:
    """Write the cache file in the place of one that the same folder left before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({"images": images}, temporary, {"sources": key})
    except (OSError, SafetensorError) as error:
        _say_once(f"decoded images are not cached ({error})")


def _decode_all(paths: Sequence[Path], decode: Callable[[Path], np.ndarray]) -> Tensor:
    """Decode every file in threads (Pillow releases the GIL) into uint8 `[N, 3, H, W]`."""
    first = decode(paths[0])
    images = torch.empty((len(paths), 3, *first.shape[:2]), dtype=torch.uint8)

    def fill(start: int) -> None:
        chunk = paths[start : start + DECODING_CHUNK]
        for index, path in enumerate(chunk, start):
            pixels = decode(path)
            if pixels.shape != first.shape:
                raise UserError(
                    f"{path} is {pixels.shape[1]}x{pixels.shape[0]} pixels, the first image is "
                    f"{first.shape[1]}x{first.shape[0]}: all must have one size"
                )
            images[index] = torch.from_numpy(pixels).permute(2, 0, 1)

    starts, unit = range(0, len(paths), DECODING_CHUNK), f"{DECODING_CHUNK} images"
    thread_map(fill, starts, max_workers=DECODING_THREADS, desc="decoding", unit=unit, disable=None)
    return images


def _decode_one(path: Path, side: int | None, interpolation: str) -> np.ndarray:
    """One image as uint8 `[H, W, 3]`, upright, its central square resized to `side`."""
    try:
        with Image.open(path) as file:  # of an animation the first frame
            ImageOps.exif_transpose(file, in_place=True)
            image = _to_rgb(file, path)
    except NOT_AN_IMAGE as error:
        raise UserError(f"cannot decode the image {path}: {error}") from error
    if side:
        image = ImageOps.fit(image, (side, side), Image.Resampling[interpolation.upper()])
    return np.array(image)


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """An image of any mode in 8-bit RGB, transparency over white."""
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image, path)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image, path: Path) -> Image.Image:
    """Grey of 16 bits, or of floats from 0 to 1, scaled to 0 to 255; Pillow would clip it."""
    values = np.asarray(image)
    top = 1.0 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # NaN is neither
        raise UserError(
            f"{path} holds {values.dtype} values from {values.min()} to {values.max()}: convert it "
            "to 8 or 16 bits a channel, or to floats from 0 to 1"
        )
    return Image.fromarray((values * (255 / top)).round().astype(np.uint8))
