"""The data sets on miniature folders: labels, subsets, the decoding cache, every user's error."""

import contextlib
import errno
import hashlib
import io
import os
import pickle
import resource
import shutil
import tarfile
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.datasets import CIFAR100

from utils import data
from utils.cli import UserError
from utils.data import ImageSet, Preprocessing, load_images, preprocess, take_subset

SORTED_WNIDS = ("n01443537", "n02124075", "n04067472")
WNID_COLOURS = torch.tensor([[40, 200, 40], [200, 40, 40], [40, 40, 200]])  # in sorted order
CIFAR_ARCHIVE = "cifar-100-python.tar.gz"


def fail_to_decode(*_: Any) -> None:
    raise AssertionError("an image was decoded although the cache holds it")


def error_of(*args: Any, **kwargs: Any) -> str:
    """The text of the UserError that load_images must raise."""
    with pytest.raises(UserError) as caught:
        load_images(*args, **kwargs)
    return str(caught.value)


def random_image(width: int, height: int, low: int = 0, high: int = 256) -> Image.Image:
    pixels = np.random.default_rng(0).integers(low, high, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# --- Tiny-ImageNet --------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
def test_tiny_imagenet_labels_are_positions_among_the_sorted_ids(
    tiny_imagenet: Path, split: str
) -> None:
    images = load_images("tiny-imagenet", split, tiny_imagenet)
    assert images.classes == SORTED_WNIDS
    assert (images.dataset, images.split, len(images)) == ("tiny-imagenet", split, 12)
    assert images.images.dtype == torch.uint8
    assert images.images.shape == (12, 3, 16, 16)
    assert images.labels is not None
    assert images.labels.dtype == torch.int64
    assert images.labels.bincount().tolist() == [4, 4, 4]
    # The colour says what the class is, so images and labels are still side by side.
    off = images.images.long() - WNID_COLOURS[images.labels][:, :, None, None]
    assert off.abs().max() <= 4  # JPEG


def test_tiny_imagenet_test_split_has_no_labels(tiny_imagenet: Path) -> None:
    images = load_images("tiny-imagenet", "test", tiny_imagenet)
    assert images.labels is None
    assert images.classes == SORTED_WNIDS
    assert images.images[:, 0, 8, 8].tolist() == pytest.approx([0, 50, 100, 150, 200], abs=2)


# --- image folders --------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["folder", "cifar100"])
def test_image_folder_labels_and_pixels(image_folder: Path, dataset: str) -> None:
    images = load_images(dataset, "train", image_folder)
    assert images.classes == ("ant", "cat", "dog")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    colours = [[60 * label, 40 * i, 7] for label, n in enumerate((2, 3, 4)) for i in range(n)]
    expected = torch.tensor(colours, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 16, 16)
    assert images.images.equal(expected)


def test_test_split_alone_is_enough(image_folder: Path) -> None:
    shutil.rmtree(image_folder / "train")
    assert load_images("folder", "test", image_folder).classes == ("ant", "cat", "dog")
    (image_folder / "train").mkdir()
    assert load_images("folder", "test", image_folder).classes == ("ant", "cat", "dog")


def test_file_name_that_is_not_utf8(image_folder: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(image_folder / "train/ant/0.png", image_folder / "train/ant" / name)
    assert len(load_images("folder", "train", image_folder)) == 10


@pytest.mark.parametrize("size", [(32, 16), (16, 32)])
def test_folder_images_are_resized_and_cropped_at_the_centre(
    image_folder: Path, size: tuple[int, int]
) -> None:
    image = random_image(*size)
    image.save(image_folder / "train/ant/0.png")
    loaded = load_images("folder", "train", image_folder, image_size=8).images
    small = image.resize((size[0] // 2, size[1] // 2), Image.Resampling.BICUBIC)
    left, top = (small.width - 8) // 2, (small.height - 8) // 2
    expected = np.array(small.crop((left, top, left + 8, top + 8)))
    assert loaded.shape == (9, 3, 8, 8)
    off = loaded[0].permute(1, 2, 0).short() - torch.from_numpy(expected).short()
    assert off.abs().max() <= 1  # Pillow rounds between its two passes, in either order


@pytest.mark.parametrize("interpolation", data.INTERPOLATIONS)
def test_folder_images_are_resized_with_the_interpolation_asked_for(
    image_folder: Path, interpolation: str
) -> None:
    image = random_image(24, 24)
    image.save(image_folder / "test/ant/0.png")

    def load(name: str) -> Tensor:
        return load_images("folder", "test", image_folder, 10, interpolation=name).images[0]

    load("bilinear"), load("bicubic")  # each is in the cache
    expected = np.array(image.resize((10, 10), Image.Resampling[interpolation.upper()]))
    assert np.array_equal(load(interpolation).permute(1, 2, 0).numpy(), expected)


def test_crop_and_size_are_said_once(
    image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test", "test"):
        load_images("folder", split, image_folder, image_size=8, interpolation="bilinear")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"note: {image_folder}: {data.FOLDER_CROP}, 8x8 pixels, bilinear"]


def test_workers_leave_the_notes_to_their_parent(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "a process")
    load_images("folder", "test", image_folder, image_size=8)
    assert capsys.readouterr().out == ""


# --- photographs as people have them --------------------------------------------------------------

RAMP = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)  # 257 * (0 to 255)
GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def first_of_ant(folder: Path) -> np.ndarray:
    """The first image of test/ant, `[H, W, 3]`; the others there are made to have its size."""
    image = load_images("folder", "test", folder).images[0]
    return image.permute(1, 2, 0).numpy()


def put(folder: Path, name: str, image: Image.Image, **options: Any) -> Path:
    """Save an image in the place of the first of test/ant."""
    (folder / "test/ant/0.png").unlink()
    path = folder / "test/ant" / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", ["0.png", "0.tif", "0.pgm", "0.jp2"])
def test_sixteen_bits_are_scaled_from_their_whole_range(image_folder: Path, name: str) -> None:
    put(image_folder, name, Image.fromarray(RAMP))
    assert np.array_equal(first_of_ant(image_folder)[:, :, 1], GREY)


def test_sixteen_bits_of_the_other_byte_order(image_folder: Path) -> None:
    big_endian = Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes())
    put(image_folder, "0.tif", big_endian)
    assert np.array_equal(first_of_ant(image_folder)[:, :, 0], GREY)


def test_floats_from_0_to_1_are_scaled(image_folder: Path) -> None:
    put(image_folder, "0.tif", Image.fromarray(RAMP.astype(np.float32) / 65535))
    assert np.array_equal(first_of_ant(image_folder)[:, :, 2], GREY)


@pytest.mark.parametrize(
    "values",
    [
        GREY.astype(np.float32),
        GREY.astype(np.float32) / 255 - 0.1,
        np.full((16, 16), np.nan, np.float32),
        RAMP.astype(np.int32) * 2,
        RAMP.astype(np.int32) - 1,
    ],
)
def test_values_of_unknown_range_are_refused_and_never_clipped(
    image_folder: Path, values: np.ndarray
) -> None:
    path = put(image_folder, "0.tif", Image.fromarray(values))
    text = error_of("folder", "test", image_folder)
    assert text.startswith(f"{path} holds {values.dtype} values from {values.min()} to ")
    assert "convert it" in text


@pytest.mark.parametrize("name", ["0.png", "0.tif", "0.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(image_folder: Path, name: str, orientation: int) -> None:
    flips = Image.Transpose
    stored_as = {  # what brings an upright picture into each orientation
        2: flips.FLIP_LEFT_RIGHT,
        3: flips.ROTATE_180,
        4: flips.FLIP_TOP_BOTTOM,
        5: flips.TRANSPOSE,
        6: flips.ROTATE_90,
        7: flips.TRANSVERSE,
        8: flips.ROTATE_270,
    }
    upright = random_image(16, 16)
    stored = upright.transpose(stored_as[orientation]) if orientation > 1 else upright
    tags = Image.Exif()
    tags[0x0112] = orientation
    put(image_folder, name, stored, exif=tags, lossless=True)
    assert np.array_equal(first_of_ant(image_folder), np.array(upright))


def test_portrait_stands_upright_before_it_is_cropped(image_folder: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    rows = np.repeat(np.arange(32, dtype=np.uint8) * 8, 16).reshape(32, 16)  # 32 rows of 16
    stored = Image.fromarray(rows).transpose(Image.Transpose.ROTATE_90)
    put(image_folder, "0.png", stored, exif=tags)
    loaded = load_images("folder", "test", image_folder, image_size=16).images[0, 0]
    assert loaded[:, 0].tolist() == [8 * row for row in range(8, 24)]


def test_broken_exif_does_not_cost_the_photograph(image_folder: Path) -> None:
    broken = b"Exif\0\0not a table of tags"
    put(image_folder, "0.jpg", Image.new("L", (16, 16), 77), quality=100, exif=broken)
    assert (first_of_ant(image_folder) == 77).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparency_lies_over_white(image_folder: Path, mode: str) -> None:
    rgba = np.zeros((16, 16, 4), np.uint8)  # black: left opaque, right transparent
    rgba[:, :8, 3] = 255
    image = Image.fromarray(rgba)
    if mode in ("P", "L"):  # the colour that the right half has is transparent
        index = np.repeat([[0, 1]], 8, axis=1).repeat(16, axis=0).astype(np.uint8)
        image = Image.fromarray(index).convert("L" if mode == "L" else "P")
        put(image_folder, "0.png", image, transparency=1)
    else:
        put(image_folder, "0.png", image.convert(mode))
    loaded = first_of_ant(image_folder).astype(int)
    assert loaded[:, :8].max() <= 1
    assert (loaded[:, 8:] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB"])
def test_every_other_mode_becomes_rgb(image_folder: Path, mode: str) -> None:
    image = Image.new("RGB", (16, 16), "white")
    image.paste("black", (0, 0, 8, 16))
    name = "0.tif" if mode in ("CMYK", "YCbCr") else "0.png"
    put(image_folder, name, image.convert(mode))
    assert np.array_equal(first_of_ant(image_folder), np.array(image))


def test_cmyk_jpeg_keeps_its_colours(image_folder: Path) -> None:
    put(image_folder, "0.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=100)
    assert np.abs(first_of_ant(image_folder).astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("name", ["0.gif", "0.webp", "0.png", "0.tif"])
def test_first_frame_of_an_animation(image_folder: Path, name: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if name == "0.webp" else {}
    put(image_folder, name, frames[0], save_all=True, append_images=frames[1:], **options)
    assert (first_of_ant(image_folder) == [255, 0, 0]).all()


def test_what_file_managers_and_notebooks_leave_is_no_class_and_no_image(
    image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = image_folder / "test/cat/0.png"
    for split in ("train", "test"):
        for name in (".ipynb_checkpoints", "__MACOSX", "__MACOSX/dog", "dog/.thumbnails"):
            (image_folder / split / name).mkdir()
            shutil.copy(picture, image_folder / split / name / "0.png")
        shutil.copy(picture, image_folder / split / "dog/._0.png")
        (image_folder / split / "dog/Thumbs.db").write_bytes(b"x")
        (image_folder / split / ".DS_Store").write_bytes(b"x")
    for split, counts in (("train", [2, 3, 4]), ("test", [2, 2, 2])):
        images = load_images("folder", split, image_folder)
        assert images.classes == ("ant", "cat", "dog")
        assert data.labels_of(images).bincount().tolist() == counts
    assert capsys.readouterr().out == ""


def test_all_that_pillow_opens_is_taken_and_the_rest_is_counted(
    image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder / "test/cat"
    colours = {"a.JPG": "JPEG", "b.jfif": "JPEG", "c.WEBP": "WEBP", "d.tga": "TGA", "e": "PNG"}
    colours |= {"f.ppm": "PPM", "g.avif": "AVIF", "h.heic.png": "PNG", "i.dat": "BMP"}
    for name, kind in colours.items():
        Image.new("RGB", (16, 16), (60, 0, 7)).save(folder / name, kind)
    for name in ("1.heic", "2.HEIC", "3.heic", "notes.txt", "Makefile"):
        (folder / name).write_text("no image")
    (folder / "features.h5").write_bytes(
        b"\x89HDF\r\n\x1a\n"
    )  # Pillow knows it, and cannot read it
    shutil.copy(folder / "0.png", image_folder / "test/beside_the_classes.png")
    os.mkfifo(folder / "pipe.png")  # opening it would wait for a writer
    images = load_images("folder", "test", image_folder)
    assert data.labels_of(images).bincount().tolist() == [2, 2 + len(colours), 2]
    assert capsys.readouterr().out == (
        f"note: {image_folder / 'test'}: 8 files skipped: 3 .heic, 2 .png, "
        "1 without ending, 1 .h5, 1 .txt\n"
    )


def test_images_at_any_depth_belong_to_their_class(image_folder: Path) -> None:
    (image_folder / "test/cat/2023/may").mkdir(parents=True)
    (image_folder / "test/cat/0.png").rename(image_folder / "test/cat/2023/may/0.png")
    shutil.copytree(image_folder / "test/cat/2023", image_folder / "test/dog/of_cats")
    images = load_images("folder", "test", image_folder)
    assert images.classes == ("ant", "cat", "dog")
    assert data.labels_of(images).tolist() == [0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("name", ["val", "valid"])
def test_validation_images_serve_where_there_are_no_test_images(
    image_folder: Path, name: str
) -> None:
    shutil.copytree(image_folder / "test", image_folder / name)
    shutil.rmtree(image_folder / name / "cat")
    assert load_images("folder", "test", image_folder).split == "test"
    shutil.rmtree(image_folder / name)
    (image_folder / "test").rename(image_folder / name)
    images = load_images("folder", "test", image_folder)
    assert (images.split, len(images)) == (name, 6)


@pytest.mark.parametrize("link", ["test/cat/dead.png", "test/cat/dead", "test/dead_class"])
@pytest.mark.parametrize("target", ["nowhere.png", "itself"])
def test_dead_link_is_named(image_folder: Path, link: str, target: str) -> None:
    path = image_folder / link
    path.symlink_to(path.name if target == "itself" else target)
    assert error_of("folder", "test", image_folder).startswith(f"{path} is a dead link: ")


def test_links_to_images_and_to_classes_are_followed(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "test/cat").rename(tmp_path / "cats")
    (image_folder / "test/cat").symlink_to(tmp_path / "cats")
    (image_folder / "test/dog/2.png").symlink_to(tmp_path / "cats/0.png")
    images = load_images("folder", "test", image_folder)
    assert data.labels_of(images).tolist() == [0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("name", ["0.jpg", "0.png", "no_ending", "0.tga"])
def test_damaged_image_is_refused_with_its_path(image_folder: Path, name: str) -> None:
    kind = {"0.jpg": "JPEG", "0.tga": "TGA"}.get(name, "PNG")
    path = put(image_folder, name, random_image(16, 16), format=kind)
    path.write_bytes(path.read_bytes()[:200])
    text = error_of("folder", "test", image_folder)
    assert f"cannot decode the image {path}: " in text
    assert "\n" not in text


# --- digits ---------------------------------------------------------------------------------------


def test_digits_splits_are_stratified_and_partition_the_set() -> None:
    from sklearn.datasets import load_digits

    train, test = load_images("digits", "train"), load_images("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.labels is not None
    assert test.labels is not None
    whole = load_digits()
    in_test, in_all = test.labels.bincount(), torch.from_numpy(whole.target).bincount()
    assert ((in_test - 0.2 * in_all).abs() <= 1).all()

    def rows(images: Tensor, labels: Tensor) -> list[bytes]:
        pixels = images[:, 0].flatten(1).numpy()
        return [bytes([*image, label]) for image, label in zip(pixels, labels, strict=True)]

    grey = torch.from_numpy(whole.images * 255 / 16).round().to(torch.uint8)[:, None]
    both = rows(train.images, train.labels) + rows(test.images, test.labels)
    assert sorted(both) == sorted(rows(grey, torch.from_numpy(whole.target)))


def test_digits_have_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dataset folder is for yours"):
        load_images("digits", "test", tmp_path)


def test_digits_are_rgb_bytes_over_the_full_range() -> None:
    digits = load_images("digits", "test")
    assert digits.classes == tuple("0123456789")
    assert digits.images.dtype == torch.uint8
    assert digits.images.shape == (360, 3, 8, 8)
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    assert digits.images[:, 0].equal(digits.images[:, 1])
    assert digits.images[:, 0].equal(digits.images[:, 2])


# --- CIFAR-100 from torchvision's archive ---------------------------------------------------------


@pytest.fixture
def small_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of CIFAR-100's layout with five training and three test images, and no network.

    Pixels count up from 0 in each split; torchvision's class is told the md5 of these files.
    """
    classes = ["apple", "aquarium_fish", "baby", "bear", "beaver"]
    content: dict[str, dict[str, Any]] = {"meta": {"fine_label_names": classes}}
    for split, count in (("train", 5), ("test", 3)):
        pixels = np.arange(count * 3072).astype(np.uint8).reshape(count, 3072)
        content[split] = {"data": pixels, "fine_labels": list(range(count))}
    archive = tmp_path / "cifar100" / CIFAR_ARCHIVE
    archive.parent.mkdir()
    md5 = {}
    with tarfile.open(archive, "w:gz") as bundle:
        for name, values in content.items():
            raw = pickle.dumps(values)
            md5[name] = hashlib.md5(raw).hexdigest()
            member = tarfile.TarInfo(f"cifar-100-python/{name}")
            member.size = len(raw)
            bundle.addfile(member, io.BytesIO(raw))
    cifar = "torchvision.datasets.CIFAR100"
    monkeypatch.setattr(f"{cifar}.tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(f"{cifar}.train_list", [["train", md5["train"]]])
    monkeypatch.setattr(f"{cifar}.test_list", [["test", md5["test"]]])
    monkeypatch.setattr(f"{cifar}.meta", CIFAR100.meta | {"md5": md5["meta"]})

    def urlopen(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return archive.parent


@pytest.mark.parametrize(("split", "count"), [("train", 5), ("test", 3)])
def test_cifar100_archive(small_cifar: Path, split: str, count: int) -> None:
    images = load_images("cifar100", split, small_cifar)
    pixels = torch.arange(count * 3072).to(torch.uint8).view(count, 3, 32, 32)
    assert images.images.equal(pixels)
    assert images.images.is_contiguous()
    assert data.labels_of(images).dtype == torch.int64
    assert data.labels_of(images).tolist() == list(range(count))
    assert images.classes == ("apple", "aquarium_fish", "baby", "bear", "beaver")


def test_unpacked_cifar100_may_be_read_only(small_cifar: Path) -> None:
    load_images("cifar100", "test", small_cifar)
    everything = [small_cifar, *small_cifar.rglob("*")]
    before = [path.stat().st_mtime_ns for path in everything]  # root could write to it all the same
    small_cifar.chmod(0o555)
    assert len(load_images("cifar100", "train", small_cifar)) == 5
    small_cifar.chmod(0o755)
    assert [path.stat().st_mtime_ns for path in everything] == before


def test_packed_cifar100_in_a_folder_that_cannot_be_written_to(
    small_cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(small_cifar))

    monkeypatch.setattr("tarfile.TarFile.extractall", refuse)
    text = error_of("cifar100", "train", small_cifar)
    assert "Read-only file system" in text
    assert "name a folder that can be written to" in text
    assert "damaged" not in text


def test_cifar100_offline_names_archive_md5_and_folder(small_cifar: Path) -> None:
    elsewhere = small_cifar.with_name("elsewhere")
    text = error_of("cifar100", "test", elsewhere)
    assert "no network" in text
    assert f"put {CIFAR_ARCHIVE} (md5 {CIFAR100.tgz_md5}) into {elsewhere}, or" in text


def test_cifar100_archive_with_a_wrong_md5_is_not_unpacked(small_cifar: Path) -> None:
    archive = small_cifar / CIFAR_ARCHIVE
    archive.write_bytes(archive.read_bytes()[:-1] + b"x")
    assert CIFAR100.tgz_md5 in error_of("cifar100", "train", small_cifar)
    assert not (small_cifar / "cifar-100-python").exists()


# --- class-balanced subsets -----------------------------------------------------------------------


@pytest.fixture
def uneven() -> ImageSet:
    """40 images of 3 classes (20, 12 and 8 of them); pixel value = position."""
    labels = torch.tensor([0, 1, 2, 0, 1, 0, 2, 0, 1, 0] * 4)
    images = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).repeat(1, 3, 2, 2)
    return ImageSet("folder", "test", images, labels, ("a", "b", "c"))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 23, 24])
def test_subset_is_balanced(uneven: ImageSet, count: int) -> None:
    subset = take_subset(uneven, count, seed=3)
    assert len(subset) == count
    assert subset.labels is not None
    counts = subset.labels.bincount(minlength=3)
    assert counts.max() - counts.min() <= 1


def test_subset_keeps_order_and_pairs(uneven: ImageSet) -> None:
    subset = take_subset(uneven, 17, seed=1)
    positions = subset.images[:, 0, 0, 0].long()
    assert (positions.diff() > 0).all()
    assert uneven.labels is not None
    assert subset.labels is not None
    assert subset.labels.equal(uneven.labels[positions])


def test_subset_of_unlabelled_images(tiny_imagenet: Path) -> None:
    def load(seed: int) -> ImageSet:
        return load_images("tiny-imagenet", "test", tiny_imagenet, num_images=3, seed=seed)

    assert load(0).labels is None
    levels = load(0).images[:, 0, 8, 8].tolist()
    assert len(set(levels)) == 3
    assert levels == sorted(levels)
    assert load(0).images.equal(load(0).images)
    assert any(not load(0).images.equal(load(seed).images) for seed in range(1, 5))


def test_subset_larger_than_the_set(image_folder: Path) -> None:
    text = error_of("folder", "test", image_folder, num_images=7)
    assert text == "folder test has 6 images, not 7: ask for fewer"
    assert len(load_images("folder", "test", image_folder, num_images=7, fewer=True)) == 6
    assert len(load_images("folder", "test", image_folder, num_images=5, fewer=True)) == 5


def test_a_small_subset_is_decoded_alone_and_is_the_same_one(
    tiny_imagenet: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> ImageSet:
        return load_images("tiny-imagenet", "val", tiny_imagenet, num_images=3, seed=4)

    decoded: list[Path] = []
    decode_one = data._decode_one

    def note(path: Path, side: int | None, interpolation: str) -> np.ndarray:
        decoded.append(path)
        return decode_one(path, side, interpolation)

    monkeypatch.setattr(data, "_decode_one", note)
    alone = load()
    assert len(set(decoded)) == 3
    assert not cache_dir.exists()
    load_images("tiny-imagenet", "val", tiny_imagenet)  # now all are in the cache
    decoded.clear()
    again = load()
    assert not decoded
    assert again.images.equal(alone.images)
    assert data.labels_of(again).equal(data.labels_of(alone))


# --- the cache of decoded images ------------------------------------------------------------------


def test_second_load_decodes_nothing(
    tiny_imagenet: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_images("tiny-imagenet", "val", tiny_imagenet)
    assert [path.suffix for path in cache_dir.iterdir()] == [".safetensors"]
    monkeypatch.setattr(data, "_decode_one", fail_to_decode)
    second = load_images("tiny-imagenet", "val", tiny_imagenet)
    assert second.images.equal(first.images)
    assert second.labels is not None
    assert first.labels is not None
    assert second.labels.equal(first.labels)


def change(folder: Path) -> None:
    Image.new("RGB", (16, 16), (1, 2, 3)).save(folder / "train/ant/0.png")
    os.utime(folder / "train/ant/0.png", ns=(10**18, 10**18))


def add(folder: Path) -> None:
    shutil.copy2(folder / "train/ant/0.png", folder / "train/ant/9.png")


def remove(folder: Path) -> None:
    (folder / "train/ant/0.png").unlink()


def move_to_another_class(folder: Path) -> None:
    (folder / "train/ant/0.png").rename(folder / "train/cat/a.png")


@pytest.mark.parametrize("alter", [change, add, remove, move_to_another_class])
def test_altered_source_is_decoded_again_into_the_same_file(
    image_folder: Path, cache_dir: Path, alter: Callable[[Path], None]
) -> None:
    load_images("folder", "train", image_folder)
    load_images("folder", "test", image_folder)
    before = {path.name: path.stat().st_mtime_ns for path in cache_dir.iterdir()}
    alter(image_folder)
    loaded = load_images("folder", "train", image_folder)
    after = {path.name: path.stat().st_mtime_ns for path in cache_dir.iterdir()}
    assert after.keys() == before.keys()
    assert [name.split("-")[1] for name in after if after[name] != before[name]] == ["train"]
    pixels = [np.array(Image.open(p)) for p in sorted((image_folder / "train").glob("*/*.png"))]
    assert np.array_equal(loaded.images.permute(0, 2, 3, 1).numpy(), np.stack(pixels))


def test_folders_that_change_names_are_decoded_again(tmp_path: Path) -> None:
    for name, colour in (("a", 0), ("b", 255)):
        path = tmp_path / "test" / name / "0.bmp"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (colour,) * 3).save(path)
        os.utime(path, (0, 0))
    assert load_images("folder", "test", tmp_path).images[:, 0, 0, 0].tolist() == [0, 255]
    for old, new in (("a", "c"), ("b", "a"), ("c", "b")):
        (tmp_path / "test" / old).rename(tmp_path / "test" / new)
    assert load_images("folder", "test", tmp_path).images[:, 0, 0, 0].tolist() == [255, 0]


def test_another_folder_keeps_its_cache_file(
    image_folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = shutil.copytree(image_folder, image_folder.with_name("twin"))
    load_images("folder", "train", image_folder)
    load_images("folder", "train", twin)
    change(image_folder)
    load_images("folder", "train", image_folder)
    assert len(list(cache_dir.iterdir())) == 2
    monkeypatch.setattr(data, "_decode_one", fail_to_decode)
    assert len(load_images("folder", "train", twin)) == 9


def truncate(cache: Path) -> None:
    cache.write_bytes(cache.read_bytes()[:-100])


def scribble(cache: Path) -> None:
    cache.write_bytes(b"\xff" * 500)


def store_without_sources(cache: Path) -> None:
    save_file({name: tensor + 1 for name, tensor in load_file(cache).items()}, cache)


@pytest.mark.parametrize("damage", [truncate, scribble, store_without_sources])
def test_damaged_cache_file_is_rebuilt(
    image_folder: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
) -> None:
    good = load_images("folder", "train", image_folder).images.clone()
    (cache,) = cache_dir.iterdir()
    damage(cache)
    assert load_images("folder", "train", image_folder).images.equal(good)
    monkeypatch.setattr(data, "_decode_one", fail_to_decode)
    assert load_images("folder", "train", image_folder).images.equal(good)


def test_cache_that_cannot_be_made_costs_only_time(
    image_folder: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache_dir.write_text("a file where the folder should be")
    assert len(load_images("folder", "train", image_folder)) == 9
    assert "note: decoded images are not cached" in capsys.readouterr().out


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow beyond 1000 bytes; pytest's own log neither, so be brief."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_costs_only_time(
    image_folder: Path, cache_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk():
        assert len(load_images("folder", "train", image_folder)) == 9
    assert "File too large" in capsys.readouterr().out
    assert list(cache_dir.iterdir()) == []


# --- preprocessing --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 20])
def test_preprocess_constant_image_exactly(size: int) -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).repeat(2, 1, 8, 8)
    before = images.clone()
    out = preprocess(images, Preprocessing(size, (0.5, 0.2, 0.1), (0.25, 0.5, 2.0)))
    assert out.shape == (2, 3, size, size)
    assert out.dtype == torch.float32
    expected = torch.tensor([-2.0, 0.0, 0.45]).view(1, 3, 1, 1).expand_as(out)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    assert images.equal(before)


@pytest.mark.parametrize("interpolation", data.INTERPOLATIONS)
@pytest.mark.parametrize("size", [24, 64, 112])
def test_preprocess_resizes_like_pillow(size: int, interpolation: str) -> None:
    image = random_image(64, 64, 60, 196)  # no overshoot: Pillow would clip it in each direction
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    raw = Preprocessing(size, (0.0,) * 3, (1.0,) * 3, interpolation)
    out = preprocess(pixels, raw)[0] * 255
    pillow = np.array(image.resize((size, size), Image.Resampling[interpolation.upper()]))
    expected = torch.from_numpy(pillow).permute(2, 0, 1).float()
    assert (out - expected).abs().max() < 1.6  # Pillow rounds to whole numbers in each direction


def test_preprocess_clamps_what_bicubic_overshoots() -> None:
    board = (torch.arange(8)[:, None] // 2 + torch.arange(8) // 2) % 2 * 255
    images = board.to(torch.uint8).expand(1, 3, 8, 8)
    raw = torch.nn.functional.interpolate(images.float(), (20, 20), mode="bicubic", antialias=True)
    assert raw.min() < -1
    assert raw.max() > 256
    out = preprocess(images, Preprocessing(20, (0.0,) * 3, (1.0,) * 3))
    assert (out.min(), out.max()) == (0, 1)


# --- a user's errors, each with the path ----------------------------------------------------------


def damage_image(folder: Path) -> str:
    path = folder / "val/images/val_3.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    return f"cannot decode the image {path}"


def drop_annotations(folder: Path) -> str:
    path = folder / "val/val_annotations.txt"
    path.unlink()
    return f"No such file or directory: '{path}'"


def drop_annotation_line(folder: Path) -> str:
    path = folder / "val/val_annotations.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("val_3.")))
    return f"{folder / 'val/images/val_3.JPEG'} has no class id"


def write_unknown_wnid(folder: Path) -> str:
    path = folder / "val/val_annotations.txt"
    path.write_text(path.read_text().replace("val_3.JPEG\tn02124075", "val_3.JPEG\tn99999999"))
    return f"val_3.JPEG has n99999999, which is none of {folder / 'wnids.txt'}"


def drop_wnids(folder: Path) -> str:
    (folder / "wnids.txt").unlink()
    return f"{folder} does not hold Tiny-ImageNet"


def drop_a_class(folder: Path) -> str:
    for number in range(0, 12, 3):
        (folder / f"val/images/val_{number}.JPEG").unlink()
    return f"{folder / 'val'} holds no images of n02124075"


def change_one_size(folder: Path) -> str:
    path = folder / "val/images/val_3.JPEG"
    Image.new("RGB", (20, 10)).save(path)
    return f"{path} is 20x10 pixels, the first image is 16x16"


@pytest.mark.parametrize(
    "spoil",
    [
        damage_image,
        drop_annotations,
        drop_annotation_line,
        write_unknown_wnid,
        drop_wnids,
        drop_a_class,
        change_one_size,
    ],
)
def test_spoilt_tiny_imagenet(
    tiny_imagenet: Path, cache_dir: Path, spoil: Callable[[Path], str]
) -> None:
    expected = spoil(tiny_imagenet)
    text = error_of("tiny-imagenet", "val", tiny_imagenet)
    assert expected in text
    assert "\n" not in text
    assert not cache_dir.exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_without_images(image_folder: Path, split: str) -> None:
    shutil.rmtree(image_folder / split / "cat")
    if split == "train":  # the classes are those of its folders
        (image_folder / "train/cat").mkdir()
    text = error_of("folder", split, image_folder)
    assert text == f"{image_folder / split / 'cat'} is missing or holds no images"


def test_class_of_test_that_train_lacks(image_folder: Path) -> None:
    shutil.copytree(image_folder / "test/cat", image_folder / "test/emu")
    text = error_of("folder", "test", image_folder)
    assert text == f"{image_folder / 'test/emu'} has no counterpart under {image_folder / 'train'}"


def test_folder_without_class_folders(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "train/0.png")
    assert error_of("folder", "train", tmp_path) == f"{tmp_path / 'train'} holds no class folders"


def test_folder_images_of_unequal_size(image_folder: Path) -> None:
    path = image_folder / "train/dog/3.png"
    Image.new("RGB", (5, 9)).save(path)
    assert f"{path} is 5x9 pixels" in error_of("folder", "train", image_folder)
    assert len(load_images("folder", "train", image_folder, image_size=8)) == 9


@pytest.mark.parametrize("dataset", ["tiny-imagenet", "cifar100", "folder"])
@pytest.mark.parametrize("name", ["file", "file/deeper", "nowhere"])
def test_data_dir_that_is_no_folder(tmp_path: Path, dataset: str, name: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / name
    text = error_of(dataset, "test", path)
    assert str(path) in text
    assert "\n" not in text


@pytest.mark.parametrize("dataset", ["cifar100", "folder"])
def test_tiny_imagenet_given_as_an_image_folder(tiny_imagenet: Path, dataset: str) -> None:
    text = error_of(dataset, "test", tiny_imagenet)
    assert (
        text
        == f"{tiny_imagenet / 'test/images'} has no counterpart under {tiny_imagenet / 'train'}"
    )
    assert load_images(dataset, "train", tiny_imagenet).classes == SORTED_WNIDS


def test_image_folder_given_as_tiny_imagenet(image_folder: Path) -> None:
    text = error_of("tiny-imagenet", "train", image_folder)
    assert text.startswith(f"{image_folder} does not hold Tiny-ImageNet (no wnids.txt)")


def test_unknown_data_set(tmp_path: Path) -> None:
    text = error_of("imagenet", "test", tmp_path)
    assert "unknown data set 'imagenet': did you mean tiny-imagenet" in text
    text = error_of("folder", "test", tmp_path, interpolation="random")
    assert "unknown interpolation 'random'" in text


def test_held_out_images_are_stratified_disjoint_and_always_the_same():
    labels = torch.arange(200).remainder(4).sort().values
    images = torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1)
    whole = ImageSet("x", "train", images, labels, ("a", "b", "c", "d"))
    train, held_out = data.hold_out(whole, 0.1)
    assert data.labels_of(held_out).bincount().tolist() == [5, 5, 5, 5]
    assert torch.cat([train.images, held_out.images]).flatten().sort().values.tolist() == list(
        range(200)
    )
    assert torch.equal(data.labels_of(train), labels[train.images.flatten().long()])
    torch.manual_seed(99)
    assert torch.equal(data.hold_out(whole, 0.1)[1].images, held_out.images)


def test_class_with_one_image_cannot_be_held_out(image_folder: Path) -> None:
    (image_folder / "train/cat/1.png").unlink()
    (image_folder / "train/cat/2.png").unlink()
    train = load_images("folder", "train", image_folder)
    with pytest.raises(UserError, match="folder train: class 'cat' has a single image"):
        data.hold_out(train, 0.1)


def test_channel_statistics_of_many_images_are_exact() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (4000, 3, 16, 16)))
    pixels[:, 2] = 51
    images = ImageSet("x", "train", pixels.to(torch.uint8), None, ())
    mean, std = data.channel_statistics(images)
    exact = pixels.double() / 255
    assert mean == tuple(round(x, 4) for x in exact.mean((0, 2, 3)).tolist())
    assert std[:2] == tuple(round(x, 4) for x in exact.std((0, 2, 3)).tolist()[:2])
    assert std[2] == 0.01  # a constant channel must not be divided by 0
