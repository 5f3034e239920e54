"""The downloader against a local server and a miniature set; the network is never used."""

import errno
import hashlib
import http.client
import io
import os
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from utils import download_tiny_imagenet as downloader

ROOT = Path(__file__).resolve().parent.parent
WNIDS = ("n01443537", "n01629819", "n01641577")
TOP = "tiny-imagenet-200"
# Runs main() in a process of its own, with the miniature set's constants; {setup} may break things.
RUNNER = """
import signal, socket, sys, time
from utils import download_tiny_imagenet as d
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start us with it ignored
d.EXPECTED, d.ARCHIVE_URL, d.PAUSE_S = d.{expected!r}, {url!r}, 0.0
{setup}
sys.exit(d.main({argv!r}))
"""


# --- a miniature set, its zip, and a host for it -----------------------------------------------


def make_image(index: int) -> bytes:
    """Return a JPEG of noise: it does not compress, so that the zip has a few dozen blocks."""
    pixels = random.Random(index).randbytes(64 * 64 * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (64, 64), pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def mini_files() -> dict[str, bytes]:
    """Return the miniature set: path -> content."""
    train = [f"train/{w}/images/{w}_{i}.JPEG" for w in WNIDS for i in range(4)]
    val, test = [f"val_{i}.JPEG" for i in range(6)], [f"test_{i}.JPEG" for i in range(5)]
    images = [*train, *(f"val/images/{n}" for n in val), *(f"test/images/{n}" for n in test)]
    files = {path: make_image(index) for index, path in enumerate(images)}
    rows = [f"{name}\t{WNIDS[i % 3]}\t0\t0\t62\t62\n" for i, name in enumerate(val)]
    files["val/val_annotations.txt"] = "".join(rows).encode()
    files["wnids.txt"] = "\n".join(WNIDS).encode()
    files["words.txt"] = b"n01443537\tgoldfish, Carassius auratus\n"
    return files | {f"train/{w}/{w}_boxes.txt": b"0\t0\t62\t62\n" for w in WNIDS}


def make_zip(files: dict[str, bytes], top: str = TOP) -> bytes:
    """Return a zip of the files in one top folder, with entries for the folders."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.mkdir(top)
        for path, content in files.items():
            bundle.writestr(f"{top}/{path}", content)
    return buffer.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


FILES = mini_files()
ZIP = make_zip(FILES)
EXPECTED = downloader.Expected(
    archive_bytes=len(ZIP),
    archive_md5=hashlib.md5(ZIP).hexdigest(),
    unpacked_bytes=10_000_000,
    classes=3,
    train_per_class=4,
    val_per_class=2,
    test_images=5,
)


@dataclass
class Host:
    """A server's orders (what it does wrong) and what it saw."""

    url: str = ""
    payload: bytes = ZIP
    mode: str = "good"  # or: ignores range, wrong range, 404, 416, 503
    break_after: list[int] = field(default_factory=list)  # bytes, for one request after the other
    pause_s: float = 0.0  # between blocks of 4 KiB
    silent_s: float = 0.0  # before the first byte of any answer
    stall_after: int = 0  # bytes of the first request, then half a second of silence
    ranges: list[str | None] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)


def answer(host: Host, request: BaseHTTPRequestHandler) -> None:
    """Serve the payload the way the host was told to."""
    wanted = request.headers.get("Range")
    host.ranges.append(wanted)
    time.sleep(host.silent_s)
    start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
    if host.mode in ("404", "503") or (host.mode == "416" and wanted):
        request.send_error(int(host.mode))
        return
    partial = bool(wanted) and host.mode in ("good", "wrong range")
    body = host.payload[start:] if partial else host.payload
    request.send_response(206 if partial else 200)
    request.send_header("Content-Length", str(len(body)))
    if partial:
        first = start + 7 if host.mode == "wrong range" else start
        total = len(host.payload)
        request.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
    try:
        request.end_headers()
    except OSError:  # the client gave up
        return
    if host.stall_after:
        body, host.stall_after = body[: host.stall_after], 0
        send_body(host, request, body)
        time.sleep(0.5)
    else:
        send_body(host, request, body[: host.break_after.pop(0)] if host.break_after else body)


def send_body(host: Host, request: BaseHTTPRequestHandler, body: bytes) -> None:
    index = len(host.sent)
    host.sent.append(0)
    for at in range(0, len(body), 4096):
        host.sent[index] += len(body[at : at + 4096])  # before the client can have it
        try:
            request.wfile.write(body[at : at + 4096])
        except OSError:  # the client was killed
            return
        time.sleep(host.pause_s)


@pytest.fixture
def host():
    state = Host()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(state, self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/tiny-imagenet-200.zip"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def miniature(monkeypatch, host):
    """Point the module at the local host and the miniature set; kagglehub must not be called."""

    def refuse(handle):
        raise AssertionError(f"kagglehub was called for {handle}")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloader, "EXPECTED", EXPECTED)
    monkeypatch.setattr(downloader, "ARCHIVE_URL", host.url)
    monkeypatch.setattr(downloader, "PAUSE_S", 0.0)
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=refuse))


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data" / "tiny-imagenet"


@pytest.fixture
def command(data_dir, host):
    """Start the command in a process of its own; what is still running is killed at the end."""
    running = []

    def start(*argv: str, setup: str = "") -> subprocess.Popen:
        argv = ("--data-dir", str(data_dir), *(argv or ("--source", "stanford")))
        code = RUNNER.format(expected=EXPECTED, url=host.url, setup=setup, argv=list(argv))
        environment = os.environ | {"KAGGLEHUB_CACHE": str(data_dir.parent.parent / "cache")}
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def run(data_dir: Path, *argv: str) -> int:
    return downloader.main(["--data-dir", str(data_dir), *(argv or ("--source", "stanford"))])


def part_of(data_dir: Path) -> Path:
    return data_dir.parent / ".tiny-imagenet.zip.part"


def wait_until(condition, seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def assert_complete(data_dir: Path) -> None:
    """Assert that every file is there, byte by byte, and nothing else, inside and beside it."""
    found = {
        str(path.relative_to(data_dir)): path.read_bytes()
        for path in data_dir.rglob("*")
        if path.is_file()
    }
    assert {name: found.get(name) for name in FILES if "boxes" not in name} == {
        name: content for name, content in FILES.items() if "boxes" not in name
    }
    assert set(found) <= set(FILES)
    assert os.listdir(data_dir.parent) == [data_dir.name]


def assert_refused(capsys, data_dir: Path, *argv: str) -> str:
    """Run the command; assert exit code 2, one line of error and no new set; return the line."""
    before = sorted(data_dir.rglob("*")) if data_dir.is_dir() else None
    assert run(data_dir, *argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert (sorted(data_dir.rglob("*")) if data_dir.is_dir() else None) == before
    return err


# --- good paths --------------------------------------------------------------------------------


def test_downloads_verifies_and_unpacks(host, data_dir, capsys):
    assert run(data_dir) == 0
    out, err = capsys.readouterr()
    last = out.splitlines()[-1]
    assert last == f"{data_dir}: 12 training, 6 validation and 5 test images"
    assert err == ""  # no progress bar: not a terminal
    assert_complete(data_dir)
    assert host.ranges == [None]
    assert host.sent == [len(ZIP)]


def test_complete_set_needs_no_network(host, data_dir, capsys):
    write_files(data_dir, FILES)
    (data_dir / "train" / ".DS_Store").write_bytes(b"left by a file manager")
    assert run(data_dir, "--source", "auto") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{data_dir} is already complete: 12 training, 6 validation and 5 test images"
    ]
    assert err == ""
    assert host.ranges == []


def test_empty_folder_is_fine(data_dir):
    data_dir.mkdir(parents=True)
    assert run(data_dir) == 0
    assert_complete(data_dir)


def test_symlink_to_an_empty_folder_is_filled_where_it_points(tmp_path, data_dir):
    real = tmp_path / "disk" / "tiny-imagenet"
    real.mkdir(parents=True)
    data_dir.parent.mkdir()
    data_dir.symlink_to(real)
    assert run(data_dir) == 0
    assert_complete(real)
    assert data_dir.is_symlink()


def test_archive_by_hand_is_used_and_kept(host, data_dir, tmp_path, capsys):
    archive = tmp_path / "mine.zip"
    archive.write_bytes(ZIP)
    assert run(data_dir, "--archive", str(archive)) == 0
    assert capsys.readouterr().err == ""
    assert_complete(data_dir)
    assert archive.read_bytes() == ZIP
    assert host.ranges == []


def test_repacked_archive_is_accepted_with_a_warning(data_dir, tmp_path, capsys):
    archive = tmp_path / "repack.zip"
    archive.write_bytes(make_zip(FILES, top="other-name"))
    assert run(data_dir, "--archive", str(archive)) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {archive} is not the original zip")
    assert err.count("\n") == 1
    assert_complete(data_dir)


def test_script_runs_from_any_folder(tmp_path):
    script = ROOT / "utils" / "download_tiny_imagenet.py"
    helped = subprocess.run(
        [sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert helped.returncode == 0
    assert "--archive FILE" in helped.stdout
    words = "".join(helped.stdout.split())  # long paths are broken at hyphens
    assert f"(default:{ROOT}/data/tiny-imagenet)" in words
    assert "None" not in words
    assert os.listdir(tmp_path) == []


# --- broken transfers --------------------------------------------------------------------------


def test_resumes_a_broken_transfer(host, data_dir):
    host.break_after = [30_000, 20_000]
    assert run(data_dir) == 0
    assert_complete(data_dir)
    assert host.ranges == [None, "bytes=30000-", "bytes=50000-"]
    assert host.sent == [30_000, 20_000, len(ZIP) - 50_000]


def test_goes_on_where_an_earlier_run_stopped(host, data_dir, capsys):
    host.break_after = [10_000] + [0] * downloader.TRIES
    line = assert_refused(capsys, data_dir)
    assert "closed the connection at 10,000 bytes" in line
    assert len(host.ranges) == 1 + downloader.TRIES  # the first got further, then no more
    assert part_of(data_dir).read_bytes() == ZIP[:10_000]
    assert run(data_dir, "--source", "auto") == 0
    assert "kaggle" not in capsys.readouterr().out  # does not start anew there
    assert host.ranges[-1] == "bytes=10000-"
    assert host.sent[-1] == len(ZIP) - 10_000
    assert_complete(data_dir)


@pytest.mark.parametrize("mode", ["ignores range", "wrong range", "416"])
def test_starts_over_when_the_rest_cannot_be_had(host, data_dir, mode):
    host.mode, host.break_after = mode, [30_000]
    assert run(data_dir) == 0
    assert_complete(data_dir)
    assert host.ranges[:2] == [None, "bytes=30000-"]
    assert host.sent[-1] == len(ZIP)


def test_part_longer_than_the_zip_is_thrown_away(host, data_dir):
    data_dir.parent.mkdir()
    part_of(data_dir).write_bytes(ZIP + b"x")
    assert run(data_dir) == 0
    assert host.ranges == [None]
    assert_complete(data_dir)


def test_finished_part_is_not_fetched_again(host, data_dir):
    data_dir.parent.mkdir()
    part_of(data_dir).write_bytes(ZIP)
    assert run(data_dir) == 0
    assert host.ranges == []
    assert_complete(data_dir)


def test_wrong_md5_is_refused_and_the_next_run_starts_afresh(host, data_dir, capsys):
    host.payload = ZIP[:1000] + bytes([ZIP[1000] ^ 1]) + ZIP[1001:]
    line = assert_refused(capsys, data_dir)
    assert EXPECTED.archive_md5 in line
    assert hashlib.md5(host.payload).hexdigest() in line
    assert not part_of(data_dir).exists()
    host.payload = ZIP
    assert run(data_dir) == 0
    assert_complete(data_dir)


def test_another_file_at_the_url_is_refused_at_once(host, data_dir, capsys):
    host.payload = b"<html>please sign in to this wireless network</html>"
    line = assert_refused(capsys, data_dir)
    assert f"serves {len(host.payload)} bytes" in line
    assert host.ranges == [None]
    assert not part_of(data_dir).exists()


@pytest.mark.parametrize(("mode", "requests"), [("404", 1), ("503", downloader.TRIES)])
def test_http_errors_are_retried_only_when_they_may_pass(host, data_dir, capsys, mode, requests):
    host.mode = mode
    line = assert_refused(capsys, data_dir)
    assert mode in line
    assert len(host.ranges) == requests


def test_silent_host_ends_in_a_timeout(host, data_dir, capsys, monkeypatch):
    monkeypatch.setattr(downloader, "SOCKET_TIMEOUT_S", 0.1)
    host.silent_s = 0.3
    assert "timed out" in assert_refused(capsys, data_dir)
    assert host.ranges == [None] * downloader.TRIES


def test_stalled_transfer_is_resumed_and_loses_nothing(host, data_dir, monkeypatch):
    monkeypatch.setattr(downloader, "SOCKET_TIMEOUT_S", 0.2)
    host.stall_after = 30_000
    assert run(data_dir) == 0
    assert host.ranges == [None, "bytes=30000-"]
    assert_complete(data_dir)


# --- zips that must not be unpacked ------------------------------------------------------------


def refuse_archive(capsys, data_dir, content: bytes) -> str:
    archive = data_dir.parent.parent / "given.zip"
    archive.write_bytes(content)
    line = assert_refused(capsys, data_dir, "--archive", str(archive))
    assert str(archive) in line
    assert archive.read_bytes() == content
    assert os.listdir(data_dir.parent) == []  # nothing left
    return line


@pytest.mark.parametrize("content", [ZIP[:-5000], ZIP[: len(ZIP) // 2], b"not a zip at all", b""])
def test_truncated_zip_and_no_zip(data_dir, capsys, content):
    assert "not a whole zip file" in refuse_archive(capsys, data_dir, content)


def test_zip_with_a_damaged_member(data_dir, capsys):
    with zipfile.ZipFile(io.BytesIO(ZIP)) as bundle:
        at = bundle.getinfo(f"{TOP}/train/n01443537/images/n01443537_0.JPEG").header_offset + 500
    line = refuse_archive(capsys, data_dir, ZIP[:at] + b"\0" * 40 + ZIP[at + 40 :])
    assert "n01443537_0.JPEG" in line


def test_zip_of_something_else(data_dir, capsys):
    line = refuse_archive(capsys, data_dir, make_zip({"cats/1.jpg": b"x"}))
    assert "something else" in line
    assert "wnids.txt" in line


def test_zip_that_would_fill_the_disk(data_dir, capsys):
    line = refuse_archive(capsys, data_dir, make_zip(FILES | {"zeros": bytes(20_000_000)}))
    assert "bytes unpacked, at most 10,000,000" in line


def test_missing_archive(data_dir, capsys):
    line = assert_refused(capsys, data_dir, "--archive", str(data_dir.parent / "nowhere.zip"))
    assert "nowhere.zip: there is no such file" in line


@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        (f"{TOP}/../../escaped.txt", 0, "leads out of the folder"),
        ("../escaped.txt", 0, "leads out of the folder"),
        ("/tmp/tiny-imagenet-escaped.txt", 0, "not a relative path"),
        (f"{TOP}\\..\\escaped.txt", 0, "not a relative path"),
        (f"{TOP}/link", stat.S_IFLNK | 0o777, "is a link"),
        (f"{TOP}/pipe", stat.S_IFIFO | 0o644, "special file"),
        ("second-top/file.txt", 0, "outside one top folder"),
        ("loose.txt", 0, "outside one top folder"),
        (TOP, stat.S_IFREG | 0o644, "outside one top folder"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_unsafe_member_is_named_and_nothing_is_written(
    data_dir, capsys, monkeypatch, name, mode, reason, first
):
    def fail(*_):
        raise AssertionError("a member was written")

    buffer = io.BytesIO()
    unsafe = zipfile.ZipInfo(name)
    unsafe.filename, unsafe.external_attr = name, mode << 16
    with zipfile.ZipFile(buffer, "w") as bundle:
        if first:
            bundle.writestr(unsafe, "/etc/passwd")
        for path, content in FILES.items():
            bundle.writestr(f"{TOP}/{path}", content)
        if not first:
            bundle.writestr(unsafe, "/etc/passwd")
    monkeypatch.setattr(downloader, "extract_member", fail)
    line = refuse_archive(capsys, data_dir, buffer.getvalue())
    if not (first and reason == "outside one top folder"):  # then the others lie outside it
        assert repr(name) in line
    assert reason in line


# --- sets that are not complete ----------------------------------------------------------------

ANNOTATIONS = FILES["val/val_annotations.txt"]
SOME_ROW = ANNOTATIONS.splitlines(keepends=True)[0]
LAST_TRAIN = "train/n01641577/images/n01641577_3.JPEG"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"wnids.txt": None}, "wnids.txt is missing"),
        ({"words.txt": None}, "words.txt is missing"),
        ({"words.txt": b"\n"}, "words.txt is empty"),
        ({"wnids.txt": b"n01443537\nn01629819\n"}, "wnids.txt has 2 lines"),
        ({"wnids.txt": b"n01443537\nn01443537\nn01641577\n"}, "3 lines, 2 different"),
        ({"wnids.txt": b"\xff\xfe\n"}, "wnids.txt is not a text file"),
        ({"wnids.txt": b"n01443537\nn01629819\nn09\n"}, "train/n09 is missing"),
        ({"train/n09/images/n09_0.JPEG": b"x"}, "train/n09 is not part of the set"),
        ({LAST_TRAIN: None}, f"{LAST_TRAIN} is missing"),
        ({"val/images/val_5.JPEG": None}, "val/images/val_5.JPEG is missing"),
        ({"test/images/test_0.JPEG": None}, "test/images/test_0.JPEG is missing"),
        ({"test/images/test_5.JPEG": b"x"}, "test/images/test_5.JPEG is not part of the set"),
        ({LAST_TRAIN: b""}, f"{LAST_TRAIN} is empty"),
        ({LAST_TRAIN: b"no image"}, f"{LAST_TRAIN} cannot be decoded"),
        ({LAST_TRAIN: FILES[LAST_TRAIN][:900]}, f"{LAST_TRAIN} cannot be decoded"),
        ({"val/val_annotations.txt": None}, "val_annotations.txt is missing"),
        ({"val/val_annotations.txt": ANNOTATIONS.replace(SOME_ROW, b"")}, "val_0.JPEG is missing"),
        ({"val/val_annotations.txt": ANNOTATIONS + SOME_ROW}, "7 lines for 6 images"),
        (
            {"val/val_annotations.txt": ANNOTATIONS + b"val_9.JPEG\tn01443537\t0\t0\t1\t1\n"},
            "val/images/val_9.JPEG is not part of the set",
        ),
        (
            {"val/val_annotations.txt": ANNOTATIONS.replace(b"n01629819", b"n01443537")},
            "gives 4 images to n01443537, expected 2",
        ),
        (
            {"val/val_annotations.txt": ANNOTATIONS.replace(b"n01443537", b"n00000001")},
            "gives 2 images to n00000001, expected 0",
        ),
    ],
)
def test_incomplete_set_is_refused_naming_the_fault(tmp_path, change, complaint):
    files = {path: content for path, content in (FILES | change).items() if content is not None}
    write_files(tmp_path, files)
    with pytest.raises(downloader.DownloadError, match=re.escape(complaint)):
        downloader.verify_set(tmp_path, EXPECTED)


def test_missing_folder_is_named(tmp_path):
    write_files(tmp_path, FILES)
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(downloader.DownloadError, match="test/images is missing"):
        downloader.verify_set(tmp_path, EXPECTED)


def test_incomplete_archive_never_becomes_the_set(data_dir, capsys):
    files = {path: content for path, content in FILES.items() if path != LAST_TRAIN}
    assert f"{LAST_TRAIN} is missing" in refuse_archive(capsys, data_dir, make_zip(files))


# --- folders that are not ours -----------------------------------------------------------------


def test_foreign_folder_is_left_alone(host, data_dir, capsys):
    write_files(data_dir, {"thesis.txt": b"years of work"})
    line = assert_refused(capsys, data_dir)
    assert str(data_dir) in line
    assert "wnids.txt is missing" in line
    assert "move it away" in line
    assert (data_dir / "thesis.txt").read_bytes() == b"years of work"
    assert os.listdir(data_dir.parent) == [data_dir.name]
    assert host.ranges == []


def test_data_dir_that_is_a_file(host, data_dir, capsys):
    data_dir.parent.mkdir()
    data_dir.write_text("a file")
    assert "is not a folder" in assert_refused(capsys, data_dir)
    assert data_dir.read_text() == "a file"
    assert host.ranges == []


def test_data_dir_below_a_file(host, tmp_path, capsys):
    (tmp_path / "file").write_text("a file")
    line = assert_refused(capsys, tmp_path / "file" / "tiny-imagenet")
    assert "cannot create" in line
    assert "choose another --data-dir" in line
    assert host.ranges == []


def test_folder_without_permission(data_dir, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    line = assert_refused(capsys, data_dir)
    assert f"cannot write to {data_dir.parent}" in line


def test_too_little_space_says_how_much(host, data_dir, capsys, monkeypatch):
    monkeypatch.setattr(downloader, "EXPECTED", replace(EXPECTED, unpacked_bytes=10**18))
    line = assert_refused(capsys, data_dir)
    assert re.search(r"1000000000\.00 GB are needed, \d+\.\d\d GB are free", line)
    assert host.ranges == []


def test_full_disk_while_unpacking_keeps_its_cause(data_dir, capsys, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(downloader, "extract_member", fail)
    assert "No space left on device" in assert_refused(capsys, data_dir)
    assert os.listdir(data_dir.parent) == [part_of(data_dir).name]  # the download is not lost


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--source", "elsewhere"], "invalid choice: 'elsewhere'"),
        (["--archive", "a.zip", "--source", "kaggle"], "give one of them"),
        (["--data"], "unrecognized arguments"),
    ],
)
def test_wrong_command_lines_are_one_line(data_dir, capsys, argv, complaint):
    assert complaint in assert_refused(capsys, data_dir, *argv)


# --- Kaggle ------------------------------------------------------------------------------------


def set_kaggle(monkeypatch, download) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=download))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("below", [".", "tiny-imagenet-200"])
def test_kaggle_nested_copies(host, data_dir, tmp_path, monkeypatch, capsys, below, links):
    cache = tmp_path / "cache"
    write_files(cache / below, FILES)
    write_files(cache / below / "tiny-imagenet-200", FILES | {"words.txt": b"the inner copy"})
    before, handles = snapshot(cache), []

    def download(handle):
        handles.append(handle)
        print("a notice of the library")
        print("its progress bar", file=sys.stderr)
        return str(cache)

    def fail(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    set_kaggle(monkeypatch, download)
    if not links:
        monkeypatch.setattr(os, "link", fail)
    assert run(data_dir, "--source", "auto") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "notice" not in out
    assert out.splitlines()[-1] == f"{data_dir}: {EXPECTED.describe()}"
    assert_complete(data_dir)
    assert snapshot(cache) == before
    assert handles == ["akash2sharma/tiny-imagenet/versions/1"]
    assert host.ranges == []


def test_progress_is_shown_on_a_terminal(data_dir, tmp_path, monkeypatch, capsys):
    cache = write_files(tmp_path / "cache", {"a.txt": b"x"})

    def download(_):
        print("bar of kagglehub", file=sys.stderr)
        time.sleep(0.1)  # an answer that is there at once needs no bar
        return str(cache)

    set_kaggle(monkeypatch, download)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run(data_dir, "--source", "auto") == 0
    err = capsys.readouterr().err
    assert err.count("bar of kagglehub") == 1
    assert "download:" in err
    assert "unpack:" in err
    assert_complete(data_dir)


def test_broken_kaggle_set_falls_back(host, data_dir, tmp_path, monkeypatch, capsys):
    cache = write_files(tmp_path / "cache", {k: v for k, v in FILES.items() if k != LAST_TRAIN})
    set_kaggle(monkeypatch, lambda _: str(cache))
    assert run(data_dir, "--source", "auto") == 0
    out = capsys.readouterr().out
    assert f"no luck with kaggle.com: {LAST_TRAIN} is missing" in out
    assert_complete(data_dir)
    assert len(host.ranges) == 1


def test_kaggle_folder_without_the_set(data_dir, tmp_path, monkeypatch, capsys):
    cache = write_files(tmp_path / "cache", {"a/b/c.txt": b"x"})
    set_kaggle(monkeypatch, lambda _: str(cache))
    assert "holds no wnids.txt" in assert_refused(capsys, data_dir, "--source", "kaggle")


def test_kaggle_that_hangs_is_given_up(data_dir, monkeypatch, capsys):
    release = threading.Event()
    set_kaggle(monkeypatch, lambda _: release.wait(10))
    monkeypatch.setattr(downloader, "KAGGLE_ANSWER_S", 0.3)
    start = time.monotonic()
    assert run(data_dir, "--source", "auto") == 0
    assert time.monotonic() - start < 5
    assert "no luck with kaggle.com: not finished within" in capsys.readouterr().out
    assert_complete(data_dir)
    release.set()


def test_kaggle_error_of_several_lines_becomes_one(data_dir, monkeypatch, capsys):
    def fail(_):
        raise RuntimeError("403 Client Error.\n\nYou don't have\n  permission")

    set_kaggle(monkeypatch, fail)
    line = assert_refused(capsys, data_dir, "--source", "kaggle")
    assert "kaggle.com: 403 Client Error. You don't have permission" in line


def test_without_kagglehub_the_original_host_serves(data_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    assert run(data_dir, "--source", "auto") == 0
    assert "kagglehub" in capsys.readouterr().out
    assert_complete(data_dir)


# --- no network, kills and company -------------------------------------------------------------


def test_without_network_one_line_names_both_hosts(data_dir, command):
    """The real kagglehub and the real addresses, with a resolver that knows no name."""
    setup = """
d.ARCHIVE_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
def no_network(*args, **kwargs):
    raise socket.gaierror(-2, "Name or service not known")
socket.getaddrinfo = no_network
"""
    process = command("--source", "auto", setup=setup)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    for words in ("kaggle.com", "cs231n.stanford.edu", "--archive FILE", "not known"):
        assert words in err
    assert os.listdir(data_dir.parent) == []


def test_refused_connection_in_process(data_dir, capsys, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(downloader, "ARCHIVE_URL", f"http://127.0.0.1:{port}/x.zip")
    line = assert_refused(capsys, data_dir)
    assert "127.0.0.1: [Errno 111] Connection refused" in line
    assert "--archive FILE" in line


def test_killed_while_downloading(host, data_dir, command):
    host.pause_s = 0.05
    process = command()
    wait_until(lambda: downloader.size_of(part_of(data_dir)) > 4096)
    process.kill()
    process.wait()
    kept = part_of(data_dir).stat().st_size
    assert 0 < kept < len(ZIP)
    assert not data_dir.exists()
    host.pause_s = 0.0
    assert run(data_dir) == 0
    assert host.ranges == [None, f"bytes={kept}-"]
    assert_complete(data_dir)


@pytest.mark.parametrize("moment", ["extract_member", "verify_set", "remove_tree"])
def test_killed_while_unpacking(host, data_dir, command, moment):
    """Killed in the middle of unpacking, before the rename, or (remove_tree) right after it."""
    setup = f"""
real, calls = d.{moment}, []
def stop_here(*args):
    calls.append(args)
    if len(calls) > {5 if moment == "extract_member" else 1 if moment == "remove_tree" else 0}:
        print("here", flush=True)
        time.sleep(60)
    return real(*args)
d.{moment} = stop_here
"""
    process = command(setup=setup)
    assert process.stdout is not None
    wait_until(lambda: process.stdout.readline() == "here\n")
    process.kill()
    process.wait()
    assert part_of(data_dir).exists()
    assert data_dir.exists() == (moment == "remove_tree")
    assert (data_dir.parent / ".tiny-imagenet.unpacking").exists() != data_dir.exists()
    assert run(data_dir) == 0
    assert len(host.ranges) == 1  # the zip was whole
    assert_complete(data_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_download_is_resumed(host, data_dir, command, number):
    host.pause_s = 0.05
    process = command()
    wait_until(lambda: downloader.size_of(part_of(data_dir)) > 4096)
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert err == "interrupted: run the same command again to go on\n"
    kept = part_of(data_dir).stat().st_size
    assert os.listdir(data_dir.parent) == [part_of(data_dir).name]
    host.pause_s = 0.0
    assert run(data_dir) == 0
    assert host.ranges == [None, f"bytes={kept}-"]
    assert_complete(data_dir)


def test_two_processes_at_once(host, data_dir, command):
    host.pause_s = 0.05
    first = command()
    wait_until(lambda: downloader.size_of(part_of(data_dir)) > 0)
    second = command()
    assert second.stdout is not None
    assert second.stdout.readline().startswith("another download is running")
    host.pause_s = 0.0
    out_1, err_1 = first.communicate(timeout=20)
    out_2, err_2 = second.communicate(timeout=20)
    assert (first.returncode, err_1) == (0, "")
    assert (second.returncode, err_2) == (0, "")
    assert out_1.splitlines()[-1] == f"{data_dir}: {EXPECTED.describe()}"
    assert out_2.splitlines() == [f"{data_dir} is already complete: {EXPECTED.describe()}"]
    assert len(host.ranges) == 1
    assert_complete(data_dir)


def test_who_waits_takes_over_when_the_other_is_killed(host, data_dir, command):
    host.pause_s = 0.05
    first = command()
    wait_until(lambda: downloader.size_of(part_of(data_dir)) > 0)
    second = command()
    assert second.stdout is not None
    assert second.stdout.readline().startswith("another download is running")
    host.pause_s = 0.0
    first.kill()
    out, err = second.communicate(timeout=20)
    assert (second.returncode, err) == (0, "")
    assert out.splitlines()[-1] == f"{data_dir}: {EXPECTED.describe()}"
    assert_complete(data_dir)


def test_many_holders_of_the_lock_exclude_each_other(tmp_path):
    """The lock file is removed by every holder; none may slip in through that gap."""
    inside, most, lock = [], [], tmp_path / "lock"

    def work():
        for _ in range(20):
            with downloader.hold_lock(lock):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(most) == 80
    assert max(most) == 1
    assert not lock.exists()


def test_expected_figures_of_the_real_set():
    real = downloader.Expected()
    assert real.describe() == "100,000 training, 10,000 validation and 10,000 test images"
    assert real.archive_bytes == 248_100_043
    assert re.fullmatch(r"[0-9a-f]{32}", real.archive_md5)
    assert issubclass(http.client.IncompleteRead, http.client.HTTPException)  # is retried
