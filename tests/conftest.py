"""Miniature data sets that several test files share, and a cache that is not the user's."""

import atexit
import math
import os
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
from PIL import Image

# Before the tests import utils: worker processes inherit it.
os.environ["DATA_CACHE_DIR"] = tempfile.mkdtemp(prefix="data-cache-")
atexit.register(shutil.rmtree, os.environ["DATA_CACHE_DIR"], ignore_errors=True)

from utils import benchmark  # noqa: E402

benchmark.MAX_SLOWDOWN = math.inf  # a candidate that a busy machine holds up is scored all the same

# wnids.txt of the real set is not sorted either.
WNIDS = ("n02124075", "n01443537", "n04067472")
COLOURS = {"n02124075": (200, 40, 40), "n01443537": (40, 200, 40), "n04067472": (40, 40, 200)}


@pytest.fixture(autouse=True)
def _no_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C of one test is none of the next one's."""
    monkeypatch.setattr("utils.cli._interrupted", threading.Event())


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of `data/cache` for this process; it does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setattr("utils.data.CACHE_DIR", folder)
    return folder


@pytest.fixture
def tiny_imagenet(tmp_path: Path, cache_dir: Path) -> Path:
    """The layout of Tiny-ImageNet with 3 classes: 4 train images each, 12 val, 5 test.

    Every image of train and val has its class's colour of COLOURS.
    """
    folder = tmp_path / "tiny-imagenet"
    for wnid in WNIDS:
        for i in range(4):
            _save(folder / f"train/{wnid}/images/{wnid}_{i}.JPEG", COLOURS[wnid])
    wnid_of = {f"val_{i}.JPEG": WNIDS[i % 3] for i in range(12)}
    for name, wnid in wnid_of.items():
        _save(folder / "val/images" / name, COLOURS[wnid])
    for i in range(5):
        _save(folder / f"test/images/test_{i}.JPEG", (50 * i, 50 * i, 50 * i))
    rows = [f"{name}\t{wnid}\t0\t0\t15\t15\n" for name, wnid in wnid_of.items()]
    (folder / "val/val_annotations.txt").write_text("".join(rows))
    (folder / "wnids.txt").write_text("\n".join(WNIDS))
    return folder


@pytest.fixture
def image_folder(tmp_path: Path, cache_dir: Path) -> Path:
    """`{train,test}/<class>/<i>.png`, 3 classes, 16x16 pixels of (60 * class, 40 * i, 7).

    train has 2, 3 and 4 images of ant, cat and dog; test has 2 of each.
    """
    folder = tmp_path / "pictures"
    for label, (name, count) in enumerate({"ant": 2, "cat": 3, "dog": 4}.items()):
        for split, number in (("train", count), ("test", 2)):
            for i in range(number):
                _save(folder / split / name / f"{i}.png", (60 * label, 40 * i, 7))
    return folder


def _save(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path, quality=95)
