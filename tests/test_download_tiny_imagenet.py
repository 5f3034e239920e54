"""The downloader against a local server and a miniature set; the network is never used."""

import errno
import hashlib
import io
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from utils import download_tiny_imagenet as downloader
from utils.cli import UserError

ROOT = Path(__file__).resolve().parent.parent
WNIDS = ("n01443537", "n01629819", "n01641577")
TOP = "tiny-imagenet-200"
COUNTS = "12 training, 6 validation and 5 test images"


# --- a miniature set, its zip, and a host for it -----------------------------------------------


def make_image(index: int) -> bytes:
    """A JPEG of noise, which hardly compresses."""
    pixels = random.Random(index).randbytes(32 * 32 * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (32, 32), pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def mini_files() -> dict[str, bytes]:
    """The miniature set: path -> content."""
    train = [f"train/{w}/images/{w}_{i}.JPEG" for w in WNIDS for i in range(4)]
    val, test = [f"val_{i}.JPEG" for i in range(6)], [f"test_{i}.JPEG" for i in range(5)]
    images = [*train, *(f"val/images/{n}" for n in val), *(f"test/images/{n}" for n in test)]
    files = {path: make_image(index) for index, path in enumerate(images)}
    rows = [f"{name}\t{WNIDS[i % 3]}\t0\t0\t62\t62\n" for i, name in enumerate(val)]
    files["val/val_annotations.txt"] = "".join(rows).encode()
    files["wnids.txt"] = "\n".join(reversed(WNIDS)).encode()
    files["words.txt"] = b"n01443537\tgoldfish, Carassius auratus\n"
    return files | {f"train/{w}/{w}_boxes.txt": b"0\t0\t62\t62\n" for w in WNIDS}


def make_zip(files: dict[str, bytes], top: str = f"{TOP}/") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for path, content in files.items():
            bundle.writestr(f"{top}{path}", content)
    return buffer.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


FILES = mini_files()
ZIP = make_zip(FILES)
LAST_TRAIN = "train/n01641577/images/n01641577_3.JPEG"
ANNOTATIONS = FILES["val/val_annotations.txt"]


@dataclass
class Host:
    """What a server is told to do wrong, and how often it was asked."""

    url: str = ""
    payload: bytes = ZIP
    status: int = 200
    sent: int = len(ZIP)  # bytes, after which it closes the connection
    silent: threading.Event | None = None  # it answers when this is set
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def host():
    state = Host()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests.append(self.path)
            if state.silent:
                state.silent.wait(10)
            try:
                self.send_response(state.status)
                self.send_header("Content-Length", str(len(state.payload)))
                self.end_headers()
                self.wfile.write(state.payload[: state.sent])
            except OSError:  # who asks for redirects only does not read on
                pass

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


def set_kaggle(monkeypatch, download) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(dataset_download=download))


@pytest.fixture(autouse=True)
def miniature(monkeypatch, host, cache_dir):
    """Point the module at the local host and the miniature set; kagglehub must not be called."""

    def refuse(handle):
        raise AssertionError(f"kagglehub was called for {handle}")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloader, "ARCHIVE_URL", host.url)
    monkeypatch.setattr(downloader, "ARCHIVE_MD5", hashlib.md5(ZIP).hexdigest())
    monkeypatch.setattr(downloader, "CLASSES", 3)
    monkeypatch.setattr(downloader, "IMAGES", {"train": 12, "val": 6, "test": 5})
    monkeypatch.setattr(downloader, "NEEDED_BYTES", 1000)
    set_kaggle(monkeypatch, refuse)
    yield
    socket.setdefaulttimeout(None)


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data" / "tiny-imagenet"


def run(data_dir: Path, *argv: str) -> int:
    return downloader.main(["--data-dir", str(data_dir), *(argv or ("--source", "stanford"))])


def assert_complete(data_dir: Path) -> None:
    """Every file is there, byte by byte, and nothing else, inside and beside it."""
    assert read_files(data_dir) == FILES
    assert os.listdir(data_dir.parent) == [data_dir.name]


def assert_refused(capsys, data_dir: Path, *argv: str) -> str:
    """Exit code 2, one line of error, which is returned, and everything as it was before."""
    before = read_files(data_dir.parent) if data_dir.parent.is_dir() else {}
    assert run(data_dir, *argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert (read_files(data_dir.parent) if data_dir.parent.is_dir() else {}) == before
    return err


# --- good paths --------------------------------------------------------------------------------


def test_downloads_checks_and_unpacks(host, data_dir, capsys):
    assert run(data_dir) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["trying stanford", f"{data_dir}: {COUNTS}"]
    assert err == ""  # no progress bar: not a terminal
    assert_complete(data_dir)


def test_progress_is_shown_on_a_terminal(data_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run(data_dir) == 0
    err = capsys.readouterr().err
    assert "100%" in err  # of the transfer
    assert "unpack:" in err


def test_complete_set_needs_no_network(host, data_dir, capsys):
    write_files(data_dir, FILES | {"train/.DS_Store": b"left by a file manager"})
    assert run(data_dir, "--source", "auto") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{data_dir} is already complete: {COUNTS}"]
    assert err == ""
    assert host.requests == []


def test_empty_folder_is_filled(data_dir):
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
    assert "not the original" not in capsys.readouterr().out
    assert_complete(data_dir)
    assert archive.read_bytes() == ZIP
    assert host.requests == []


@pytest.mark.parametrize("top", ["other-name/", "", "a/b/"])
def test_repacked_archive_is_accepted_with_a_note(data_dir, tmp_path, capsys, top):
    archive = tmp_path / "repack"
    archive.write_bytes(make_zip(FILES, top))
    assert run(data_dir, "--archive", str(archive)) == 0
    assert f"note: {archive} is not the original zip" in capsys.readouterr().out
    assert_complete(data_dir)
    assert data_dir.stat().st_mode & 0o055 == 0o055  # others may read it


def test_script_runs_by_its_path_from_any_folder(tmp_path):
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


# --- Kaggle ------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", TOP])
def test_kaggle_set_is_found_beside_its_second_copy_and_copied(
    host, data_dir, tmp_path, monkeypatch, capsys, below
):
    cache, handles = tmp_path / "kaggle", []
    write_files(cache / below, FILES)
    write_files(cache / below / TOP, FILES | {"words.txt": b"the inner copy"})
    before = read_files(cache)

    def download(handle):
        handles.append(handle)
        print("its progress bar", file=sys.stderr)
        return str(cache)

    set_kaggle(monkeypatch, download)
    assert run(data_dir, "--source", "auto") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == ["trying kaggle", f"{data_dir}: {COUNTS}"]
    assert err == ""
    assert_complete(data_dir)
    assert read_files(cache) == before
    assert handles == ["akash2sharma/tiny-imagenet/versions/1"]
    assert host.requests == []


def test_incomplete_kaggle_set_falls_back_to_the_original_host(
    host, data_dir, tmp_path, monkeypatch, capsys
):
    cache = write_files(tmp_path / "kaggle", {k: v for k, v in FILES.items() if k != LAST_TRAIN})
    set_kaggle(monkeypatch, lambda _: str(cache))
    assert run(data_dir, "--source", "auto") == 0
    out = capsys.readouterr().out
    assert "no set from kaggle: " in out
    assert "11 images of 3 classes, not 12 of 3" in out
    assert_complete(data_dir)
    assert host.requests


def test_kaggle_folder_without_the_set(data_dir, tmp_path, monkeypatch, capsys):
    cache = write_files(tmp_path / "kaggle", {"a/b/c.txt": b"x", "deep/er/wnids.txt": b"n1"})
    set_kaggle(monkeypatch, lambda _: str(cache))
    assert "holds no wnids.txt beside val" in assert_refused(capsys, data_dir, "--source", "kaggle")


def test_kaggle_error_of_several_lines_becomes_one(data_dir, monkeypatch, capsys):
    def fail(_):
        raise RuntimeError("403 Client Error.\n\nYou don't have\n  permission")

    set_kaggle(monkeypatch, fail)
    line = assert_refused(capsys, data_dir, "--source", "kaggle")
    assert "kaggle: 403 Client Error. You don't have permission" in line
    assert "--archive FILE" in line


def test_without_kagglehub_the_original_host_serves(data_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    assert run(data_dir, "--source", "auto") == 0
    assert "kagglehub" in capsys.readouterr().out
    assert_complete(data_dir)


# --- a host that does not deliver, and interruptions --------------------------------------------


def test_without_network_one_line_names_both_hosts(data_dir, tmp_path, monkeypatch, capsys):
    """The real kagglehub and the real addresses, with a resolver that knows no name."""

    def no_network(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.delitem(sys.modules, "kagglehub")
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
    monkeypatch.setattr(downloader, "ARCHIVE_URL", "http://cs231n.stanford.edu/t.zip")
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    line = assert_refused(capsys, data_dir, "--source", "auto")
    assert os.listdir(data_dir.parent) == []
    for words in ("kaggle.com", "stanford: <urlopen error", "not known", "--archive FILE"):
        assert words in line


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"status": 404}, "404"),
        ({"sent": len(ZIP) // 2}, "corrupted"),
        ({"payload": b"<html>please sign in to this wireless network</html>"}, "corrupted"),
        ({"payload": ZIP[:1000] + bytes([ZIP[1000] ^ 1]) + ZIP[1001:]}, "corrupted"),
    ],
)
def test_host_that_does_not_deliver_the_zip(host, data_dir, capsys, change, complaint):
    for name, value in change.items():
        setattr(host, name, value)
    line = assert_refused(capsys, data_dir)
    assert complaint in line
    assert os.listdir(data_dir.parent) == []


def test_silent_host_is_given_up(host, data_dir, capsys, monkeypatch):
    monkeypatch.setattr(downloader, "SILENCE_S", 0.2)
    host.silent = threading.Event()
    assert "timed out" in assert_refused(capsys, data_dir)
    host.silent.set()


def test_interruption_leaves_nothing(data_dir, monkeypatch, capsys):
    def stop(*_):
        assert len(os.listdir(data_dir.parent)) == 1  # the hidden folder
        raise KeyboardInterrupt

    monkeypatch.setattr(downloader, "check_set", stop)
    assert run(data_dir) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert os.listdir(data_dir.parent) == []


def test_full_disk_while_unpacking_keeps_its_cause(data_dir, capsys, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", fail)
    assert "No space left on device" in assert_refused(capsys, data_dir)
    assert os.listdir(data_dir.parent) == []


# --- zips that are given -----------------------------------------------------------------------


def refuse_archive(capsys, data_dir, content: bytes) -> str:
    archive = data_dir.parent.parent / "given.zip"
    archive.write_bytes(content)
    line = assert_refused(capsys, data_dir, "--archive", str(archive))
    assert str(archive) in line
    assert archive.read_bytes() == content
    assert os.listdir(data_dir.parent) == []
    return line


@pytest.mark.parametrize("content", [ZIP[:-5000], ZIP[: len(ZIP) // 2], b"not a zip at all", b""])
def test_truncated_zip_and_no_zip(data_dir, capsys, content):
    assert "not a zip file" in refuse_archive(capsys, data_dir, content)


def test_zip_with_a_damaged_member(data_dir, capsys):
    with zipfile.ZipFile(io.BytesIO(ZIP)) as bundle:
        at = bundle.getinfo(f"{TOP}/train/n01443537/images/n01443537_0.JPEG").header_offset + 500
    refuse_archive(capsys, data_dir, ZIP[:at] + b"\0" * 40 + ZIP[at + 40 :])


def test_zip_of_something_else(data_dir, capsys):
    assert "wnids.txt" in refuse_archive(capsys, data_dir, make_zip({"cats/1.jpg": b"x"}))


def test_incomplete_archive_never_becomes_the_set(data_dir, capsys):
    files = {path: content for path, content in FILES.items() if path != LAST_TRAIN}
    assert "11 images" in refuse_archive(capsys, data_dir, make_zip(files))


def test_missing_archive(data_dir, capsys):
    line = assert_refused(capsys, data_dir, "--archive", str(data_dir.parent / "nowhere.zip"))
    assert "--archive FILE" not in line  # it was given
    assert "No such file" in line
    assert "nowhere.zip" in line


@pytest.mark.parametrize("name", [f"{TOP}/../../escaped.txt", "../../escaped.txt", "/escaped.txt"])
def test_member_that_leads_out_of_the_folder_stays_within(data_dir, tmp_path, name):
    archive = tmp_path / "given.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr(name, "x")
        for path, content in FILES.items():
            bundle.writestr(f"{TOP}/{path}", content)
    assert run(data_dir, "--archive", str(archive)) == 0
    assert set(tmp_path.rglob("escaped.txt")) <= {data_dir / "escaped.txt"}
    assert not Path("/escaped.txt").exists()


# --- sets that are not complete ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"wnids.txt": None}, "no wnids.txt"),
        ({"wnids.txt": b"n01443537\nn01629819\n"}, "n01641577"),
        ({"wnids.txt": FILES["wnids.txt"] + b"\nn09"}, "no images of n09"),
        ({"train/n09/images/n09_0.JPEG": b"x"}, "n09"),
        ({LAST_TRAIN: None}, "11 images of 3 classes, not 12 of 3"),
        ({LAST_TRAIN: None, "train/n01443537/images/n01443537_9.JPEG": b"x"}, "not 4 images of"),
        ({"val/images/val_5.JPEG": None}, "val has 5 images"),
        ({"test/images/test_0.JPEG": None}, "test has 4 images"),
        ({"test/images/test_5.JPEG": b"x"}, "test has 6 images"),
        ({LAST_TRAIN: b""}, f"{LAST_TRAIN} is empty"),
        ({LAST_TRAIN: b"no image"}, f"cannot decode the image .*{LAST_TRAIN}"),
        ({LAST_TRAIN: FILES[LAST_TRAIN][:900]}, f"cannot decode the image .*{LAST_TRAIN}"),
        ({"val/val_annotations.txt": None}, "val_annotations.txt"),
        ({"val/val_annotations.txt": ANNOTATIONS.replace(b"val_0", b"val_8")}, "val_0.JPEG has no"),
        ({"val/val_annotations.txt": ANNOTATIONS.replace(b"n01629819", b"n01443537")}, "n01629819"),
    ],
)
def test_incomplete_set_is_refused_naming_the_fault(tmp_path, change, complaint):
    files = {path: content for path, content in (FILES | change).items() if content is not None}
    write_files(tmp_path, files)
    with pytest.raises((UserError, OSError), match=complaint):
        downloader.check_set(tmp_path)


def test_missing_split_is_named(tmp_path):
    write_files(tmp_path, FILES)
    shutil.rmtree(tmp_path / "test")
    with pytest.raises(UserError, match=f"{tmp_path / 'test'} holds no images"):
        downloader.check_set(tmp_path)


def test_figures_of_the_real_set(monkeypatch):
    monkeypatch.undo()
    assert downloader.describe_set() == (
        "100,000 training, 10,000 validation and 10,000 test images"
    )
    assert downloader.ARCHIVE_MD5 == "90528d7ca1a48142e341f4ef8d21d0de"


# --- folders that are not ours -----------------------------------------------------------------


def test_foreign_folder_is_left_alone(host, data_dir, capsys):
    write_files(data_dir, {"thesis.txt": b"years of work"})
    line = assert_refused(capsys, data_dir)
    assert str(data_dir) in line
    assert "no wnids.txt" in line
    assert "move it away" in line
    assert host.requests == []


def test_data_dir_that_is_a_file(host, data_dir, capsys):
    data_dir.parent.mkdir()
    data_dir.write_text("a file")
    assert "choose another --data-dir" in assert_refused(capsys, data_dir)
    assert host.requests == []


def test_data_dir_below_a_file(host, tmp_path, capsys):
    (tmp_path / "file").write_text("a file")
    line = assert_refused(capsys, tmp_path / "file" / "tiny-imagenet")
    assert f"cannot write to --data-dir {tmp_path / 'file'}" in line
    assert host.requests == []


def test_mount_point_and_full_disk_are_told_before_the_download(
    host, data_dir, capsys, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: path == data_dir)
        assert "is a mount point" in assert_refused(capsys, data_dir)
    monkeypatch.setattr(downloader, "NEEDED_BYTES", 10**18)
    assert "1000000000.00 GB are needed" in assert_refused(capsys, data_dir)
    assert host.requests == []


def test_set_that_another_process_put_there_meanwhile_stays(data_dir, capsys, monkeypatch):
    check_set = downloader.check_set

    def be_late(root):
        check_set(root)
        write_files(data_dir, {"wnids.txt": b"of the other process"})

    monkeypatch.setattr(downloader, "check_set", be_late)
    assert run(data_dir) == 2
    assert "not empty" in capsys.readouterr().err
    assert read_files(data_dir) == {"wnids.txt": b"of the other process"}
    assert os.listdir(data_dir.parent) == [data_dir.name]


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
