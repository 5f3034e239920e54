"""Tables and JSON that are whole or absent, and the description of the machine."""

import csv
import errno
import json
import math
import os
import sys
import types
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


def test_csv_empty_cells_leave_their_neighbours_alone(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "fp32", "threads": 2, "latency_ms_median": 0.1},
        {"name": "int8", "threads": None, "latency_ms_median": math.nan, "reason": None},
        {"name": "bf16", "threads": np.int64(4), "latency_ms_median": np.float64(0.2)},
    ]
    results.write_csv(tmp_path / "table.csv", rows, COLUMNS)
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines == [",".join(COLUMNS), "fp32,2,0.1,", "int8,,,", "bf16,4,0.2,"]  # 2, not 2.0


def test_csv_keeps_every_digit_and_quotes_what_needs_it(tmp_path: Path) -> None:
    reason = 'not installed: "tensorrt", see\nthe list'
    value = 0.1 + 0.2
    rows = [{"name": "fp32", "latency_ms_median": value, "reason": reason}]
    results.write_csv(tmp_path / "table.csv", iter(rows), COLUMNS)
    (row,) = read(tmp_path / "table.csv")
    assert row["reason"] == reason
    assert float(row["latency_ms_median"]) == value


def test_csv_unknown_column_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(KeyError, match="latency_s"):
        results.write_csv(path, [{"name": "fp32"}, {"latency_s": 1}], COLUMNS)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("method", ["replace", "write_bytes"])
@pytest.mark.parametrize(("number", "mendable"), [(errno.ENOSPC, True), (errno.EIO, False)])
def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, number: int, mendable: bool
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")

    def fail(self: Path, *_: object) -> None:
        with self.open("wb") as file:  # not by the method that fails
            file.write(b"half")
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, fail)
        for write in (
            lambda: results.write_csv(path, [{"name": "fp32"}], COLUMNS),
            lambda: results.write_json(path, {"name": "fp32"}),
        ):
            with pytest.raises(OSError, match=os.strerror(number)) as caught:
                write()
            assert isinstance(caught.value, results.OutputError) is mendable
            assert caught.value.filename == (str(path) if mendable else None)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_too_long_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(results.OutputError, match="File name too long"):
        results.write_json(tmp_path / ("x" * 300), {})


def test_an_error_of_another_file_stays_what_it_is(tmp_path: Path) -> None:
    with (
        pytest.raises(PermissionError) as caught,
        results.replacing(tmp_path / "copy.csv"),
    ):
        raise PermissionError(errno.EACCES, "Permission denied", "an/input.csv")
    assert not isinstance(caught.value, results.OutputError)


def test_what_was_written_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "written", [])
    for _ in range(2):
        results.write_csv(tmp_path / "table.csv", [], COLUMNS)
    results.write_json(tmp_path / "environment.json", {})
    assert results.written == [tmp_path / "table.csv", tmp_path / "environment.json"]


def test_json_round_trip(tmp_path: Path) -> None:
    content = {"libraries": {"torch": "2"}, "gpu": None, "load": 0.5}
    results.write_json(tmp_path / "environment.json", content)
    text = (tmp_path / "environment.json").read_text()
    assert json.loads(text) == content
    assert text.endswith("}\n")


def test_environment_says_what_machine_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = "postgresql://me:secret@host/db"
    monkeypatch.setattr(sys, "argv", ["/somewhere/part2_tune.py", "--storage", storage])
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
        "cuda",
        "libraries",
        "model",
    } == set(found)
    assert json.loads(json.dumps(found)) == found
    assert found["command"] == "part2_tune.py --storage postgresql://***@host/db"
    assert found["commit"] == "abc"  # what the caller knows better wins
    assert found["libraries"]["torch"] == version("torch")
    assert found["time_utc"].endswith("+00:00")
    assert None not in found["libraries"].values()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("x://host:80/a?user=b&password=c&d=e", "x://host:80/a?user=b&password=***&d=e"),
        ("x://me:a/b@c@host/d and more", "x://***@host/d and more"),
        ("x://host/d", "x://host/d"),
    ],
)
def test_passwords_are_hidden(url: str, shown: str) -> None:
    assert results.hide_passwords(url) == shown


def test_environment_without_gpu_git_or_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("subprocess.run", fail)
    monkeypatch.setattr(Path, "read_text", fail)
    found = results.environment()
    assert [found[key] for key in ("gpu", "gpu_driver", "cuda", "commit")] == [None] * 4
    assert found["cpu_instruction_sets"] == ""


def test_tensorrt_is_asked_for_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", module)  # like a folder of stubs
    assert "tensorrt" not in results.environment()["libraries"]
    module.__dict__.update(__version__="10.14.1")
    assert results.environment()["libraries"]["tensorrt"] == "10.14.1"


SHOWN = {
    "name": ("candidate", "s"),
    "batch_size": ("batch", "d"),
    "latency_ms_median": ("ms", ".2f"),
    "speedup": ("speedup", "ratio"),
    "top1_percent": ("top-1", ".2f"),
}


def measured(name: str, batch_size: int = 1, **more: Any) -> dict[str, Any]:
    speedup = {"speedup": 1.3249, "speedup_p10": 0.94, "speedup_p90": 1.66}
    row = {"name": name, "batch_size": batch_size, "status": "ok", "latency_ms_median": 12.345}
    return row | speedup | more


def test_table_has_short_headers_and_no_empty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [measured("fp32", top1_percent=None), measured("int8-eager", 32, top1_percent=math.nan)]
    results.print_table(rows, SHOWN)
    assert capsys.readouterr().out.splitlines() == [
        "candidate  batch    ms        speedup",
        "fp32           1 12.35 1.32 (0.9\N{EN DASH}1.7)",
        "int8-eager    32 12.35 1.32 (0.9\N{EN DASH}1.7)",
    ]


def test_reasons_are_grouped_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    absent = {"status": "unavailable", "reason": "it does not run on cpu"}
    rows = [
        measured("fp32"),
        {"name": "tf32", **absent},
        {"name": "fp8", **absent},
        {"name": "tf32", **absent, "batch_size": 32},
        measured("int8", reason="not scored: 5 times slower than fp32"),
        {"name": "bf16", "status": "failed", "reason": "RuntimeError: " + "a long reason, " * 9},
    ]
    results.print_table(rows, SHOWN)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["candidate", "fp32", "int8"]
    assert lines[3] == "unavailable: tf32, fp8: it does not run on cpu"
    assert lines[4] == "note: int8: not scored: 5 times slower than fp32"
    assert " ".join(lines[5:]).startswith("failed: bf16: RuntimeError: a long reason, a long")
    assert max(map(len, lines)) <= results.WIDTH


def test_nothing_ran(capsys: pytest.CaptureFixture[str]) -> None:
    results.print_table([{"name": "fp8", "status": "unavailable", "reason": "no GPU"}], SHOWN)
    assert capsys.readouterr().out == "unavailable: fp8: no GPU\n"


def test_what_does_not_fit_is_left_out_from_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    more = {f"extra{i}": (f"a header {i}", ".3f") for i in range(9)}
    values: dict[str, Any] = dict.fromkeys(more, 123456.0)
    rows = [measured(f"a-candidate-number-{i}", **values) for i in range(18)]
    results.print_table(rows, SHOWN | more)
    *table, cut = capsys.readouterr().out.splitlines()
    assert len(table) == 19
    assert {len(line) for line in table} == {92}  # one more column would make 103
    assert cut == "not shown for lack of width: " + ", ".join(f"a header {i}" for i in range(4, 9))
