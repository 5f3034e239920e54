"""Part 1 from its command line: tables, candidates, bad input, interruption."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import part1_quantize
from utils import benchmark, evaluation
from utils.workers import UnavailableError, Worker, attempt

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--model", "vit_digits", "--dataset", "digits", "--batch-sizes", "4", "--rounds", "2"]
SMALL += ["--block-seconds", "0.01", "--num-images", "60", "--threads", "1", "--device", "cpu"]


def run_table(tmp_path: Path, *flags: str) -> tuple[int, pd.DataFrame]:
    code = part1_quantize.main([*SMALL, "--output-dir", str(tmp_path), *flags])
    (table,) = tmp_path.glob("*/quantization.csv")
    return code, pd.read_csv(table).set_index("candidate")


def test_quick_measures_everything_in_every_row(tmp_path: Path):
    code = part1_quantize.main(["--quick", "--rounds", "2", "--output-dir", str(tmp_path)])
    folder = tmp_path / "vit_digits"
    table = pd.read_csv(folder / "quantization.csv").set_index("candidate")
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
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["checkpoints"] == {"vit_digits.safetensors": card["sha256"]}
    assert (folder / "quantization.png").stat().st_size > 0


def test_a_row_for_each_batch_size_the_baseline_first_and_what_cannot_run_here(tmp_path: Path):
    flags = ["--candidates", "fp8-torchao-bf16,int8-eager", "--batch-sizes", "1,3", "--no-memory"]
    code, table = run_table(tmp_path, *flags)
    assert code == 0
    assert list(table.index) == ["fp32", "fp8-torchao-bf16", "int8-eager"] * 2
    assert list(table.batch_size) == [3, 3, 3, 1, 1, 1]
    assert list(table.status) == ["ok", "unavailable", "ok"] * 2
    assert (table.reason["fp8-torchao-bf16"] == "it does not run on cpu").all()
    assert (table.accuracy_batch_size.dropna() == 3).all()
    assert (table.top1_percent.notna() == (table.status == "ok")).all()
    assert table.peak_memory_mb.isna().all()


def test_untrained_model_has_latency_and_fidelity_but_no_accuracy(tmp_path: Path):
    code, table = run_table(tmp_path, "--candidates", "int8-eager", "--untrained", "--no-memory")
    assert code == 0
    assert table.top1_percent.isna().all()
    assert (table.latency_ms_median > 0).all()
    assert table.logit_cosine["fp32"] == 1
    assert 0.9 < table.logit_cosine["int8-eager"] < 1


def build_broken(*_: Any) -> benchmark.Variant:
    raise ValueError("no such kernel\nsecond line")


def build_missing(*_: Any) -> benchmark.Variant:
    raise UnavailableError("not installed")


def build_crashing(*_: Any) -> benchmark.Variant:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def build_slow(module: nn.Module, *_: Any) -> benchmark.Variant:
    def call(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.3)
        return module(x)

    return benchmark.Variant(call, 1)


def build_nan(module: nn.Module, *_: Any) -> benchmark.Variant:
    return benchmark.Variant(lambda x: module(x) * float("nan"), 1)


def build_unquantised(module: nn.Module, *_: Any) -> benchmark.Variant:
    return benchmark.Variant(module, 1, [(7, 7)])  # no layer of the model has that shape


def test_failing_candidates_become_rows_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bad = {
        "broken": (build_broken, "cpu"),
        "missing": (build_missing, "cpu"),
        "crashing": (build_crashing, "cpu"),
        "slow": (build_slow, "cpu"),
        "not-finite": (build_nan, "cpu"),
        "unquantised": (build_unquantised, "cpu"),
    }
    fp32 = {"fp32": part1_quantize.CANDIDATES["fp32"]}
    monkeypatch.setattr(benchmark, "MAX_SLOWDOWN", 4.0)
    monkeypatch.setattr(part1_quantize, "CANDIDATES", fp32 | bad)
    code, table = run_table(tmp_path, "--no-memory")
    assert code == 1
    assert table.status.to_dict() == {
        "fp32": "ok",
        "broken": "failed",
        "missing": "unavailable",
        "crashing": "unavailable",
        "slow": "ok",
        "not-finite": "failed",
        "unquantised": "unavailable",
    }
    assert table.reason["broken"] == "ValueError: no such kernel"
    assert table.reason["missing"] == "not installed"
    assert "not enough memory" in table.reason["crashing"]
    assert "not scored" in table.reason["slow"]
    assert "NaN" in table.reason["not-finite"]
    assert "nothing to quantise" in table.reason["unquantised"]
    assert table.latency_ms_median.notna().to_dict() == {
        name: name in ("fp32", "slow") for name in table.index
    }
    assert table.top1_percent.notna().sum() == 1


def test_a_baseline_that_cannot_run_is_a_users_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(part1_quantize, "CANDIDATES", {"fp32": (build_missing, "cpu")})
    assert part1_quantize.main([*SMALL, "--output-dir", str(tmp_path)]) == 2
    assert "fp32 did not run at batch size 4: not installed" in capsys.readouterr().err
    assert list(tmp_path.glob("*/[!.]*")) == []


# --- the routes, on a small network ---------------------------------------------------------------


class Subclass(nn.Linear):
    """As timm has one: the same arithmetic under another type."""


class Small(nn.Module):
    """A convolution, a linear layer, a subclass of one, and one whose weight a function gets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.hidden = nn.Linear(8, 8)
        self.by_function = nn.Linear(8, 8)
        self.head = Subclass(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.hidden(self.stem(images).mean((2, 3)).relu())
        return self.head(F.linear(x, self.by_function.weight, self.by_function.bias))


@pytest.fixture
def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval().requires_grad_(False)


def job_of(folder: Path) -> benchmark.Job:
    unused: Any = None
    return benchmark.Job(
        candidate="a candidate", build=unused, source=unused, device="cpu", folder=folder
    )


def test_eager_mode_quantises_subclasses_and_leaves_weights_that_functions_get(
    small: nn.Module, tmp_path: Path
):
    images = torch.rand(4, 3, 8, 8)
    expected = small(images)
    variant = part1_quantize.build_int8_eager(small, images, job_of(tmp_path))
    assert sorted(variant.quantized or []) == [(8, 8), (10, 8)]
    error = (variant.call(images) - expected).abs().max()
    assert 0 < error < 0.05


def test_pt2e_quantises_linear_layers_however_called_and_no_convolution(small: nn.Module):
    images = torch.rand(4, 3, 8, 8)
    converted = part1_quantize.convert_pt2e(small, images)
    assert sorted(part1_quantize.pt2e_int8_shapes(converted)) == [(8, 8), (8, 8), (10, 8)]
    constants = [*converted.parameters(), *converted.buffers()]
    kept = [tuple(value.shape) for value in constants if value.is_floating_point()]
    assert not {(8, 8), (10, 8)} & set(kept)  # the weights before they were quantised


class PreActivation(nn.Module):
    """A convolution whose output goes to a BatchNorm and to a sum, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        x = x + self.norm(x).relu()
        return self.head((self.twice(self.twice(x).relu())).mean((2, 3)))


def test_pt2e_leaves_convolutions_alone_that_others_use_or_that_are_called_twice():
    torch.manual_seed(0)
    network = PreActivation().eval().requires_grad_(False)
    state = network.state_dict()
    state["norm.running_mean"].normal_()
    state["norm.running_var"].mul_(0.05)
    images = torch.rand(4, 3, 8, 8)
    wanted = network(images)
    found = part1_quantize.convert_pt2e(network, images)(images)
    assert evaluation.centred_cosine(found, wanted) > 0.999


def test_onnx_runtime_quantises_every_product_with_a_weight(small: nn.Module, tmp_path: Path):
    images = torch.rand(4, 3, 8, 8)
    expected = small(images)
    variant = part1_quantize.build_onnx_int8(small, images, job_of(tmp_path))
    assert sorted(variant.quantized or []) == [(8, 8), (8, 8), (10, 8)]
    error = (torch.from_numpy(variant.call(images)) - expected).abs().max()
    assert 0 < error < 0.05


needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("nncf") is None, reason="openvino and nncf are not installed"
)


@needs_openvino
def test_openvino_quantises_and_says_what_it_was_calibrated_on(tmp_path: Path):
    flags = ["--candidates", "openvino-bf16,openvino-int8,openvino-int8-static", "--no-memory"]
    code, table = run_table(tmp_path, *flags)
    assert code == 0
    assert (table.status == "ok").all()
    int8 = table.loc[["openvino-int8", "openvino-int8-static"]]
    assert (int8.quantized_layers == int8.linear_layers).all()
    assert list(int8.quantized_convolutions > 0) == [False, True]
    assert list(table.calibration_images.notna()) == [False, False, False, True]
    assert ((table.logit_cosine.iloc[1:] > 0.99) & (table.logit_cosine.iloc[1:] < 1)).all()
    assert table.quantized_layers.isna().tolist() == [True, True, False, False]


def loaded_by_openvino(job: Any) -> list[str]:
    part1_quantize.build_openvino_int8(Small().eval(), torch.rand(1, 3, 8, 8), job)
    return [name for name in ("openvino", "nncf", "openvino_telemetry") if sys.modules.get(name)]


@needs_openvino
def test_openvino_runs_without_its_telemetry(tmp_path: Path):
    with Worker() as worker:
        assert worker.run(loaded_by_openvino, job_of(tmp_path)) == ["openvino", "nncf"]


@pytest.mark.parametrize("library", ["openvino", "nncf"])
def test_without_openvino_its_rows_are_unavailable(
    library: str, small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, library, None)
    build = part1_quantize.build_openvino_int8
    outcome = attempt(build, small, torch.rand(1, 3, 8, 8), job_of(tmp_path))
    assert outcome.status == "unavailable"
    assert library in outcome.reason


@pytest.mark.parametrize(
    ("machine", "vnni", "wanted"),
    [("x86_64", True, False), ("x86_64", False, True), ("aarch64", False, False)],
)
def test_only_x86_without_vnni_needs_7_bits(
    machine: str, vnni: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    assert part1_quantize.needs_7_bits() is wanted


def test_eager_mode_takes_the_engine_that_is_there():
    assert part1_quantize.pick_engine(["qnnpack", "none", "x86"]) == "x86"
    assert part1_quantize.pick_engine(["qnnpack", "none"]) == "qnnpack"
    with pytest.raises(UnavailableError, match="no engine"):
        part1_quantize.pick_engine(["none"])


def export_badly() -> None:
    with part1_quantize.exporting("the exporter"):
        try:
            raise KeyError("no such operator")
        except KeyError as error:
            raise RuntimeError("A banner\nof many lines") from error


def test_the_reason_why_an_exporter_failed_is_the_first_one():
    with pytest.raises(UnavailableError, match="model: 'no such operator'"):
        export_badly()


# --- the command line -----------------------------------------------------------------------------


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
        (["--mean", "red"], "list of numbers"),
        (["--checkpoint", "mine.pth"], "--checkpoint goes with"),
        (["--seed", "x"], "whole number from 0"),
        (["--seed", "-1"], "whole number from 0"),
        (["--device", "tpu"], "invalid choice"),
        (["--no-such-flag"], "unrecognized"),
        (["--dataset", "tiny-imagenet", "--data-dir", __file__], "no wnids.txt"),
        (["--dataset", "folder", "--data-dir", "/does/not/exist"], "no folder test or val"),
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


def test_profile_writes_a_table_and_a_trace_of_each_candidate(tmp_path: Path):
    code, _ = run_table(tmp_path, "--candidates", "fp32", "--no-memory", "--profile")
    assert code == 0
    path = tmp_path / "vit_digits" / "profile-fp32-batch4-threads1.json"
    assert "aten::linear" in path.with_suffix(".txt").read_text()
    events = json.loads(path.read_text())["traceEvents"]
    assert any(event.get("name") == "aten::linear" for event in events)


def test_two_checkpoints_of_one_name_have_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    weights = []
    for run in ("first", "second"):
        path = Path(run, "best.pth")
        path.parent.mkdir()
        torch.save(timm.create_model("test_vit", num_classes=10).state_dict(), path)
        flags = ["--model", "timm/test_vit", "--checkpoint", str(path), "--candidates", "fp32"]
        flags += ["--no-memory", "--output-dir", "results"]
        assert part1_quantize.main([*SMALL, *flags]) == 0
        folder = Path("results", f"timm-test_vit-{run}-best")
        assert pd.read_csv(folder / "quantization.csv").top1_percent.notna().all()
        weights.append(json.loads((folder / "environment.json").read_text())["checkpoints"])
    assert [list(files) for files in weights] == [["best.pth"], ["best.pth"]]
    assert weights[0] != weights[1]


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
    table = tmp_path / "vit_digits" / "quantization.csv"
    table.parent.mkdir()
    table.write_text("old\n")
    command = [sys.executable, "part1_quantize.py", *SMALL, "--rounds", "100000"]
    command += ["--candidates", "int8-eager"]
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
