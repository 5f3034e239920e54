"""What machine this is, and tables written so that a crash never leaves half a file."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from utils.files import replace_file

LIBRARIES = (
    "torch",
    "torchvision",
    "torchao",
    "timm",
    "optuna",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "pycuda",
    "cuda-bindings",
    "numpy",
)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write rows as CSV with exactly these columns: to a temporary name, then renamed.

    Raises:
        KeyError: a row has a column that the list does not.
    """
    rows = list(rows)
    if unknown := {key for row in rows for key in row} - set(columns):
        raise KeyError(f"columns not in the fixed list: {sorted(unknown)}")
    # dtype=object: an empty cell must not turn its column's whole numbers into floats.
    table = pd.DataFrame(rows, columns=list(columns), dtype=object)
    replace_file(path, table.to_csv(index=False).encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON: to a temporary name, then renamed."""
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def print_table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Print a compact table of chosen columns: {column: format spec such as `.2f`}."""
    cells = [{name: _format(row.get(name), spec) for name, spec in columns.items()} for row in rows]
    print(pd.DataFrame(cells, columns=list(columns)).to_string(index=False))


def _format(value: Any, spec: str) -> str:
    return "" if value is None or value != value else format(value, spec)


def environment(**extra: Any) -> dict[str, Any]:
    """CPU or GPU, driver, library versions, commit, command line and time."""
    return {
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _without_passwords(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "commit": _output_of(
            "git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"
        ),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_instruction_sets": _cpu_instruction_sets(),
        "cpu_cores": os.cpu_count(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpu_driver": _gpu_query("driver_version"),
        "gpu_max_sm_clock": _gpu_query("clocks.max.sm"),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
        **extra,
    }


def _without_passwords(text: str) -> str:
    return re.sub(r"(://[^:@/\s]*):[^@/\s]*@", r"\1:***@", text)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _gpu_query(field: str) -> str | None:
    if not torch.cuda.is_available():
        return None
    return _output_of("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0")


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor()


def _cpu_instruction_sets() -> str:
    """Those that decide how fast int8 and bf16 are; empty where /proc/cpuinfo is absent."""
    flags = _cpu_info("flags").split()
    wanted = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return " ".join(name for name in wanted if name in flags)


def _cpu_info(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
