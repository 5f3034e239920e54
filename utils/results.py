"""Files that are whole or absent, the table at the end of a run, and what machine this is."""

import contextlib
import errno
import functools
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

Row = Mapping[str, Any]

WIDTH = 100  # columns of a terminal that a printed table keeps to
DASH = "\N{EN DASH}"
LIBRARIES = ["torch", "torchvision", "torchao", "timm", "optuna", "greenlet", "numpy", "onnx"]
LIBRARIES += ["onnxruntime", "onnxruntime-gpu", "openvino", "nncf", "pycuda", "cuda-bindings"]
# Those that decide how fast int8 and bf16 are, on x86 and on ARM.
INSTRUCTION_SETS = ["avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8"]
INSTRUCTION_SETS += ["amx_bf16", "asimddp", "i8mm", "bf16", "sve"]
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG)

written: list[Path] = []  # files of this run, for the line that says what is kept


class OutputError(OSError):
    """A file that cannot be written for a reason that the user can mend, such as a full disk."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; it takes the place of `path` if nothing goes wrong.

    Raises:
        OutputError: the disk is full, the folder is read-only, or the name is too long.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        # A write to an open file names none. Another file's error is the caller's.
        if error.errno in UNWRITABLE and error.filename in (None, str(temporary)):
            raise OutputError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; raises what `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    if path not in written:
        written.append(path)


def write_csv(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    """Write rows as CSV with exactly these columns, whole or not at all.

    Raises:
        KeyError: a row has a column that the list does not.
        OutputError: see `replacing`.
    """
    rows = list(rows)
    if unknown := {key for row in rows for key in row} - set(columns):
        raise KeyError(f"columns not in the fixed list: {sorted(unknown)}")
    # dtype=object: an empty cell must not turn its column's whole numbers into floats.
    table = pd.DataFrame(rows, columns=list(columns), dtype=object)
    replace_file(path, table.to_csv(index=False).encode())


def write_json(path: Path, content: Row) -> None:
    """Write indented JSON, whole or not at all; raises what `replacing` does."""
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def print_table(rows: Iterable[Row], columns: Mapping[str, tuple[str, str]]) -> None:
    """Print the rows that are ok as a table of at most WIDTH columns, and below it all reasons.

    Args:
        rows: those with a `status` other than ok appear below the table, with their `reason`.
        columns: {column: (its header, its format)}, the row's name first and the dispensable last:
            what does not fit is left out from the end, and a column without values always. A
            format is a format spec such as `.2f`, or `ratio`, which adds the spread that the
            columns `<column>_p10` and `<column>_p90` hold.
    """
    rows = list(rows)
    ok = [row for row in rows if row.get("status", "ok") == "ok"]
    columns_of_cells = [
        [header, *(_cell(row, name, spec) for row in ok)]
        for name, (header, spec) in columns.items()
    ]
    filled = [cells for cells in columns_of_cells if any(cells[1:])]
    widths = [max(len(cell) for cell in cells) for cells in filled]
    fitting = sum(end <= WIDTH + 1 for end in itertools.accumulate(width + 1 for width in widths))
    for name, *others in zip(*filled[:fitting], strict=True):
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=False)]
        print(" ".join([name.ljust(widths[0]), *padded]))
    if left_out := [cells[0] for cells in filled[fitting:]]:
        print(f"not shown for lack of width: {', '.join(left_out)}")
    _print_reasons(rows, name_column=next(iter(columns)))


def _print_reasons(rows: Iterable[Row], name_column: str) -> None:
    """A line for each status and reason, with the rows that share them; of ok rows it is a note."""
    sharing: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        status, reason = row.get("status", "ok"), row.get("reason") or ""
        if status != "ok" or reason:
            kind = "note" if status == "ok" else status
            sharing.setdefault((kind, reason), []).append(str(row[name_column]))
    for (kind, reason), names in sharing.items():
        text = f"{kind}: {', '.join(dict.fromkeys(names))}: {reason}"
        print(textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False))


def _cell(row: Row, column: str, spec: str) -> str:
    value = row.get(column)
    if value is None or value != value:
        return ""
    if spec == "ratio":
        return f"{value:.2f} ({row[f'{column}_p10']:.1f}{DASH}{row[f'{column}_p90']:.1f})"
    return format(value, spec)


def hide_passwords(text: str) -> str:
    """The text without user and password in the URLs of databases."""
    return re.sub(r"(?<=://)\S*(?=@)|(?<=password=)[^&\s]+", "***", text)


def environment(**extra: Any) -> dict[str, Any]:
    """CPU or GPU, driver, library versions, commit, command line and time."""
    gpu = torch.cuda.is_available()
    cpu = functools.partial(proc_value, "/proc/cpuinfo")
    cpu_flags = (cpu("flags") or cpu("Features")).split()  # x86, ARM
    driver_query = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"
    root = str(Path(__file__).parent)
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": hide_passwords(command),
        "commit": _output_of("git", "-C", root, "describe", "--always", "--dirty"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu("model name") or platform.processor(),
        "cpu_instruction_sets": " ".join(name for name in INSTRUCTION_SETS if name in cpu_flags),
        "cpu_cores": os.cpu_count(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "gpu_driver": _output_of(*driver_query) if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "libraries": _library_versions(),
        **extra,
    }


def _library_versions() -> dict[str, str]:
    found = {}
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[library] = version(library)
    with contextlib.suppress(ImportError, AttributeError):  # a folder of stubs has no version
        import tensorrt  # its distribution is tensorrt-cu12 or -cu13, or not one of pip's

        found["tensorrt"] = tensorrt.__version__
    return found


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def proc_value(path: str, key: str) -> str:
    """What follows the colon in the first line of a file that starts with a key, else nothing."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
