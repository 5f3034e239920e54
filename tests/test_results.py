"""Tables and JSON that are whole or absent, and the description of the machine."""

import csv
import json
import math
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from utils import results

COLUMNS = ("name", "threads", "latency_ms_median", "reason")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_exactly_these_columns_in_this_order(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    rows = [{"reason": "", "latency_ms_median": 1.25, "name": "fp32", "threads": 2}]
    results.write_csv(path, rows, COLUMNS)
    assert path.read_text() == "name,threads,latency_ms_median,reason\nfp32,2,1.25,\n"


def test_csv_empty_cells_leave_their_neighbours_alone(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "fp32", "threads": 2, "latency_ms_median": 0.1},
        {"name": "int8", "threads": None, "latency_ms_median": math.nan, "reason": None},
        {"name": "bf16", "threads": np.int64(4), "latency_ms_median": np.float64(0.2)},
    ]
    results.write_csv(tmp_path / "table.csv", rows, COLUMNS)
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[1:] == ["fp32,2,0.1,", "int8,,,", "bf16,4,0.2,"]  # 2, not 2.0


def test_csv_keeps_every_digit_and_quotes_what_needs_it(tmp_path: Path) -> None:
    reason = 'not installed: "tensorrt", see\nthe list'
    value = 0.1 + 0.2
    rows = [{"name": "fp32", "latency_ms_median": value, "reason": reason}]
    results.write_csv(tmp_path / "table.csv", iter(rows), COLUMNS)
    (row,) = read(tmp_path / "table.csv")
    assert row["reason"] == reason
    assert float(row["latency_ms_median"]) == value


def test_csv_without_rows_is_its_header(tmp_path: Path) -> None:
    results.write_csv(tmp_path / "table.csv", [], COLUMNS)
    assert (tmp_path / "table.csv").read_text() == ",".join(COLUMNS) + "\n"


def test_csv_unknown_column_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(KeyError, match="latency_s"):
        results.write_csv(path, [{"name": "fp32"}, {"latency_s": 1}], COLUMNS)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_csv_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    for name in ("first", "second"):
        results.write_csv(path, [{"name": name}], COLUMNS)
    assert [row["name"] for row in read(path)] == ["second"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("method", ["replace", "write_bytes"])
def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")

    def fail(self: Path, *_: object) -> None:
        with self.open("wb") as file:  # not by the method that fails
            file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, fail)
        with pytest.raises(OSError, match="No space left"):
            results.write_csv(path, [{"name": "fp32"}], COLUMNS)
        with pytest.raises(OSError, match="No space left"):
            results.write_json(path, {"name": "fp32"})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    path.write_text("{}")
    with pytest.raises(TypeError):
        results.write_json(path, {"path": Path()})
    assert path.read_text() == "{}"


def test_json_round_trip(tmp_path: Path) -> None:
    content = {"libraries": {"torch": "2"}, "gpu": None, "load": 0.5}
    results.write_json(tmp_path / "environment.json", content)
    text = (tmp_path / "environment.json").read_text()
    assert json.loads(text) == content
    assert text.endswith("}\n")


def test_environment_says_what_machine_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/part1_quantize.py", "--quick", "--seed", "3"])
    found = results.environment(model="vit_digits", commit="abc")
    assert {
        "time_utc",
        "command",
        "commit",
        "python",
        "system",
        "cpu",
        "cpu_instruction_sets",
        "cpu_cores",
        "load_average_1min",
        "gpu",
        "gpu_driver",
        "gpu_max_sm_clock",
        "cuda",
        "libraries",
        "model",
    } == set(found)
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == "part1_quantize.py --quick --seed 3"
    assert found["commit"] == "abc"  # what the caller knows better wins
    assert found["libraries"]["torch"] == version("torch")
    assert found["time_utc"].endswith("+00:00")
    assert None not in found["libraries"].values()


def test_environment_without_gpu_git_or_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("subprocess.run", fail)
    monkeypatch.setattr(Path, "read_text", fail)
    found = results.environment()
    assert [found[key] for key in ("gpu", "gpu_driver", "cuda", "commit")] == [None] * 4
    assert found["cpu_instruction_sets"] == ""


def test_print_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "fp32", "latency_ms_median": 1.256, "threads": 2},
        {"name": "int8", "latency_ms_median": None},
        {"name": "bf16", "latency_ms_median": math.nan},
    ]
    results.print_table(rows, {"name": "", "latency_ms_median": ".2f"})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [["name", "latency_ms_median"], ["fp32", "1.26"], ["int8"], ["bf16"]]
