"""What every command line shares: argument types, one-line errors, Ctrl-C, exit codes, --list."""

import argparse
import ast
import errno
import os
import random
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import part1_quantize
import part3_tensorrt
from utils import cli, results
from utils.cli import Parser, UserError

ROOT = Path(__file__).resolve().parent.parent


SCRIPTS = ("part1_quantize.py", "part2_tune.py", "part3_tensorrt.py")


@pytest.fixture(autouse=True)
def keep_signal_handlers() -> Iterator[None]:
    """`command` sets handlers for the whole process: put pytest's back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
        (cli.float_list, "0.5, 0.5,-1", (0.5, 0.5, -1.0)),
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
        *((cli.positive_int, text) for text in ("", "0", "-1", "+1", "1.0", "1_0", "²", "٣")),
        *((cli.positive_float, text) for text in ("", "0", "-1", "nan", "inf", "1e999")),
        *((cli.int_list, text) for text in ("", "1,", "1,,2", "1;2", "1,0")),
        *((cli.float_list, text) for text in ("", "0.5,", "x", "1,nan", "inf")),
        *((cli.name_list, text) for text in ("", " , ")),
    ],
)
def test_bad_values(convert: Callable[[str], Any], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"not a|at least one"):
        convert(text)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("int", "did you mean int8"),
        ("FP32", "did you mean fp32?"),
        ("zzz", "choose from fp32, int8, compiled"),
    ],
)
def test_unknown_name_gets_a_hint(name: str, hint: str) -> None:
    cli.check_name("int8", ["fp32", "int8"], "candidate")
    with pytest.raises(UserError) as caught:
        cli.check_name(name, iter(["fp32", "int8", "compiled"]), "candidate")
    assert f"unknown candidate {name!r}" in str(caught.value)
    assert hint in str(caught.value)


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_command(capsys: pytest.CaptureFixture[str], number: signal.Signals) -> None:
    @cli.command
    def main(argv: Sequence[str] | None) -> int:
        try:
            signal.raise_signal(number)
        finally:
            print("cleaned up")
        return 0

    assert main() == 130
    assert capsys.readouterr() == ("cleaned up\n", "interrupted\n")
    assert script(["--quick"]) == 1  # the next command starts without it


class Interrupting:
    """Python prints what a destructor raises, and goes on."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("asks", [True, False])
def test_a_ctrl_c_that_was_swallowed_is_not_lost(
    capsys: pytest.CaptureFixture[str], asks: bool
) -> None:
    @cli.command
    def main(argv: Sequence[str] | None) -> int:
        cli.check_interrupt()
        Interrupting()
        print("swallowed")
        if asks:
            cli.check_interrupt()
            print("too late")
        return 0

    assert main() == 130
    assert capsys.readouterr() == ("swallowed\n", "interrupted\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (results.OutputError(28, "No space left", "a.csv"), 2, "error: a.csv: No space left"),
        (OSError(errno.ENAMETOOLONG, "too long", "b"), 2, "error: b: too long"),
    ],
)
def test_the_last_line_names_what_is_kept(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, error: BaseException, code: int, line: str
) -> None:
    @cli.command
    def main(argv: Sequence[str] | None) -> int:
        results.write_csv(tmp_path / "table.csv", [], ["name"])
        results.write_json(tmp_path / "environment.json", {})
        raise error

    for _ in range(2):  # a second run names its own files only
        assert main() == code
        kept = f"{tmp_path / 'table.csv'}, {tmp_path / 'environment.json'}"
        assert capsys.readouterr().err == f"{line}; kept: {kept}\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(5, "input/output"), SystemExit(3)])
def test_other_exceptions_propagate(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        raising(error)()
    assert caught.value is error


# --- where the scripts run ------------------------------------------------------------------------


def test_an_old_python_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "utils/__init__.py"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: Python 3.11 or newer is needed, and this is 3.10.4\n"


def test_windows_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(os, "fork")
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "utils/__init__.py"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: this runs on Linux and macOS; on Windows use WSL\n"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_asks_before_it_imports_what_may_be_absent(name: str) -> None:
    """An old Python must be able to read it that far, and then finds utils first."""
    tree = ast.parse((ROOT / name).read_text(), feature_version=(3, 8))
    first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert isinstance(first, ast.ImportFrom)
    assert first.module == "utils"
    ast.parse((ROOT / "utils/__init__.py").read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("script", [part1_quantize, part3_tensorrt], ids=lambda m: m.__name__)
def test_list_names_every_candidate(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(script.CANDIDATES)
    assert all(len(line) > 40 for line in lines)


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
    def refuse(**_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match=f"--output-dir {tmp_path}: Permission denied"):
        cli.make_output_dir(tmp_path)


def test_seed_everything() -> None:
    draws = []
    for _ in range(2):
        cli.seed_everything(7)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
