"""Part 1 from its command line: tables, candidates, bad input, interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import part1_quantize
from utils import benchmark, cost
from utils.breakdown import BREAKDOWN_COLUMNS
from utils.isolation import UnavailableError, Worker, recorded

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--model", "vit_digits", "--dataset", "digits", "--batch-sizes", "4", "--rounds", "2"]
SMALL += ["--block-seconds", "0.01", "--num-images", "60", "--threads", "1", "--device", "cpu"]


def run_table(tmp_path: Path, *flags: str) -> tuple[int, pd.DataFrame]:
    code = part1_quantize.main([*SMALL, "--output-dir", str(tmp_path), *flags])
    return code, pd.read_csv(tmp_path / "quantization.csv").set_index("candidate")


def test_quick_measures_everything_in_every_row(tmp_path: Path):
    code = part1_quantize.main(["--quick", "--rounds", "2", "--output-dir", str(tmp_path)])
    table = pd.read_csv(tmp_path / "quantization.csv").set_index("candidate")
    assert code == 0
    assert tuple(table.reset_index()[list(part1_quantize.COLUMNS)]) == part1_quantize.COLUMNS
    assert list(table.index) == ["fp32", "int8-eager", "onnx-int8"]
    assert (table.status == "ok").all()
    assert (table.num_images == 360).all()
    card = json.loads((ROOT / "weights" / "vit_digits.json").read_text())
    assert table.top1_percent["fp32"] == pytest.approx(card["top1"], abs=0.01)
    assert (table.top1_percent > 95).all()
    assert (table.logit_cosine.drop("fp32") > 0.95).all()
    assert (table.logit_cosine.drop("fp32") < 1).all()
    assert (table.size_mb.drop("fp32") < 0.6 * table.size_mb["fp32"]).all()
    assert (table.quantized_macs_percent.drop("fp32") > 80).all()
    assert table.quantized_layers["int8-eager"] == table.linear_layers["int8-eager"]
    assert (table.peak_memory_mb > 100).all()
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["checkpoints"] == {"vit_digits.safetensors": card["sha256"]}


def test_baseline_always_runs_first_and_a_row_per_batch_size(tmp_path: Path):
    flags = ["--candidates", "int8-eager", "--batch-sizes", "1,3", "--no-memory"]
    code, table = run_table(tmp_path, *flags)
    assert code == 0
    assert list(table.index) == ["fp32", "int8-eager"] * 2
    assert list(table.batch_size) == [3, 3, 1, 1]
    assert (table.accuracy_batch_size == 3).all()
    assert table.peak_memory_mb.isna().all()


def test_untrained_model_has_latency_and_fidelity_but_no_accuracy(tmp_path: Path):
    code, table = run_table(tmp_path, "--candidates", "int8-eager", "--untrained", "--no-memory")
    assert code == 0
    assert table.top1_percent.isna().all()
    assert (table.latency_ms_median > 0).all()
    assert table.logit_cosine["fp32"] == 1
    assert 0.9 < table.logit_cosine["int8-eager"] < 1


def test_a_candidate_for_another_device_is_a_row(tmp_path: Path):
    flags = ["--candidates", "int8-eager,fp8-torchao-bf16", "--batch-sizes", "4"]
    code, table = run_table(tmp_path, *flags)
    assert code == 0
    assert list(table.index) == ["fp32", "int8-eager", "fp8-torchao-bf16"]
    assert table.status.tolist() == ["ok", "ok", "unavailable"]
    assert table.reason["fp8-torchao-bf16"] == "it does not run on cpu"
    assert table.peak_memory_mb.notna().tolist() == [True, True, False]


def test_the_baseline_is_scored_however_slow_it_may_be(tmp_path: Path):
    flags = ["--candidates", "int8-eager", "--max-slowdown", "0.001", "--no-memory"]
    code, table = run_table(tmp_path, *flags)
    assert code == 0
    assert table.top1_percent.notna().tolist() == [True, False]


def test_convolutional_net_gains_nothing_from_dynamic_quantisation(tmp_path: Path):
    flags = ["--model", "timm/resnet10t", "--untrained", "--candidates", "int8-eager"]
    code, table = run_table(tmp_path, *flags, "--batch-sizes", "1", "--no-memory")
    assert code == 0
    assert table.quantized_layers["int8-eager"] == 1
    assert table.quantized_macs_percent["int8-eager"] < 1


def build_broken(module: nn.Module, example: torch.Tensor, job: benchmark.Job) -> benchmark.Variant:
    raise ValueError("no such kernel\nsecond line")


def build_missing(
    module: nn.Module, example: torch.Tensor, job: benchmark.Job
) -> benchmark.Variant:
    raise UnavailableError("not installed")


def build_crashing(
    module: nn.Module, example: torch.Tensor, job: benchmark.Job
) -> benchmark.Variant:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def build_slow(module: nn.Module, example: torch.Tensor, job: benchmark.Job) -> benchmark.Variant:
    def call(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.3)
        return module(x)

    return benchmark.Variant(call, 1, [])


def build_nan(module: nn.Module, example: torch.Tensor, job: benchmark.Job) -> benchmark.Variant:
    return benchmark.Variant(lambda x: module(x) * float("nan"), 1, [])


def test_failing_candidates_become_rows_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bad = {
        "broken": (build_broken, "cpu"),
        "missing": (build_missing, "cpu"),
        "crashing": (build_crashing, "cpu"),
        "slow": (build_slow, "cpu"),
        "not-finite": (build_nan, "cpu"),
    }
    fp32 = {"fp32": part1_quantize.CANDIDATES["fp32"]}
    monkeypatch.setattr(part1_quantize, "CANDIDATES", fp32 | bad)
    code, table = run_table(tmp_path, "--no-memory", "--max-slowdown", "5")
    assert code == 1
    assert table.status.to_dict() == {
        "fp32": "ok",
        "broken": "failed",
        "missing": "unavailable",
        "crashing": "unavailable",
        "slow": "ok",
        "not-finite": "failed",
    }
    assert table.reason["broken"] == "ValueError: no such kernel"
    assert table.reason["missing"] == "not installed"
    assert "not enough memory" in table.reason["crashing"]
    assert "not scored" in table.reason["slow"]
    assert "NaN" in table.reason["not-finite"]
    assert table.latency_ms_median.notna().to_dict() == {
        name: name in ("fp32", "slow") for name in table.index
    }
    assert table.top1_percent.notna().sum() == 1


def test_worker_keeps_its_state_and_its_errors_come_back():
    with Worker() as worker:
        assert worker.run(os.getpid) != os.getpid()
        assert worker.run(os.getpid) == worker.run(os.getpid)
        with pytest.raises(ValueError, match="invalid literal"):
            worker.run(int, "x")


class UnpicklableError(Exception):
    """Survives no pickling: its arguments are not those of its constructor."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def raise_unpicklable() -> None:
    raise UnpicklableError("compiler", "failed")


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_worker_reports_errors_that_do_not_pickle_and_crashes():
    with Worker() as worker:
        with pytest.raises(RuntimeError, match="UnpicklableError: compiler failed"):
            worker.run(raise_unpicklable)
        assert worker.run(abs, -1) == 1
        with pytest.raises(RuntimeError, match=f"ended with {-signal.SIGSEGV}"):
            worker.run(crash)


def test_a_baseline_that_cannot_run_is_a_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(part1_quantize, "CANDIDATES", {"fp32": (build_missing, "cpu")})
    assert part1_quantize.main([*SMALL, "--output-dir", str(tmp_path)]) == 2
    assert "fp32 did not run at batch size 4: not installed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_recorded_lets_a_users_error_through():
    row: dict = {}
    with pytest.raises(part1_quantize.cli.UserError), recorded(row):
        raise part1_quantize.cli.UserError("mend this")
    assert row == {}


def test_attention_counts_as_two_products():
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    heads, tokens, width = 2, 5, 8
    counted = cost.count_cost(Attention(), torch.zeros(1, heads, tokens, width))
    assert counted.multiply_adds == 2 * heads * tokens**2 * width


def test_share_counts_layers_parameters_and_multiply_adds():
    module = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(4, 2))
    counted = cost.count_cost(module, torch.zeros(1, 8))
    share = cost.quantized_share(counted, [(16, 8), (4, 16), (99, 99)])
    parameters = 8 * 16 + 16 + 16 * 4 + 4 + 4 * 2 + 2
    assert share["quantized_layers"] == 2
    assert share["linear_layers"] == 3
    assert share["quantized_parameters_percent"] == pytest.approx(100 * 192 / parameters)
    assert share["quantized_macs_percent"] == pytest.approx(100 * 192 / 200)


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--model", "vit_digit"], "vit_digits"),
        (["--model", "dinov2_vitb14"], "dinov2_vitb14_lc"),
        (["--dataset", "digit"], "digits"),
        (["--candidates", "int8-eagre"], "int8-eager"),
        (["--candidates", ","], "at least one name"),
        (["--batch-sizes", "0"], "at least 1"),
        (["--batch-sizes", "361"], "has 360 images"),
        (["--batch-sizes", "1,x"], "at least 1"),
        (["--num-images", "361"], "has 360 images"),
        (["--threads", "0"], "at least 1"),
        (["--threads", "1000000"], "this machine has"),
        (["--rounds", "-1"], "at least 1"),
        (["--block-seconds", "nan"], "above 0"),
        (["--max-slowdown", "0"], "above 0"),
        (["--seed", "x"], "whole number from 0"),
        (["--seed", "-1"], "whole number from 0"),
        (["--device", "tpu"], "invalid choice"),
        (["--no-such-flag"], "unrecognized"),
        (["--dataset", "tiny-imagenet", "--data-dir", __file__], "no wnids.txt"),
        (["--dataset", "folder", "--data-dir", "/does/not/exist"], "no folder 'test'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    flags: list[str], hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = sorted(tmp_path.iterdir())
    arguments = [*SMALL, "--device", "cpu", "--output-dir", str(tmp_path), *flags]
    assert part1_quantize.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert hint in captured.err
    assert sorted(tmp_path.iterdir()) == before


def test_cuda_without_a_gpu_is_a_users_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert part1_quantize.main([*SMALL, "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: --device cuda")


def test_breakdown_of_a_gpu_is_a_users_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert part1_quantize.main([*SMALL, "--device", "cuda", "--breakdown"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: --breakdown profiles a CPU")
    assert errors.count("\n") == 1


def test_breakdown_has_rows_for_every_candidate_and_a_reason_where_it_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    names = ("fp32", "int8-eager", "onnx-int8")
    good = {name: part1_quantize.CANDIDATES[name] for name in names}
    missing = {"missing": (build_missing, "cpu")}
    monkeypatch.setattr(part1_quantize, "CANDIDATES", good | missing)
    code, _ = run_table(tmp_path, "--no-memory", "--breakdown")
    table = pd.read_csv(tmp_path / "breakdown.csv")
    assert code == 0
    assert tuple(table) == BREAKDOWN_COLUMNS
    assert list(table.candidate.unique()) == [*names, "missing"]
    (absent,) = table[table.candidate == "missing"].to_dict("records")
    assert (absent["status"], absent["reason"]) == ("unavailable", "not installed")
    assert absent["ms"] != absent["ms"]
    for _, rows in table[table.status == "ok"].groupby("candidate"):
        assert set(rows.group) >= {"linear", "attention", "convolution", "normalization", "other"}
        assert rows.group.is_unique
        assert (rows.ms > 0).all()
        assert rows.ms.sum() == pytest.approx(rows.profiled_ms.iloc[0])
        assert rows.share_percent.sum() == pytest.approx(100)
        assert (rows.latency_ms > 0).all()


def test_without_the_flag_there_is_no_breakdown(tmp_path: Path):
    assert run_table(tmp_path, "--candidates", "fp32", "--no-memory")[0] == 0
    assert not (tmp_path / "breakdown.csv").exists()


def test_unwritable_output_is_a_users_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    assert part1_quantize.main([*SMALL, "--output-dir", str(tmp_path / "file" / "x")]) == 2
    assert "cannot write to --output-dir" in capsys.readouterr().err


def no_process_left(group: int) -> bool:
    """Whether a process group is empty within ten seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_interrupt_keeps_the_old_table_and_leaves_no_process(tmp_path: Path):
    table = tmp_path / "quantization.csv"
    table.write_text("old\n")
    command = [sys.executable, "part1_quantize.py", *SMALL, "--rounds", "100000"]
    with subprocess.Popen(
        [*command, "--output-dir", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        while "built in" not in process.stdout.readline():
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in output + errors
    assert table.read_text() == "old\n"
    assert no_process_left(process.pid)
