"""Named data sets as tensors: uint8 images `[N, 3, H, W]` with int64 labels `[N]`.

Images are decoded once, in parallel, and cached as one safetensors file under `data/cache`, keyed
by the path, size and modification time of every source file. Normalisation and resizing are
batched tensor operations on the target device (`preprocess`).
"""

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from utils.cli import UserError
from utils.files import replacing

ROOT = Path(__file__).resolve().parent.parent
SMALL_PART = 4  # a subset of at most a fourth of the images is decoded alone, and not kept
CACHE_DIR = Path(os.environ.get("DATA_CACHE_DIR", ROOT / "data" / "cache"))
DECODING_THREADS = 4  # more wait for Python's lock: 32 took 37 s for what 2 do in 10
DECODING_CHUNK = 100  # images a thread takes at once: one by one, threads mostly wait in turn
CACHE_VERSION = 1  # raise it when decoding changes
HELD_OUT_SEED = 0  # fixed, so that recipes and seeds are compared on the same images
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

DATASETS = ("tiny-imagenet", "cifar100", "digits", "folder")
# Which split answers which question. Tiny-ImageNet's test split has no labels.
ACCURACY_SPLIT = {"tiny-imagenet": "val", "cifar100": "test", "digits": "test", "folder": "test"}
SPEED_SPLIT = {"tiny-imagenet": "test", "cifar100": "test", "digits": "test", "folder": "test"}


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set: images uint8 `[N, 3, H, W]`, labels int64 `[N]` or None."""

    dataset: str
    split: str
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
) -> ImageSet:
    """Load one split of a named data set.

    Args:
        dataset: one of DATASETS.
        split: `train`, `test`, or for Tiny-ImageNet also `val`.
        data_dir: folder of the set itself, `data/<dataset>` by default; unused by `digits`.
        image_size: side in pixels to which `folder` images are resized and cropped.
        num_images: class-balanced subset drawn with `seed`; None takes all.
        fewer: take all, too, if there are fewer than `num_images`; else that is an error.

    Raises:
        UserError: missing, damaged or foreign data, with the path and what to do.
    """
    folder = data_dir or ROOT / "data" / dataset
    if dataset == "digits":
        images = _load_digits(split)
    elif dataset == "tiny-imagenet":
        listed = _list_tiny_imagenet(folder, split)
        images = _decode(dataset, split, folder, *listed, None, num_images, seed)
    elif dataset == "cifar100" and not (folder / "train").is_dir():
        images = _load_cifar100_archive(folder, split)
    elif dataset in ("cifar100", "folder"):
        side = image_size if dataset == "folder" else None
        listed = _list_image_folder(folder, split)
        images = _decode(dataset, split, folder, *listed, side, num_images, seed)
    else:
        raise UserError(f"unknown data set {dataset!r}: choose from {', '.join(DATASETS)}")
    if num_images is None or (fewer and num_images > len(images)):
        return images
    return take_subset(images, num_images, seed)


def take_subset(images: ImageSet, num_images: int, seed: int) -> ImageSet:
    """Draw a class-balanced random subset (class counts differ by at most one), order kept."""
    if num_images > len(images):
        raise UserError(
            f"{images.dataset} {images.split} has {len(images)} images, not {num_images}: "
            "ask for fewer"
        )
    chosen = _draw(images.labels, len(images), num_images, seed)
    labels = None if images.labels is None else images.labels[chosen]
    return replace(images, images=images.images[chosen], labels=labels)


def _draw(labels: Tensor | None, count: int, num_images: int, seed: int) -> Tensor:
    """Indices of `num_images` of `count` images, in order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if labels is not None:
        order = order[_balanced_order(labels[order])]
    return order[:num_images].sort().values


def _balanced_order(labels: Tensor) -> Tensor:
    """Indices that visit the classes in turn: first one image of each class, then a second…"""
    rank_in_class = torch.empty_like(labels)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        rank_in_class[members] = torch.arange(len(members))
    return rank_in_class.argsort(stable=True)


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
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.images.cpu().unbind(1):
        counts = torch.zeros(256, dtype=torch.int64)
        for part in channel.split(10_000):  # bincount makes them 64-bit
            counts += part.flatten().bincount(minlength=256)
        mean = (counts * values).sum() / counts.sum()
        variance = (counts * (values - mean) ** 2).sum() / counts.sum()
        means.append(round(float(mean), 4))
        deviations.append(max(0.01, round(float(variance.sqrt()), 4)))  # 0 in a constant channel
    return tuple(means), tuple(deviations)


def hold_out(images: ImageSet, share: float) -> tuple[ImageSet, ImageSet]:
    """Split off `share` of each class, at least one image, always the same: (rest, held out).

    Raises:
        UserError: a class has only one image.
    """
    labels = labels_of(images).cpu()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(HELD_OUT_SEED))
    members = [order[labels[order] == label] for label in labels.unique()]
    if min(map(len, members)) < 2:
        raise UserError(
            f"{images.dataset} {images.split}: a class has a single image, and one of each must be "
            "held out: take more images"
        )
    counts = [max(1, round(share * len(m))) for m in members]
    rest = torch.cat([m[n:] for m, n in zip(members, counts, strict=True)]).sort().values
    held_out = torch.cat([m[:n] for m, n in zip(members, counts, strict=True)]).sort().values
    first, second = (
        replace(images, images=images.images[i], labels=labels_of(images)[i])
        for i in (i.to(images.images.device) for i in (rest, held_out))
    )
    return first, second


def preprocess(images: Tensor, how: Preprocessing, device: torch.device | str = "cpu") -> Tensor:
    """Turn uint8 `[N, 3, H, W]` into normalised float32 `[N, 3, S, S]` on `device`.

    The whole image is resized (antialiased, no crop): Tiny-ImageNet's are only 64 pixels wide.
    """
    x = images.to(device).float().div_(255)
    if x.shape[-2:] != (how.input_size, how.input_size):
        size = (how.input_size, how.input_size)
        x = torch.nn.functional.interpolate(x, size, mode=how.interpolation, antialias=True)
        x.clamp_(0, 1)  # bicubic overshoots; an 8-bit image could not
    mean = torch.tensor(how.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(how.std, device=device).view(1, 3, 1, 1)
    return x.sub_(mean).div_(std)


# --- the sets: each lists its files as (paths, labels, classes) -----------------------------------


def _list_tiny_imagenet(folder: Path, split: str) -> tuple[list[Path], list[int] | None, list[str]]:
    if not (folder / "wnids.txt").is_file():
        raise UserError(
            f"{folder} does not hold Tiny-ImageNet (no wnids.txt): run "
            "python utils/download_tiny_imagenet.py, or name its folder with --data-dir"
        )
    # wnids.txt is not sorted; a class index is the position among the sorted ids.
    classes = sorted((folder / "wnids.txt").read_text().split())
    if split == "train":
        return _list_classes(folder / "train", classes, inner="images")
    paths = _image_files(folder / split / "images")
    if split == "test":
        return paths, None, classes
    return paths, _read_val_labels(folder / "val" / "val_annotations.txt", paths, classes), classes


def _read_val_labels(annotations: Path, paths: list[Path], classes: list[str]) -> list[int]:
    if not annotations.is_file():
        raise UserError(f"{annotations} is missing: download Tiny-ImageNet again")
    rows = [line.split("\t") for line in annotations.read_text().splitlines() if line.strip()]
    wnid_of = {row[0]: row[1] for row in rows if len(row) > 1}
    index = {wnid: i for i, wnid in enumerate(classes)}
    for path in paths:
        if wnid_of.get(path.name) not in index:
            found = wnid_of.get(path.name, "no line")
            raise UserError(f"{annotations}: {found} for {path.name}, not one of the class ids")
    return [index[wnid_of[path.name]] for path in paths]


def _list_image_folder(folder: Path, split: str) -> tuple[list[Path], list[int], list[str]]:
    if not (folder / split).is_dir():
        raise UserError(
            f"{folder} has no folder {split!r}: an image folder looks like "
            "DIR/train/<class>/* and DIR/test/<class>/*; name it with --data-dir"
        )
    class_folder = folder / ("train" if (folder / "train").is_dir() else split)
    classes = sorted(p.name for p in class_folder.iterdir() if p.is_dir())
    found = {p.name for p in (folder / split).iterdir() if p.is_dir()}
    if unknown := sorted(found - set(classes)):
        raise UserError(f"{folder / split / unknown[0]} has no counterpart under {class_folder}")
    return _list_classes(folder / split, classes)


def _list_classes(
    folder: Path, classes: list[str], inner: str = ""
) -> tuple[list[Path], list[int], list[str]]:
    if not classes:
        raise UserError(f"{folder} holds no class folders")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        members = _image_files(folder / name / inner)
        paths += members
        labels += [label] * len(members)
    return paths, labels, classes


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: the data set is incomplete")
    with os.scandir(folder) as entries:
        files = [Path(e.path) for e in entries if Path(e.name).suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise UserError(f"{folder} holds no images")
    return sorted(files)


def _load_digits(split: str) -> ImageSet:
    """scikit-learn's 1,797 handwritten digits (8x8 grey), 80 % train and 20 % test, stratified."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0
    )
    chosen = np.sort(parts[0] if split == "train" else parts[1])
    grey = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    images = torch.from_numpy(grey)[:, None].repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target[chosen]).long()
    return ImageSet("digits", split, images, labels, tuple(str(i) for i in range(10)))


def _load_cifar100_archive(folder: Path, split: str) -> ImageSet:
    """CIFAR-100 from torchvision's archive: downloaded, or found in `folder`; md5-checked."""
    from torchvision.datasets import CIFAR100

    if folder.exists() and not folder.is_dir():
        raise UserError(f"--data-dir {folder} is a file: name a folder")
    try:
        with _locked(folder):
            cifar = CIFAR100(str(folder), train=split == "train", download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        archive = folder / CIFAR100.filename
        found = f" (the {archive.name} there is damaged)" if archive.is_file() else ""
        raise UserError(
            f"cannot get CIFAR-100 ({error}): put a good {archive.name} into {folder}{found}, or "
            "name an image folder with --data-dir"
        ) from error
    images = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor(cifar.targets, dtype=torch.int64)
    return ImageSet("cifar100", split, images, labels, tuple(cifar.classes))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for one process at a time; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# --- decoding and its cache -----------------------------------------------------------------------


def _decode(
    dataset: str,
    split: str,
    folder: Path,
    paths: Sequence[Path],
    labels: Sequence[int] | None,
    classes: Sequence[str],
    side: int | None,
    num_images: int | None,
    seed: int,
) -> ImageSet:
    """All images, kept in the cache; or only those of a subset that is a small part of them."""
    source = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    prefix = f"{dataset}-{split}-{side or 'native'}-{source}-"
    cache = CACHE_DIR / f"{prefix}{_fingerprint(folder, paths, labels)}.safetensors"
    label_tensor = None if labels is None else torch.tensor(labels, dtype=torch.int64)
    images = _read_cache(cache, len(paths))
    if images is None and num_images is not None and num_images * SMALL_PART <= len(paths):
        chosen = _draw(label_tensor, len(paths), num_images, seed)
        images = _decode_all([paths[i] for i in chosen], side)
        label_tensor = None if label_tensor is None else label_tensor[chosen]
    elif images is None:
        images = _decode_all(paths, side)
        _write_cache(cache, prefix, images)
    return ImageSet(dataset, split, images, label_tensor, tuple(classes))


def _fingerprint(folder: Path, paths: Sequence[Path], labels: Sequence[int] | None) -> str:
    digest = hashlib.sha256(f"{CACHE_VERSION} {json.dumps(labels)}".encode())
    for path in paths:
        stat = path.stat()
        line = f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n"
        digest.update(os.fsencode(line))  # a file name need not be UTF-8
    return digest.hexdigest()[:16]


def _read_cache(path: Path, count: int) -> Tensor | None:
    """The cached images, or None if there is no usable cache file."""
    try:
        with safe_open(path, framework="pt") as file:
            images: Tensor = file.get_tensor("images")
    except (OSError, SafetensorError):
        return None
    return images if len(images) == count and images.dtype == torch.uint8 else None


def _write_cache(path: Path, prefix: str, images: Tensor) -> None:
    """Write the cache file, and drop what the same source left before."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({"images": images}, temporary)
    except (OSError, SafetensorError) as error:
        print(f"note: decoded images are not cached ({error})")
        return
    for stale in path.parent.glob(f"{prefix}*.safetensors"):
        if stale != path:
            stale.unlink(missing_ok=True)


def _decode_all(paths: Sequence[Path], side: int | None) -> Tensor:
    """Decode every file in threads (Pillow releases the GIL) into uint8 `[N, 3, H, W]`."""
    first = _decode_one(paths[0], side)
    images = torch.empty((len(paths), 3, *first.shape[:2]), dtype=torch.uint8)

    def fill(start: int) -> int:
        chunk = paths[start : start + DECODING_CHUNK]
        for index, path in enumerate(chunk, start):
            pixels = _decode_one(path, side)
            if pixels.shape != first.shape:
                raise UserError(
                    f"{path} is {pixels.shape[1]}x{pixels.shape[0]} pixels, the first image is "
                    f"{first.shape[1]}x{first.shape[0]}: all must have one size"
                )
            images[index] = torch.from_numpy(pixels).permute(2, 0, 1)
        return len(chunk)

    bar = tqdm(total=len(paths), desc="decoding", unit="img", disable=None)
    with bar, ThreadPoolExecutor(DECODING_THREADS) as pool:
        for done in pool.map(fill, range(0, len(paths), DECODING_CHUNK)):
            bar.update(done)
    return images


def _decode_one(path: Path, side: int | None) -> np.ndarray:
    """One image as uint8 `[H, W, 3]`, its shorter side resized to `side` and centre-cropped."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot decode the image {path}: {error}") from error
    if side is not None:
        image = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    return np.array(image)
