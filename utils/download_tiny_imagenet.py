"""Download Tiny-ImageNet, check all of it, and put it where the other scripts look for it.

    python utils/download_tiny_imagenet.py
    python utils/download_tiny_imagenet.py --archive ~/tiny-imagenet-200.zip

Kaggle is asked first (through kagglehub, no account needed), then the original host. The set is
unpacked into a hidden folder beside the data folder, verified there, and renamed as the very last
step: a folder of that name is always a whole set. After any failure, or a killed process, the
same command goes on; what the original host had sent is kept and not fetched again.

Exit codes: 0 the set is there, 2 an error told in one line on stderr, 130 Ctrl-C or SIGTERM.
"""

import argparse
import concurrent.futures
import contextlib
import fcntl
import hashlib
import http.client
import io
import os
import random
import re
import shutil
import signal
import stat
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn
from urllib.parse import urlsplit

from PIL import Image
from tqdm import tqdm

# The version is pinned: without it kagglehub asks Kaggle even for what it has cached.
KAGGLE_HANDLE = "akash2sharma/tiny-imagenet/versions/1"
ARCHIVE_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
DEFAULT_DATA_DIR = Path(__file__).resolve().parent.parent / "data" / "tiny-imagenet"
ROOT_ENTRIES = ("train", "val", "test", "wnids.txt", "words.txt")

SOCKET_TIMEOUT_S = 20.0
TRIES = 3  # in a row that brought nothing new; a transfer that gets further starts a new count
PAUSE_S = 1.0  # before the second try, twice that before the third
BLOCK_BYTES = 1 << 20
KAGGLE_ANSWER_S = 30.0  # until the first sign of life
KAGGLE_LIMIT_S = 3600.0  # for its download and unpacking together
DECODED_SAMPLE = 300  # images: enough to notice a systematic fault in a tenth of a second


@dataclass(frozen=True)
class Expected:
    """What a complete Tiny-ImageNet and its original zip look like."""

    archive_bytes: int = 248_100_043
    archive_md5: str = "90528d7ca1a48142e341f4ef8d21d0de"
    unpacked_bytes: int = 520_000_000  # on disk: 120,000 files of one 4 KiB block each, mostly
    classes: int = 200
    train_per_class: int = 500
    val_per_class: int = 50
    test_images: int = 10_000

    def describe(self) -> str:
        """Return the counts of images in words."""
        train, val = self.classes * self.train_per_class, self.classes * self.val_per_class
        return f"{train:,} training, {val:,} validation and {self.test_images:,} test images"


EXPECTED = Expected()


class DownloadError(Exception):
    """Something went wrong that the user can mend; the text says in one line what and how."""


# --- the set on disk: what must be there -------------------------------------------------------


def verify_set(root: Path, expected: Expected) -> None:
    """Check that `root` holds a complete Tiny-ImageNet.

    Raises DownloadError naming the first missing, extra or broken thing, relative to `root`.
    """
    wnids = read_lines(root, "wnids.txt")
    if len(wnids) != expected.classes or len(set(wnids)) != expected.classes:
        found = f"{len(wnids)} lines, {len(set(wnids))} different"
        raise DownloadError(f"wnids.txt has {found}, expected {expected.classes} class ids")
    read_lines(root, "words.txt")

    compare_names("train", list_names(root, "train"), wnids)
    images = []
    for wnid in sorted(wnids):
        images += check_images(root, f"train/{wnid}/images", wnid, expected.train_per_class)
    val_names = check_images(root, "val/images", "val", expected.classes * expected.val_per_class)
    check_annotations(root, [Path(name).name for name in val_names], wnids, expected.val_per_class)
    images += val_names + check_images(root, "test/images", "test", expected.test_images)
    check_decodes(root, images)


def read_lines(root: Path, name: str) -> list[str]:
    """Return the lines of a text file that have text; DownloadError if it is missing or empty."""
    try:
        text = (root / name).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise DownloadError(f"{name} is missing") from None
    except UnicodeDecodeError as error:
        raise DownloadError(f"{name} is not a text file ({error})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DownloadError(f"{name} is empty")
    return lines


def list_names(root: Path, folder: str) -> list[str]:
    """Return the names in a folder, without the hidden ones that file managers leave."""
    try:
        return [name for name in os.listdir(root / folder) if not name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        raise DownloadError(f"{folder} is missing") from None


def compare_names(folder: str, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise DownloadError naming the first missing or else the first extra name of a folder."""
    missing, extra = set(wanted) - set(found), set(found) - set(wanted)
    for names, what in ((missing, "missing"), (extra, "not part of the set")):
        if names:
            others = f" (and {len(names) - 1:,} more like it)" if len(names) > 1 else ""
            raise DownloadError(f"{folder}/{min(names)} is {what}{others}")


def check_images(root: Path, folder: str, prefix: str, count: int) -> list[str]:
    """Return the `count` images of a folder, relative to `root`.

    Raises DownloadError unless they are <prefix>_0.JPEG, <prefix>_1.JPEG and so on, none empty.
    """
    names = [f"{prefix}_{index}.JPEG" for index in range(count)]
    compare_names(folder, list_names(root, folder), names)
    for name in names:
        status = os.stat(root / folder / name)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            raise DownloadError(f"{folder}/{name} is empty or not a file")
    return [f"{folder}/{name}" for name in names]


def check_annotations(
    root: Path, names: Sequence[str], wnids: Sequence[str], per_class: int
) -> None:
    """Raise DownloadError unless every validation image has one label, `per_class` of a class."""
    path = "val/val_annotations.txt"
    rows = [line.split("\t") for line in read_lines(root, path)]
    labels = {row[0]: row[1] for row in rows if len(row) > 1}
    compare_names(f"{path}: the line of val/images", labels, names)
    if len(rows) != len(labels):
        raise DownloadError(f"{path} has {len(rows):,} lines for {len(labels):,} images")
    counts = Counter(labels.values())
    for wnid in sorted(set(wnids) | set(counts)):
        wanted = per_class if wnid in wnids else 0
        if counts[wnid] != wanted:
            raise DownloadError(f"{path} gives {counts[wnid]} images to {wnid}, expected {wanted}")


def check_decodes(root: Path, images: Sequence[str]) -> None:
    """Decode a fixed sample of the images; DownloadError names the first that does not."""
    for name in random.Random(0).sample(images, min(DECODED_SAMPLE, len(images))):
        try:
            with Image.open(root / name) as image:
                image.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # PIL raises all three
            raise DownloadError(f"{name} cannot be decoded") from error


# --- the original host: a transfer that can be resumed -----------------------------------------


def download_archive(url: str, part: Path, expected: Expected) -> None:
    """Complete the file `part` with the zip at `url` and check its md5.

    Goes on behind what `part` already holds. Raises DownloadError when the host cannot be
    reached, keeps breaking off or serves something else; only a wrong file is removed.
    """
    if size_of(part) > expected.archive_bytes:
        part.unlink()
    tries, furthest = 1, size_of(part)
    while size_of(part) != expected.archive_bytes:
        try:
            fetch_rest(url, part, expected.archive_bytes)
        except (OSError, http.client.HTTPException) as error:
            if size_of(part) > furthest:
                tries, furthest = 0, size_of(part)
            if tries == TRIES:
                raise DownloadError(explain(error)) from error
            time.sleep(PAUSE_S * tries)
            tries += 1

    md5 = md5_of(part)
    if md5 != expected.archive_md5:
        part.unlink()
        wanted = expected.archive_md5
        raise DownloadError(f"the zip has md5 {md5}, expected {wanted}; it was removed, try again")


def fetch_rest(url: str, part: Path, total: int) -> None:
    """Append to `part` what it lacks of `total` bytes, in one request.

    Raises DownloadError when trying again is no use, else OSError or HTTPException.
    """
    offset = size_of(part)
    headers = {"User-Agent": "download_tiny_imagenet.py"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    with open_url(urllib.request.Request(url, headers=headers), part) as response:
        start = starting_byte(response, part, offset, total)
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(**bar("download", "B", total), initial=start, unit_scale=True) as progress,
        ):
            # read1 returns what has arrived: a time-out loses nothing that was received.
            while file.tell() <= total and (block := response.read1(BLOCK_BYTES)):
                file.write(block)
                progress.update(len(block))
    if size_of(part) > total:
        part.unlink()
        raise DownloadError(f"the host sends more than the {total:,} bytes of the zip")
    if size_of(part) < total:
        raise ConnectionError(f"the host closed the connection at {size_of(part):,} bytes")


def open_url(request: urllib.request.Request, part: Path) -> http.client.HTTPResponse:
    """Send the request; DownloadError for a refusal that will not change, else OSError."""
    try:
        return urllib.request.urlopen(request, timeout=SOCKET_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()  # it is the response, too
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)
        elif error.code < 500 and error.code not in (408, 429):
            raise DownloadError(f"the host answers {error.code} {error.reason}") from error
        raise


def starting_byte(response: http.client.HTTPResponse, part: Path, offset: int, total: int) -> int:
    """Return where in the zip the response starts: at `offset`, or at 0 if Range was ignored."""
    if response.status == http.HTTPStatus.PARTIAL_CONTENT:
        content_range = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range.strip())
        if match and int(match[1]) == offset and match[2] in ("*", str(total)):
            return offset
        part.unlink(missing_ok=True)  # there is no telling what belongs behind it
        raise ConnectionError(f"the host sent the wrong range {content_range!r}")
    announced = response.headers.get("Content-Length")
    if announced is not None and announced != str(total):
        raise DownloadError(f"the host serves {announced} bytes, the zip has {total:,}")
    return 0


def size_of(path: Path) -> int:
    """Return the size of a file in bytes, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def md5_of(path: Path) -> str:
    """Return the md5 of a file in hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


# --- the zip: nothing is written before every member is known to be harmless -------------------


def unpack_archive(archive: Path, target: Path, expected: Expected) -> None:
    """Unpack the zip's one top folder as `target`.

    Raises DownloadError for a damaged zip, a zip of something else and an unsafe member.
    """
    try:
        with zipfile.ZipFile(archive) as bundle:
            members = check_members(bundle, expected)
            for member in tqdm(members, **bar("unpack", "file", len(members))):
                extract_member(bundle, member, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error) as error:
        raise DownloadError(f"not a whole zip file ({explain(error)}); get it again") from error
    except (NotImplementedError, ValueError) as error:
        raise DownloadError(f"a zip that Python cannot read ({explain(error)})") from error


def check_members(bundle: zipfile.ZipFile, expected: Expected) -> list[zipfile.ZipInfo]:
    """Return the members of a zip; DownloadError names one that may not be unpacked."""
    members = bundle.infolist()
    top = PurePosixPath(members[0].filename).parts[:1] if members else ()
    for member in members:
        if problem := find_problem(member, top):
            raise DownloadError(f"refused the zip: its member {member.filename!r} {problem}")

    names = {PurePosixPath(member.filename).parts[1:] for member in members}
    for needed in (("wnids.txt",), ("val", "val_annotations.txt")):
        if needed not in names:
            raise DownloadError(f"a zip of something else: it has no {'/'.join(needed)}")
    size = sum(member.file_size for member in members)
    if size > expected.unpacked_bytes:
        limit = f"{expected.unpacked_bytes:,}"
        raise DownloadError(f"a zip of something else: {size:,} bytes unpacked, at most {limit}")
    return members


def find_problem(member: zipfile.ZipInfo, top: tuple[str, ...]) -> str:
    """Return why a zip member may not be unpacked, or nothing."""
    path = PurePosixPath(member.filename)
    if path.is_absolute() or "\\" in member.filename:  # a backslash: made on Windows
        return "is not a relative path"
    if ".." in path.parts:
        return "leads out of the folder"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a special file"
    if not path.parts or path.parts[:1] != top or (path.parts == top and not member.is_dir()):
        return "lies outside one top folder"
    return "is encrypted" if member.flag_bits & 1 else ""


def extract_member(bundle: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Write one checked member below `target`, without the zip's top folder."""
    path = target.joinpath(*PurePosixPath(member.filename).parts[1:])
    if member.is_dir():
        path.mkdir(parents=True, exist_ok=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bundle.read(member))


# --- Kaggle ------------------------------------------------------------------------------------


def copy_from_kaggle(handle: str, target: Path) -> None:
    """Let kagglehub download the set and link or copy it to `target`; its cache stays as it is.

    Raises DownloadError when Kaggle does not deliver or the set in it is not found.
    """
    try:
        root = find_root(Path(ask_kagglehub(handle)))
    except DownloadError:
        raise
    except Exception as error:  # kagglehub raises requests' errors and bare ones of its own
        raise DownloadError(explain(error)) from error

    with tqdm(**bar("copy", "file", None)) as progress:

        def link_or_copy(source: str, destination: str) -> None:
            if os.path.islink(source):
                shutil.copyfile(source, destination)
            else:
                try:
                    os.link(source, destination)
                except OSError:  # another file system, or one without hard links
                    shutil.copyfile(source, destination)
            progress.update()

        target.mkdir()
        for name in ROOT_ENTRIES:  # by name: the folder may hold a second copy of the set
            if (root / name).is_dir():
                shutil.copytree(root / name, target / name, copy_function=link_or_copy)
            elif (root / name).exists():
                link_or_copy(str(root / name), str(target / name))


def ask_kagglehub(handle: str) -> str:
    """Return the folder that kagglehub downloaded to.

    Raises DownloadError when nothing happens for too long, else whatever kagglehub raises. It
    sets no time-outs of its own, hence the thread; a daemon, so that it dies with the process.
    """
    answer: concurrent.futures.Future[str] = concurrent.futures.Future()
    terminal, noise = sys.stderr, io.StringIO()
    start, shown = time.monotonic(), 0
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        threading.Thread(target=call_kagglehub, args=(handle, answer), daemon=True).start()
        while not answer.done():
            concurrent.futures.wait([answer], timeout=0.2)
            if terminal.isatty():  # its progress bar
                shown += terminal.write(noise.getvalue()[shown:])
                terminal.flush()
            # It prints nothing before the server has answered.
            limit = KAGGLE_LIMIT_S if noise.tell() else KAGGLE_ANSWER_S
            if time.monotonic() - start > limit and not answer.done():
                raise DownloadError(f"not finished within {limit:.0f} s")
    return answer.result()


def call_kagglehub(handle: str, answer: "concurrent.futures.Future[str]") -> None:
    """Fill `answer` with kagglehub's folder or its exception."""
    try:
        import kagglehub  # half a second, and not needed with --archive

        answer.set_result(kagglehub.dataset_download(handle))
    except Exception as error:
        answer.set_exception(error)


def find_root(folder: Path) -> Path:
    """Return the shallowest folder that holds the set; DownloadError if there is none."""
    level = [folder]
    while level:
        for candidate in level:
            needed = (candidate / "wnids.txt", candidate / "val" / "val_annotations.txt")
            if all(path.is_file() for path in needed):
                return candidate
        below = [path for parent in level for path in sorted(parent.iterdir())]
        level = [path for path in below if path.is_dir() and not path.is_symlink()]
    raise DownloadError(f"{folder} holds no wnids.txt beside val/val_annotations.txt")


# --- putting it in place -----------------------------------------------------------------------


def install_set(
    data_dir: Path, source: str, archive: Path | None, handle: str, url: str, expected: Expected
) -> str:
    """Make `data_dir` a complete set, unless it is one, and return a line that says so.

    Raises DownloadError or OSError; then `data_dir` is as it was before.
    """
    work, part, lock = (hidden_sibling(data_dir, end) for end in ("unpacking", "zip.part", "lock"))
    already = f"{data_dir} is already complete: {expected.describe()}"
    if holds_complete_set(data_dir, expected) and not work.exists() and not part.exists():
        return already
    prepare_parent(data_dir)
    with hold_lock(lock):
        remove_tree(work)  # what a killed process left
        if holds_complete_set(data_dir, expected):  # by the process that this one waited for
            part.unlink(missing_ok=True)
            return already
        try:
            if archive:
                use_archive(archive, work, expected)
            else:
                use_sources(order_sources(source, part), work, part, handle, url, expected)
            work.rename(data_dir)
        finally:
            remove_tree(work)
        part.unlink(missing_ok=True)
    return f"{data_dir}: {expected.describe()}"


def hidden_sibling(data_dir: Path, ending: str) -> Path:
    """Return a path beside `data_dir`, so that renaming stays within one file system."""
    return data_dir.with_name(f".{data_dir.name}.{ending}")


def holds_complete_set(data_dir: Path, expected: Expected) -> bool:
    """Return whether `data_dir` is a complete set; False if there is nothing or an empty folder.

    Raises DownloadError when it holds anything else, which is nobody's but the user's.
    """
    if not os.path.lexists(data_dir):
        return False
    if not data_dir.is_dir():
        raise DownloadError(f"{data_dir} is not a folder: choose another --data-dir")
    if not any(data_dir.iterdir()):
        return False
    try:
        verify_set(data_dir, expected)
    except DownloadError as error:
        advice = "move it away or choose another --data-dir"
        raise DownloadError(
            f"{data_dir} holds something other than a complete Tiny-ImageNet ({error}): {advice}"
        ) from error
    return True


def prepare_parent(data_dir: Path) -> None:
    """Create the folder that `data_dir` will be in; DownloadError if it cannot be written to."""
    advice = "choose another --data-dir"
    try:
        data_dir.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"cannot create {data_dir}: {explain(error)}; {advice}") from error
    if not os.access(data_dir.parent, os.W_OK | os.X_OK):
        raise DownloadError(f"cannot write to {data_dir.parent}: no permission; {advice}")
    if os.path.ismount(data_dir):  # nothing can be renamed to it
        raise DownloadError(f"{data_dir} is a mount point: give a folder inside it as --data-dir")


def check_space(folder: Path, needed: int) -> None:
    """Raise DownloadError when fewer than `needed` bytes are free at `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        amounts = f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free"
        raise DownloadError(f"not enough space in {folder}: {amounts}")


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path` exclusively, waiting for another process if there is one.

    The system drops the lock with the process, however that ends; a file left behind is harmless.
    """
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another download is running (it holds {path}): waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        # The holder before us removed its file: only the file that is still there counts.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def use_archive(archive: Path, work: Path, expected: Expected) -> None:
    """Fill `work` from the user's own zip, which is only read; DownloadError or OSError if not."""
    if not archive.is_file():
        raise DownloadError(f"--archive {archive}: there is no such file")
    check_space(work.parent, expected.unpacked_bytes)
    try:
        unpack_archive(archive, work, expected)
        verify_set(work, expected)
    except DownloadError as error:
        raise DownloadError(f"--archive {archive}: {error}") from error
    if md5_of(archive) != expected.archive_md5:
        note = "is not the original zip (another md5); it was accepted since all of it checks out"
        print(f"warning: {archive} {note}", file=sys.stderr)


def order_sources(source: str, part: Path) -> list[str]:
    """Return the sources to try: with a transfer under way, the host that it came from first."""
    if source != "auto":
        return [source]
    return ["stanford", "kaggle"] if part.exists() else ["kaggle", "stanford"]


def use_sources(
    sources: Sequence[str], work: Path, part: Path, handle: str, url: str, expected: Expected
) -> None:
    """Fill `work` from the first source that delivers a complete set.

    Raises DownloadError with the reason of every source when none does.
    """
    needed = expected.archive_bytes + expected.unpacked_bytes - size_of(part)
    check_space(work.parent, needed)

    def from_kaggle() -> None:
        copy_from_kaggle(handle, work)

    def from_original_host() -> None:
        download_archive(url, part, expected)
        unpack_archive(part, work, expected)

    fetchers: dict[str, tuple[str, Callable[[], None]]] = {
        "kaggle": ("kaggle.com", from_kaggle),
        "stanford": (urlsplit(url).hostname or url, from_original_host),
    }
    reasons = []
    for host, fetch in (fetchers[source] for source in sources):
        print(f"downloading from {host}", flush=True)
        try:
            fetch()
            verify_set(work, expected)
            return
        except (DownloadError, OSError) as error:
            reasons.append(f"{host}: {explain(error)}")
            print(f"no luck with {reasons[-1]}", flush=True)
            remove_tree(work)
    advice = "check the network and run again, or get the zip by hand and give --archive FILE"
    raise DownloadError(f"no download: {'; '.join(reasons)}; {advice}")


def remove_tree(path: Path) -> None:
    """Remove a folder of ours, if it is there."""
    if path.exists():
        shutil.rmtree(path)


# --- the command line --------------------------------------------------------------------------


def bar(what: str, unit: str, total: int | None) -> dict:
    """Return tqdm's arguments for a progress bar that is quiet when stderr is no terminal."""
    return {"desc": what, "unit": unit, "total": total, "disable": None, "leave": False}


def explain(error: BaseException) -> str:
    """Return an error's own words in one line."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return explain(error.reason)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


class Parser(argparse.ArgumentParser):
    """A parser whose complaints end, like every other error here, as one line."""

    def error(self, message: str) -> NoReturn:
        raise DownloadError(f"{message} (see --help)")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks and appends each flag's default, if it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line; DownloadError for a wrong one."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=DEFAULT_DATA_DIR,
        help="folder that the set itself will be in (wnids.txt, train, val, test); 0.8 GB free",
    )
    parser.add_argument(
        "--source",
        choices=("auto", "kaggle", "stanford"),
        default="auto",
        help="host to download from; auto tries one after the other",
    )
    parser.add_argument(
        "--archive",
        type=Path,
        metavar="FILE",
        help="tiny-imagenet-200.zip on this machine, used instead of a download and left there",
    )
    args = parser.parse_args(argv)
    if args.archive and args.source != "auto":
        parser.error("--archive needs no --source: give one of them")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args = parse_args(argv)
        data_dir = Path(os.path.realpath(args.data_dir.expanduser()))
        archive = args.archive.expanduser() if args.archive else None
        print(install_set(data_dir, args.source, archive, KAGGLE_HANDLE, ARCHIVE_URL, EXPECTED))
    except (DownloadError, OSError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
