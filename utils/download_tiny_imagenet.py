"""Download Tiny-ImageNet, check all of it, and put it where the other scripts look for it.

    python utils/download_tiny_imagenet.py
    python utils/download_tiny_imagenet.py --archive ~/tiny-imagenet-200.zip

Kaggle is asked first (through kagglehub, no account needed), then the original host. The set is
unpacked in a hidden folder beside the data folder, checked there, and renamed as the last step: a
folder of that name is always a whole set. kagglehub keeps its own copy and goes on with a transfer
that broke off; it waits for a silent server without end, and then `--source stanford` helps.

Exit codes: 0 the set is there, 2 an error told in one line on stderr, 130 Ctrl-C or SIGTERM.
"""

import argparse
import contextlib
import functools
import io
import os
import shutil
import socket
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

if not __package__:  # run by its path, when Python looks for modules in this folder only
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from utils import cli, data
from utils.cli import UserError

# The version is pinned: without it kagglehub asks Kaggle even for what it has cached.
KAGGLE_HANDLE = "akash2sharma/tiny-imagenet/versions/1"
ARCHIVE_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
ARCHIVE_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
DEFAULT_DATA_DIR = data.ROOT / "data" / "tiny-imagenet"

CLASSES = 200
IMAGES = {"train": 100_000, "val": 10_000, "test": 10_000}
DECODED_SAMPLE = 100  # images of each split
NEEDED_BYTES = 800_000_000  # the zip and what is in it
SILENCE_S = 20.0  # of the original host, before it is given up


def check_set(root: Path) -> None:
    """Raise UserError or OSError, naming what is amiss, unless `root` is a whole Tiny-ImageNet."""
    if not (root / "wnids.txt").is_file():
        raise UserError(f"{root} has no wnids.txt")
    for split, total in IMAGES.items():
        paths, labels, classes = data.list_tiny_imagenet(root / split)
        if len(classes) != CLASSES or len(paths) != total:
            raise UserError(
                f"{root / split} has {len(paths):,} images of {len(classes)} classes, "
                f"not {total:,} of {CLASSES}"
            )
        if labels is not None and (labels.bincount() != total // CLASSES).any():
            raise UserError(f"{root / split} has not {total // CLASSES} images of each class")
        if empty := [path for path in paths if not path.stat().st_size]:
            raise UserError(f"{empty[0]} is empty")
        data.load_images("tiny-imagenet", split, root, num_images=DECODED_SAMPLE, fewer=True)


def describe_set() -> str:
    train, val, test = (f"{IMAGES[split]:,}" for split in ("train", "val", "test"))
    return f"{train} training, {val} validation and {test} test images"


def find_root(folder: Path) -> Path:
    """The shallowest folder that holds the set: a download may have a second copy within."""
    for pattern in ("wnids.txt", "*/wnids.txt", "*/*/wnids.txt"):
        for found in sorted(folder.glob(pattern)):
            if (found.parent / "val" / "val_annotations.txt").is_file():
                return found.parent
    raise UserError(f"{folder} holds no wnids.txt beside val/val_annotations.txt")


# --- three sources, each of which fills a folder --------------------------------------------------


def fetch_from_kaggle(target: Path) -> None:
    """Let kagglehub download the set, and copy it out of its cache."""
    import kagglehub

    cached = find_root(Path(kagglehub.dataset_download(KAGGLE_HANDLE)))
    with tqdm(desc="copy", unit="file", disable=None) as bar:

        def copy(source: str, destination: str) -> None:
            shutil.copyfile(source, destination)
            bar.update()

        second_copy = shutil.ignore_patterns("tiny-imagenet*")
        shutil.copytree(cached, target, ignore=second_copy, copy_function=copy)


def fetch_from_stanford(target: Path) -> None:
    """Download the original zip, check its md5, and unpack it."""
    from torchvision.datasets.utils import download_url

    socket.setdefaulttimeout(SILENCE_S)  # torchvision sets no limit
    download_url(ARCHIVE_URL, target, "archive.zip", ARCHIVE_MD5)
    unpack(target / "archive.zip", target)


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip; packed anew it will do, too, if what is in it is complete."""
    from torchvision.datasets.utils import check_md5

    if not check_md5(archive, ARCHIVE_MD5):
        print(f"note: {archive} is not the original zip (another md5); its content is checked")
    with zipfile.ZipFile(archive) as bundle:
        members = tqdm(bundle.namelist(), desc="unpack", unit="file", disable=None)
        bundle.extractall(target, members)  # drops from a path what would lead out of the folder


# --- putting it in place --------------------------------------------------------------------------


def is_complete(data_dir: Path) -> bool:
    """Whether the set is there already; UserError if anything else is, which is the user's."""
    try:
        if not data_dir.exists() or (data_dir.is_dir() and not any(data_dir.iterdir())):
            return False
        check_set(data_dir)
    except (UserError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{data_dir} is something other than a complete Tiny-ImageNet ({error}): move it away "
            "or choose another --data-dir"
        ) from error
    return True


def install(
    data_dir: Path, sources: Mapping[str, Callable[[Path], None]], remedy: str = ""
) -> None:
    """Make `data_dir` a whole set from the first source that has one.

    Raises:
        UserError: none has; `data_dir` is as it was before.
    """
    parent = cli.make_output_dir(data_dir.parent, "--data-dir")
    if os.path.ismount(data_dir):
        raise UserError(f"{data_dir} is a mount point: give a folder inside it as --data-dir")
    if (free := shutil.disk_usage(parent).free) < NEEDED_BYTES:
        needed = f"{NEEDED_BYTES / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        raise UserError(f"not enough space in {parent}: {needed}")
    # The libraries' progress bars are for a terminal only.
    bars = sys.stderr if sys.stderr.isatty() else io.StringIO()
    reasons = []
    for name, fetch in sources.items():
        print(f"trying {name}", flush=True)
        with tempfile.TemporaryDirectory(prefix=f".{data_dir.name}-", dir=parent) as work:
            target = Path(work) / "set"
            try:
                with contextlib.redirect_stderr(bars):
                    fetch(target)
                    root = find_root(target)
                    check_set(root)
                root.rename(data_dir)
                return
            except Exception as error:  # kagglehub, requests and zipfile raise some twenty kinds
                reasons.append(f"{name}: {str(error) or type(error).__name__}")
                print(f"no set from {reasons[-1]}", flush=True)
    raise UserError(f"no complete Tiny-ImageNet from {'; '.join(reasons)}{remedy}")


# --- the command line -----------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add, hosts = parser.add_argument, ["auto", "kaggle", "stanford"]
    what = "folder that the set itself (wnids.txt, train, val, test) will be in; 0.8 GB free"
    add("--data-dir", type=Path, default=DEFAULT_DATA_DIR, help=what)
    add("--source", choices=hosts, default="auto", help="host; auto tries one after the other")
    what = "tiny-imagenet-200.zip on this machine, used instead of a download and left there"
    add("--archive", type=Path, metavar="FILE", help=what)
    args = parser.parse_args(argv)
    if args.archive and args.source != "auto":
        parser.error("--archive needs no --source: give one of them")
    return args


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    data_dir = Path(os.path.realpath(args.data_dir.expanduser()))
    if is_complete(data_dir):
        print(f"{data_dir} is already complete: {describe_set()}")
        return 0
    if args.archive:
        archive = args.archive.expanduser()
        install(data_dir, {str(archive): functools.partial(unpack, archive)})
    else:
        sources = {"kaggle": fetch_from_kaggle, "stanford": fetch_from_stanford}
        chosen = sources if args.source == "auto" else {args.source: sources[args.source]}
        remedy = "; run again, or get tiny-imagenet-200.zip by hand and give --archive FILE"
        install(data_dir, chosen, remedy)
    print(f"{data_dir}: {describe_set()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
