"""The data sets on miniature folders: labels, subsets, the decoding cache, every user's error."""

import contextlib
import http.client
import os
import resource
import shutil
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

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


def test_speed_and_accuracy_splits_exist_and_accuracy_is_labelled(
    tiny_imagenet: Path, image_folder: Path
) -> None:
    folders = {"tiny-imagenet": tiny_imagenet, "cifar100": image_folder, "folder": image_folder}
    for dataset in data.DATASETS:
        where = folders.get(dataset)
        assert load_images(dataset, data.ACCURACY_SPLIT[dataset], where).labels is not None
        assert len(load_images(dataset, data.SPEED_SPLIT[dataset], where)) > 0


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


def test_test_split_takes_its_classes_from_train(image_folder: Path) -> None:
    (image_folder / "test/notes.txt").write_text("not a class")
    (image_folder / "test/cat/notes.txt").write_text("not an image")
    images = load_images("folder", "test", image_folder)
    assert images.classes == ("ant", "cat", "dog")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_test_split_alone_is_enough(image_folder: Path) -> None:
    shutil.rmtree(image_folder / "train")
    assert load_images("folder", "test", image_folder).classes == ("ant", "cat", "dog")


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_image_mode_becomes_rgb(image_folder: Path, mode: str) -> None:
    path = image_folder / "train/ant/0.png"
    grey = Image.new("RGB", (16, 16), (255, 255, 255)).convert(mode)
    if mode == "CMYK":
        path.unlink()
        path = path.with_name("0.tif")
    grey.save(path)
    images = load_images("folder", "train", image_folder).images
    assert images.shape == (9, 3, 16, 16)
    assert (images[0] == 255).all()


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


def test_folder_crop_without_resize_keeps_the_middle_pixels(image_folder: Path) -> None:
    image = random_image(12, 8)
    image.save(image_folder / "train/ant/0.png")
    loaded = load_images("folder", "train", image_folder, image_size=8).images[0]
    assert np.array_equal(loaded.permute(1, 2, 0).numpy(), np.asarray(image)[:, 2:10])


def test_image_sizes_are_cached_apart(image_folder: Path, cache_dir: Path) -> None:
    sides = [load_images("folder", "test", image_folder, side).images.shape[-1] for side in (8, 4)]
    assert sides == [8, 4]
    assert load_images("folder", "test", image_folder).images.shape[-1] == 16
    assert len(list(cache_dir.iterdir())) == 3


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


def test_digits_are_rgb_bytes_over_the_full_range() -> None:
    digits = load_images("digits", "test")
    assert digits.classes == tuple("0123456789")
    assert digits.images.dtype == torch.uint8
    assert digits.images.shape == (360, 3, 8, 8)
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    assert digits.images[:, 0].equal(digits.images[:, 1])
    assert digits.images[:, 0].equal(digits.images[:, 2])


# --- CIFAR-100 from torchvision's archive ---------------------------------------------------------


class StandInCifar:
    """torchvision.datasets.CIFAR100 with five images."""

    filename = CIFAR_ARCHIVE

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert Path(root).is_dir()
        assert download
        count = 5 if train else 3
        shape = (count, 32, 32, 3)
        self.data = np.arange(np.prod(shape)).astype(np.uint8).reshape(shape)
        self.targets = list(range(count))
        self.classes = ["apple", "aquarium_fish", "baby", "bear", "beaver"]


@pytest.mark.parametrize(("split", "count"), [("train", 5), ("test", 3)])
def test_cifar100_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, count: int
) -> None:
    monkeypatch.setattr("torchvision.datasets.CIFAR100", StandInCifar)
    images = load_images("cifar100", split, tmp_path / "new" / "cifar100")
    source = StandInCifar(str(tmp_path), split == "train", True)
    assert images.images.shape == (count, 3, 32, 32)
    assert images.images.is_contiguous()
    assert np.array_equal(images.images[2, 1].numpy(), source.data[2, :, :, 1])
    assert images.labels is not None
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == list(range(count))
    assert images.classes == tuple(source.classes)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)


@pytest.mark.usefixtures("offline")
def test_cifar100_offline_names_archive_and_folder(tmp_path: Path) -> None:
    text = error_of("cifar100", "test", tmp_path / "cifar100")
    assert "no network" in text
    assert f"put a good {CIFAR_ARCHIVE} into {tmp_path / 'cifar100'}, or" in text


@pytest.mark.usefixtures("offline")
def test_cifar100_archive_with_a_wrong_md5_is_not_unpacked(tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "meta").write_bytes(b"not CIFAR-100")
    with tarfile.open(tmp_path / CIFAR_ARCHIVE, "w:gz") as archive:
        archive.add(tmp_path / "meta", "cifar-100-python/meta")
    text = error_of("cifar100", "train", tmp_path)
    assert f"into {tmp_path} (the {CIFAR_ARCHIVE} there is damaged)" in text
    assert not (tmp_path / "cifar-100-python").exists()


def test_cifar100_download_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(*_: Any, **__: Any) -> None:
        raise http.client.IncompleteRead(b"half")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert CIFAR_ARCHIVE in error_of("cifar100", "test", tmp_path)


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


def test_subset_is_decided_by_the_seed(uneven: ImageSet) -> None:
    first, again, other = (take_subset(uneven, 9, seed=seed).images for seed in (5, 5, 6))
    assert first.equal(again)
    assert not first.equal(other)


def test_subset_leaves_the_global_generator_alone(uneven: ImageSet) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take_subset(uneven, 5, seed=1)
    assert torch.rand(1).equal(expected)


def test_subset_of_everything_is_everything(uneven: ImageSet) -> None:
    assert take_subset(uneven, 40, seed=0).images.equal(uneven.images)


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

    def note(path: Path, side: int | None) -> np.ndarray:
        decoded.append(path)
        return decode_one(path, side)

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


def touch(folder: Path) -> None:
    os.utime(folder / "train/ant/0.png", ns=(10**18, 10**18))


def add(folder: Path) -> None:
    shutil.copy2(folder / "train/ant/0.png", folder / "train/ant/9.png")


def remove(folder: Path) -> None:
    (folder / "train/ant/0.png").unlink()


def move_to_another_class(folder: Path) -> None:
    (folder / "train/ant/0.png").rename(folder / "train/cat/a.png")


@pytest.mark.parametrize("alter", [change, touch, add, remove, move_to_another_class])
def test_altered_source_is_decoded_again_and_the_stale_file_dropped(
    image_folder: Path, cache_dir: Path, alter: Callable[[Path], None]
) -> None:
    load_images("folder", "train", image_folder)
    load_images("folder", "test", image_folder)
    before = {path.name for path in cache_dir.iterdir()}
    alter(image_folder)
    loaded = load_images("folder", "train", image_folder)
    after = {path.name for path in cache_dir.iterdir()}
    assert len(after) == len(before) == 2  # one per split
    assert {name for name in before & after if "-test-" in name}
    assert not {name for name in before & after if "-train-" in name}
    fresh = data._decode_all(sorted((image_folder / "train").glob("*/*.png")), None)
    assert loaded.images.equal(fresh)


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


def empty(cache: Path) -> None:
    cache.write_bytes(b"")


def scribble(cache: Path) -> None:
    cache.write_bytes(b"\xff" * 500)


def store_too_few(cache: Path) -> None:
    save_file({"images": torch.zeros(3, 3, 16, 16, dtype=torch.uint8)}, cache)


def store_floats(cache: Path) -> None:
    save_file({"images": torch.zeros(9, 3, 16, 16)}, cache)


def store_another_name(cache: Path) -> None:
    save_file({"pictures": torch.zeros(9, 3, 16, 16, dtype=torch.uint8)}, cache)


@pytest.mark.parametrize(
    "damage", [truncate, empty, scribble, store_too_few, store_floats, store_another_name]
)
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


def test_cache_write_that_fails_leaves_no_file(
    image_folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", replace)
    assert len(load_images("folder", "train", image_folder)) == 9
    assert list(cache_dir.iterdir()) == []


def test_interrupted_cache_write_leaves_no_file(
    image_folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_half(tensors: dict[str, Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "save_file", save_half)
        with pytest.raises(KeyboardInterrupt):
            load_images("folder", "train", image_folder)
    assert list(cache_dir.iterdir()) == []
    assert len(load_images("folder", "train", image_folder)) == 9


# --- preprocessing --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 20])
def test_preprocess_constant_image_exactly(size: int) -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).repeat(2, 1, 8, 8)
    before = images.clone()
    how = Preprocessing(size, (0.5, 0.2, 0.1), (0.25, 0.5, 2.0))
    out = preprocess(images, how)
    assert out.shape == (2, 3, size, size)
    assert out.dtype == torch.float32
    expected = torch.tensor([-2.0, 0.0, 0.45]).view(1, 3, 1, 1).expand_as(out)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    assert images.equal(before)


@pytest.mark.parametrize("size", [24, 64, 112])
def test_preprocess_resizes_like_pillow(size: int) -> None:
    image = random_image(64, 64, 60, 196)  # no overshoot: Pillow would clip it in each direction
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    out = preprocess(pixels, Preprocessing(size, (0.0,) * 3, (1.0,) * 3))[0] * 255
    pillow = np.array(image.resize((size, size), Image.Resampling.BICUBIC))
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


def test_preprocess_honours_the_interpolation() -> None:
    images = torch.from_numpy(np.array(random_image(8, 8))).permute(2, 0, 1)[None]
    zero, one = (0.0,) * 3, (1.0,) * 3
    bicubic = preprocess(images, Preprocessing(16, zero, one))
    bilinear = preprocess(images, Preprocessing(16, zero, one, "bilinear"))
    assert not torch.allclose(bicubic, bilinear, atol=1e-3)


# --- a user's errors, each with the path ----------------------------------------------------------


def damage_image(folder: Path) -> str:
    path = folder / "val/images/val_3.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    return f"cannot decode the image {path}"


def replace_image_by_text(folder: Path) -> str:
    path = folder / "val/images/val_3.JPEG"
    path.write_text("<html>not found</html>")
    return f"cannot decode the image {path}"


def drop_annotations(folder: Path) -> str:
    path = folder / "val/val_annotations.txt"
    path.unlink()
    return f"{path} is missing"


def drop_annotation_line(folder: Path) -> str:
    path = folder / "val/val_annotations.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("val_3.")))
    return f"{path}: no line for val_3.JPEG"


def write_unknown_wnid(folder: Path) -> str:
    path = folder / "val/val_annotations.txt"
    path.write_text(path.read_text().replace("val_3.JPEG\tn02124075", "val_3.JPEG\tn99999999"))
    return f"{path}: n99999999 for val_3.JPEG"


def cut_annotation_line(folder: Path) -> str:
    path = folder / "val/val_annotations.txt"
    path.write_text(path.read_text().replace("val_3.JPEG\tn02124075", "val_3.JPEG"))
    return f"{path}: "


def drop_wnids(folder: Path) -> str:
    (folder / "wnids.txt").unlink()
    return f"{folder} does not hold Tiny-ImageNet"


def drop_val_images(folder: Path) -> str:
    shutil.rmtree(folder / "val/images")
    return f"{folder / 'val/images'} is missing"


def empty_val_images(folder: Path) -> str:
    shutil.rmtree(folder / "val/images")
    (folder / "val/images").mkdir()
    return f"{folder / 'val/images'} holds no images"


def change_one_size(folder: Path) -> str:
    path = folder / "val/images/val_3.JPEG"
    Image.new("RGB", (20, 10)).save(path)
    return f"{path} is 20x10 pixels, the first image is 16x16"


@pytest.mark.parametrize(
    "spoil",
    [
        damage_image,
        replace_image_by_text,
        drop_annotations,
        drop_annotation_line,
        write_unknown_wnid,
        cut_annotation_line,
        drop_wnids,
        drop_val_images,
        empty_val_images,
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
    for path in (image_folder / split / "cat").iterdir():
        path.unlink()
    text = error_of("folder", split, image_folder)
    assert text == f"{image_folder / split / 'cat'} holds no images"


def test_class_missing_from_test(image_folder: Path) -> None:
    shutil.rmtree(image_folder / "test/cat")
    assert f"{image_folder / 'test/cat'} is missing" in error_of("folder", "test", image_folder)


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
@pytest.mark.parametrize("below", ["", "deeper"])
def test_data_dir_that_is_a_file(tmp_path: Path, dataset: str, below: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / below
    text = error_of(dataset, "test", path)
    assert str(path) in text
    assert "\n" not in text


@pytest.mark.parametrize("dataset", ["tiny-imagenet", "folder"])
def test_data_dir_that_is_missing(tmp_path: Path, dataset: str) -> None:
    text = error_of(dataset, "test", tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in text
    assert "--data-dir" in text
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("dataset", ["cifar100", "folder"])
def test_tiny_imagenet_given_as_an_image_folder(
    tiny_imagenet: Path, dataset: str, split: str
) -> None:
    assert str(tiny_imagenet / split) in error_of(dataset, split, tiny_imagenet)


def test_image_folder_given_as_tiny_imagenet(image_folder: Path) -> None:
    text = error_of("tiny-imagenet", "train", image_folder)
    assert text.startswith(f"{image_folder} does not hold Tiny-ImageNet (no wnids.txt)")


def test_unknown_data_set(tmp_path: Path) -> None:
    text = error_of("imagenet", "test", tmp_path)
    assert "unknown data set 'imagenet'" in text
    assert all(name in text for name in data.DATASETS)


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
