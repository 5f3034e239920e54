"""What the command lines share: argument types, errors that a user can mend, Ctrl-C, exit codes.

Exit codes: 0 success, 1 a candidate failed unexpectedly, 2 a user's error (one line on stderr),
130 Ctrl-C or SIGTERM.
"""

import argparse
import contextlib
import difflib
import errno
import fcntl
import functools
import math
import os
import random
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch

from utils import results

_interrupted = threading.Event()  # a SIGINT or SIGTERM has come since the command started


class UserError(Exception):
    """Something the user can mend. Its text says in one line what is wrong and what to do."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


class Parser(argparse.ArgumentParser):
    """An argument parser that shows defaults and reports bad values as one `error: …` line."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse_quick(
    parser: Parser, argv: Sequence[str] | None, quick: Mapping[str, Any]
) -> argparse.Namespace:
    """Add `--quick` and parse: it changes the defaults to `quick`, and explicit flags still win."""
    what = "a small run on digits: under a minute, no network"
    parser.add_argument("--quick", action="store_true", help=what)
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**quick)
        args = parser.parse_args(argv)
    return args


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's line breaks and appends each flag's default, as one would type it.

    A flag without a value of its own says in its text what holds then.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {','.join(map(str, action.default))})"
        return super()._get_help_string(action)


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """Decorate a script's `main(argv) -> int` so that it ends with the exit codes above."""

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        results.written.clear()
        _interrupted.clear()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _interrupt)
        try:
            code = main(argv)
            check_interrupt()
            return code
        except UserError as error:
            message, code = f"error: {' '.join(str(error).split())}", 2
        except OSError as error:
            if not isinstance(error, results.OutputError) and error.errno != errno.ENAMETOOLONG:
                raise
            message, code = f"error: {error.filename}: {error.strerror}{_kept()}", 2
        except KeyboardInterrupt:
            message, code = f"interrupted{_kept()}", 130
        print(message, file=sys.stderr)
        return code

    return wrapper


def check_interrupt() -> None:
    """Raise KeyboardInterrupt if a SIGINT or SIGTERM has come since the command started.

    For loops that wait: a KeyboardInterrupt that the signal raised in a callback or a destructor
    is printed or swallowed there.
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    _interrupted.set()
    raise KeyboardInterrupt


def _kept() -> str:
    return "; kept: " + ", ".join(map(str, results.written)) if results.written else ""


def positive_int(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """Argument type: a whole number from 0 to 2**32 - 1, which every generator accepts."""
    if not text.isascii() or not text.isdigit() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def positive_float(text: str) -> float:
    """Argument type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def int_list(text: str) -> list[int]:
    """Argument type: comma-separated whole numbers of at least 1, in order, without repeats."""
    return list(dict.fromkeys(positive_int(part.strip()) for part in text.split(",")))


def float_list(text: str) -> tuple[float, ...]:
    """Argument type: comma-separated finite numbers, in order, repeats kept."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a comma-separated list of numbers")
    return values


def name_list(text: str) -> list[str]:
    """Argument type: comma-separated names, in order, without repeats."""
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise argparse.ArgumentTypeError("expected at least one name")
    return names


def check_name(name: str, known: Iterable[str], what: str) -> None:
    """UserError with the nearest known names unless `name` is one of them."""
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    few = [*known[:20], "…"] if len(known) > 20 else known  # timm alone has more than a thousand
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(few)}"
    raise UserError(f"unknown {what} {name!r}: {hint}")


def pick_device(name: str) -> torch.device:
    """Resolve `auto`, `cpu` or `cuda`; UserError when CUDA is asked for and absent."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: PyTorch finds no usable NVIDIA GPU; use --device cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def check_threads(threads: Iterable[int]) -> None:
    """UserError for more CPU threads than this machine has cores: a library may crash on them."""
    cores = os.cpu_count() or 1
    if (most := max(threads)) > cores:
        raise UserError(f"--threads {most}: this machine has {cores} cores")


def make_output_dir(path: Path, flag: str = "--output-dir") -> Path:
    """Create the folder that a flag names and prove that it can be written to, else UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {flag} {path}: {error.strerror}") from error
    return path


@contextlib.contextmanager
def hold(path: Path, remedy: str) -> Iterator[None]:
    """Hold a file for this command alone: the lock ends with its process, however that ends.

    Raises:
        UserError: another command holds it; the text ends with the remedy.
    """
    with path.open("a") as file:  # on NFS a lock needs a file that is open for writing
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{path} is in use by another run: wait for its end, or {remedy}"
            raise UserError(message) from error
        yield


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices). Some GPU kernels stay nondeterministic."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
