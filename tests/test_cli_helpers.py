"""Argument types, exit codes and the one-line errors that every script shares."""

import argparse
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from utils import cli
from utils.cli import Parser, UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def keep_sigterm() -> Iterator[None]:
    """`command` sets a handler for the whole process: put pytest's back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


# --- argument types -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convert", "text", "value"),
    [
        (cli.positive_int, "1", 1),
        (cli.positive_int, "0064", 64),
        (cli.positive_float, "1", 1.0),
        (cli.positive_float, "2.5e-3", 0.0025),
        (cli.int_list, "1", [1]),
        (cli.int_list, "8, 1,32", [8, 1, 32]),
        (cli.int_list, "4,2,4", [4, 2]),
        (cli.name_list, "fp32", ["fp32"]),
        (cli.name_list, " int8 ,fp32,,int8,", ["int8", "fp32"]),
    ],
)
def test_good_values(convert: Callable[[str], Any], text: str, value: Any) -> None:
    assert convert(text) == value
    assert type(convert(text)) is type(value)


@pytest.mark.parametrize(
    ("convert", "text"),
    [
        *((cli.positive_int, text) for text in ("", "0", "-1", "+1", "1.0", "1e3", "1_0", "x")),
        *((cli.positive_int, text) for text in ("²", "٣", " 1")),
        *((cli.positive_float, text) for text in ("", "0", "-1", "nan", "inf", "-inf", "x")),
        *((cli.positive_float, text) for text in ("1e999", "1e-999")),
        *((cli.int_list, text) for text in ("", ",", "1,", "1,,2", "1;2", "1,0", "1,x")),
        *((cli.name_list, text) for text in ("", ",", " , ")),
    ],
)
def test_bad_values(convert: Callable[[str], Any], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        convert(text)
    assert str(caught.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("int", "did you mean int8"),
        ("FP32", "did you mean fp32?"),
        ("zzz", "choose from fp32, int8, compiled"),
    ],
)
def test_unknown_name_gets_a_hint(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        cli.check_name(name, iter(["fp32", "int8", "compiled"]), "candidate")
    assert f"unknown candidate {name!r}" in str(caught.value)
    assert hint in str(caught.value)


def test_known_name_is_returned() -> None:
    assert cli.check_name("int8", ["fp32", "int8"], "candidate") == "int8"


def test_long_list_of_names_is_cut() -> None:
    with pytest.raises(UserError, match=r"choose from 0, 1, .*, 19, …$"):
        cli.check_name("zzz", map(str, range(1000)), "model")


# --- the parser -----------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("What it measures.\n\n    the command that matters")
    parser.add_argument("--batch-sizes", type=cli.int_list, default=[1, 32], help="images a batch")
    parser.add_argument("--num-images", type=cli.positive_int, default=500, help="how many")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where")
    parser.add_argument("--quick", action="store_true", help="a short run")
    return parser.parse_args(argv)


@cli.command
def script(argv: Sequence[str] | None = None) -> int:
    """A script's docstring."""
    parse(argv)
    return 1


def test_help_shows_defaults_and_keeps_the_line_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        script(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for expected in ("1,32", "500", "auto", "False"):
        assert f"(default: {expected})" in text
    assert "What it measures.\n\n    the command that matters" in text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--num-images", "0"], "argument --num-images: '0' is not a whole number of at least 1"),
        (["--num-images", "9" * 5000], "argument --num-images"),
        (["--num-images"], "argument --num-images: expected one argument"),
        (["--batch-sizes", "1,x"], "argument --batch-sizes: 'x' is not a whole number"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["stray"], "unrecognized arguments: stray"),
        (["--num", "5"], "unrecognized arguments: --num 5"),  # no abbreviations
        (["--quick=1"], "argument --quick: ignored explicit argument '1'"),
    ],
)
def test_bad_flag_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], expected: str
) -> None:
    assert script(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {expected}")
    assert captured.err.endswith("(see --help)\n")
    assert captured.err.count("\n") == 1


# --- exit codes -----------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[..., int]:
    @cli.command
    def main(argv: Sequence[str] | None) -> int:
        raise error

    return main


def test_command_passes_the_exit_code_and_the_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert script(["--quick"]) == 1
    assert script.__name__ == "script"
    assert script.__doc__ == "A script's docstring."
    assert capsys.readouterr().err == ""


def test_user_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(UserError("no such folder:\n  name it\n with --data-dir"))() == 2
    captured = capsys.readouterr()
    assert captured.err == "error: no such folder: name it with --data-dir\n"
    assert captured.out == ""


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    assert raising(KeyboardInterrupt())() == 130
    assert capsys.readouterr().err.startswith("interrupted: ")


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(5, "input/output"), SystemExit(3)])
def test_other_exceptions_propagate(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        raising(error)()
    assert caught.value is error


def test_sigterm_ends_like_ctrl_c() -> None:
    code = """
import sys, time
from utils.cli import command

@command
def main(argv=None):
    print("ready", flush=True)
    try:
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)

sys.exit(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert out == "cleaned up\n"
    assert err == "interrupted: everything finished so far is kept\n"


# --- device, output folder, seed ------------------------------------------------------------------


def test_pick_device_without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.pick_device("auto").type == "cpu"
    assert cli.pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match=r"--device cuda: .*use --device cpu"):
        cli.pick_device("cuda")


def test_pick_device_with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = [cli.pick_device(name).type for name in ("auto", "cuda", "cpu")]
    assert chosen == ["cuda", "cuda", "cpu"]


def test_make_output_dir(tmp_path: Path) -> None:
    path = tmp_path / "results" / "part1"
    assert cli.make_output_dir(path) == path
    (path / "table.csv").write_text("kept")
    assert cli.make_output_dir(path) == path
    assert [file.name for file in path.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_output_dir_that_is_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / below
    with pytest.raises(UserError) as caught:
        cli.make_output_dir(path)
    assert str(caught.value).startswith(f"cannot write to --output-dir {path}: ")


def test_output_dir_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", touch)
    with pytest.raises(UserError, match=f"--output-dir {tmp_path}: Permission denied"):
        cli.make_output_dir(tmp_path)


def test_two_runs_may_make_one_output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "touch", lambda self: None)  # the other run has removed the probe
    assert cli.make_output_dir(tmp_path) == tmp_path


@pytest.mark.parametrize("seed", [0, 7, -1, 2**40])
def test_seed_everything(seed: int) -> None:
    draws = []
    for _ in range(2):
        cli.seed_everything(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
