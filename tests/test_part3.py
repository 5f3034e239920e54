"""Part 3 from its command line: graphs, tables, reasons, bad input; candidates on stand-ins."""

import gc
import json
import shutil
import sys
import types
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import part3_tensorrt as part3
from tests import tensorrt_standin as standin
from tests.test_training import fake_cuda_graphs
from utils import benchmark, data, onnx_graphs, onnx_tools, timing
from utils.isolation import UnavailableError, recorded
from utils.models import LoadedModel, load_model

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--model", "vit_digits", "--batch-sizes", "4", "--rounds", "2", "--device", "cpu"]
SMALL += ["--block-seconds", "0.01", "--num-images", "60", "--threads", "1"]
ON_GPU = [name for name, candidate in part3.CANDIDATES.items() if candidate.device == "cuda"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a `--quick` run."""
    folder = tmp_path_factory.mktemp("quick")
    assert part3.main(["--quick", "--rounds", "2", "--output-dir", str(folder)]) == 0
    return folder


def test_quick_writes_and_checks_every_graph(quick: Path):
    graphs = pd.read_csv(quick / "graphs.csv").set_index("graph")
    columns = onnx_graphs.GRAPH_FILE_COLUMNS
    assert tuple(graphs.reset_index()[list(columns)]) == columns
    assert list(graphs.index) == list(onnx_graphs.GRAPHS)
    assert (graphs.status == "ok").all()
    assert (graphs.onnx_opset == 20).all()
    assert all(Path(file).is_file() for file in graphs.file)
    for name, row in graphs.iterrows():
        assert row.parity_cosine >= onnx_graphs.GATES[onnx_graphs.GRAPHS[str(name)][0]]
    assert graphs.parity_cosine["fp32"] > graphs.parity_cosine["int8"]
    assert graphs.size_mb["fp16"] < 0.6 * graphs.size_mb["fp32"]
    counts = graphs.quantized_weights.dropna()
    assert counts[counts.index.str.startswith("int8")].eq(19).all()
    assert counts[counts.index.str.startswith("fp8")].eq(18).all()  # a convolution of 16 channels
    attention = graphs.quantized_activations["int8-attention"]
    assert attention == graphs.quantized_activations["int8"] + 16
    assert (graphs.calibration_images.dropna() == onnx_graphs.CALIBRATION_IMAGES).all()


def test_quick_compares_on_the_cpu_and_says_why_the_rest_is_missing(quick: Path):
    table = pd.read_csv(quick / "tensorrt.csv")
    assert tuple(table[list(part3.COLUMNS)]) == part3.COLUMNS
    assert len(table) == 2 * len(part3.CANDIDATES)
    ran = table[table.status == "ok"]
    assert list(ran.candidate) == ["torch-cpu", "onnxruntime-cpu"] * 2
    assert list(ran.batch_size) == [16, 16, 1, 1]
    assert (ran.latency_ms_median > 0).all()
    assert (ran.parity_cosine > 0.9999).all()
    card = json.loads((ROOT / "weights" / "vit_digits.json").read_text())
    assert ran.top1_percent.tolist() == pytest.approx([card["top1"]] * 4, abs=0.01)
    assert ran.speedup_over_graph.isna().all()  # there is no CUDA graph on a CPU
    missing = table[table.status == "unavailable"]
    assert set(missing.candidate) == set(ON_GPU)
    assert set(missing.reason) == {"no NVIDIA GPU is in use"}
    assert missing.latency_ms_median.isna().all()
    environment = json.loads((quick / "environment.json").read_text())
    assert environment["checkpoints"] == {"vit_digits.safetensors": card["sha256"]}


def test_export_only_measures_nothing(tmp_path: Path):
    flags = ["--export-only", "--candidates", "tensorrt-int8", "--output-dir", str(tmp_path)]
    engines = tmp_path / "elsewhere"
    assert part3.main([*SMALL, *flags, "--engine-dir", str(engines)]) == 0
    assert not (tmp_path / "tensorrt.csv").exists()
    files = {path.name for path in engines.iterdir()}
    assert files == {"vit_digits-fp16.onnx", "vit_digits-int8.onnx"}
    assert list(pd.read_csv(tmp_path / "graphs.csv").graph) == ["fp16", "int8"]


class BadModel(nn.Module):
    """A module whose graph cannot be exported: what it does depends on the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([image.mean() + torch.zeros(10) for image in x if image.sum() > 0])


def load_bad(name: str, untrained: bool = False) -> LoadedModel:
    return replace(load_model("vit_digits"), module=BadModel().eval())


def make_export_job(folder: Path, **changes: Any) -> part3.EngineJob:
    settings: dict[str, Any] = {
        "candidate": "",
        "build": part3.build_eager,
        "model": "vit_digits",
        "untrained": False,
        "batch_size": 4,
        "device": "cpu",
        "threads": 1,
        "seed": 0,
        "folder": str(folder),
        "load": part3.load_trained,
        "batch_sizes": (1, 4),
    }
    return part3.EngineJob(**settings | changes)


def test_failed_export_is_a_row_and_leaves_no_older_graph(tmp_path: Path):
    older = onnx_graphs.graph_path(tmp_path, "vit_digits", "fp16")
    older.write_text("older")
    beside = older.with_name(f"{older.name}.data")
    beside.write_text("its weights")
    job = make_export_job(tmp_path, load=load_bad)
    images = data.load_images("digits", "test").images[:3].numpy()
    rows = onnx_graphs.export_graphs(["fp16", "int8"], job, images, images)
    assert rows["fp16"]["status"] == "failed"
    assert not older.exists()
    assert not beside.exists()
    assert rows["int8"]["status"] == "unavailable"
    assert "starts from the fp16 graph" in rows["int8"]["reason"]
    missing = part3.why_missing("tensorrt-fp16", "cuda", rows)
    assert missing["status"] == "failed"
    assert missing["reason"].startswith("no fp16 graph: ")
    assert part3.why_missing("torch-fp16", "cuda", rows) == {}


def load_nan(name: str, untrained: bool = False) -> LoadedModel:
    model = load_model("vit_digits")
    model.module.get_parameter("blocks.0.mlp.fc1.weight")[0, 0] = torch.nan
    return model


def test_nan_weight_fails_the_check_with_its_numbers(tmp_path: Path):
    job = make_export_job(tmp_path, load=load_nan)
    images = data.load_images("digits", "test").images[:3].numpy()
    rows = onnx_graphs.export_graphs(["fp32"], job, None, images)
    assert rows["fp32"]["status"] == "failed"
    assert rows["fp32"]["reason"].startswith("ParityError: cosine nan")
    assert np.isnan(rows["fp32"]["parity_cosine"])
    assert rows["fp32"]["nodes"] > 0


def test_without_training_images_8_bits_are_unavailable(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    for path in (image_folder / "train").rglob("*.png"):
        path.unlink()
    flags = ["--dataset", "folder", "--data-dir", str(image_folder), "--batch-sizes", "2"]
    arguments = [flag for flag in SMALL if flag not in ("--num-images", "60")]
    wanted = ["--candidates", "tensorrt-int8", "--export-only", "--output-dir", str(tmp_path)]
    assert part3.main([*arguments, *flags, *wanted]) == 0
    graphs = pd.read_csv(tmp_path / "graphs.csv").set_index("graph")
    assert graphs.status.to_dict() == {"fp16": "ok", "int8": "unavailable"}
    assert "no training images" in graphs.reason["int8"]


def test_calibration_never_touches_scored_images():
    asked = []

    def load(split: str, num_images: int, seed: int, fewer: bool) -> data.ImageSet:
        asked.append((split, fewer))
        images = data.load_images("digits", split)
        # As in CIFAR-100, where ten images occur in both splits.
        images.images[:700] = scored.images.repeat(2, 1, 1, 1)[:700]
        return data.take_subset(images, num_images, seed)

    scored = data.load_images("digits", "test")
    calibration = onnx_graphs.load_calibration(load, scored, seed=0)
    assert asked == [("train", True)]
    assert calibration is not None
    assert 50 < len(calibration) < onnx_graphs.CALIBRATION_IMAGES
    seen = {image.tobytes() for image in scored.images.numpy()}
    assert not seen & {image.tobytes() for image in calibration}


def test_training_images_that_are_all_scored_calibrate_nothing(capsys: pytest.CaptureFixture[str]):
    scored = data.load_images("digits", "test")
    assert onnx_graphs.load_calibration(lambda **_: scored, scored, seed=0) is None
    assert "note: no images to calibrate int8 and fp8 on" in capsys.readouterr().out


def test_random_weights_are_gated_only_where_that_tells_something():
    for precision, cosine in {"int8": 0.2, "fp8": -0.5, "fp16": 0.9999}.items():
        onnx_graphs.require_parity({"parity_cosine": cosine}, precision, untrained=True)
    for precision, cosine in {"int8": np.nan, "fp16": 0.99, "tf32": 0.5}.items():
        with pytest.raises(onnx_graphs.ParityError):
            onnx_graphs.require_parity({"parity_cosine": cosine}, precision, untrained=True)
    with pytest.raises(onnx_graphs.ParityError):
        onnx_graphs.require_parity({"parity_cosine": 0.2}, "int8")


def test_graphs_are_those_that_the_candidates_read():
    assert part3.choose_onnx_graphs(["torch-fp32"]) == []
    assert part3.choose_onnx_graphs(["tensorrt-tf32", "onnxruntime-cuda"]) == ["fp32"]
    assert part3.choose_onnx_graphs(["tensorrt-fp8"]) == ["fp16", "fp8"]


def test_candidates_of_a_gpu_run_bring_their_baselines():
    names = part3.choose_candidates(["tensorrt-int8", "torch-fp32"], "cuda")
    assert names == ["torch-fp32", "torch-fp32-graph", "torch-fp16-graph", "tensorrt-int8"]
    assert part3.choose_candidates(["tensorrt-tf32"], "cuda") == [
        *("torch-fp32", "torch-fp32-graph", "torch-tf32-graph", "tensorrt-tf32"),
    ]
    assert part3.choose_candidates(["tensorrt-int8"], "cpu") == ["torch-cpu", "tensorrt-int8"]
    assert part3.choose_candidates(None, "cuda") == ON_GPU
    assert part3.choose_candidates(None, "cpu") == list(part3.CANDIDATES)


def test_every_candidate_is_compared_with_the_graph_of_its_precision():
    second = part3.cuda_graph_baselines(ON_GPU, "cuda")
    assert part3.cuda_graph_baselines(ON_GPU, "cpu") == {}
    for name, graph in second.items():
        own, other = part3.CANDIDATES[name].precision, part3.CANDIDATES[graph].precision
        assert graph == f"torch-{other}-graph"
        assert other == {"int8": "fp16", "fp8": "fp16"}.get(own, own)


def test_candidate_for_another_device_says_so():
    why = part3.why_missing("torch-cpu", "cuda", {})
    assert why == {"status": "unavailable", "reason": "it runs with --device cpu"}


# --- candidates that this machine lacks -----------------------------------------------------------


def test_failed_parity_is_a_row_with_its_numbers_and_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(onnx_graphs.GATES, "fp32", 1.1)
    job = make_export_job(tmp_path)
    few = data.load_images("digits", "test").images[:3].numpy()
    onnx_graphs.export_graphs(["fp32"], job, None, few)
    monkeypatch.undo()
    images = data.load_images("digits", "test").images[:16]
    check = part3.parity_check(load_model("vit_digits"), images)
    strict = part3.CANDIDATES["onnxruntime-cpu"]
    monkeypatch.setitem(part3.CANDIDATES, "onnxruntime-cpu", replace(strict, precision="strict"))
    monkeypatch.setitem(onnx_graphs.GATES, "strict", 1.1)
    jobs = [part3.make_job(name, job) for name in ("torch-cpu", "onnxruntime-cpu")]
    rows, _ = benchmark.measure_setting(jobs, images, None, 2, 0.01, 10.0, check=check)
    assert rows["torch-cpu"]["status"] == "ok"
    assert rows["torch-cpu"]["parity_images"] == 16
    failed = rows["onnxruntime-cpu"]
    assert failed["status"] == "failed"
    assert failed["reason"].startswith("ParityError: cosine 1.0")
    assert failed["parity_cosine"] > 0.9999
    assert failed["parity_max_difference"] > 0
    assert failed["build_seconds"] > 0
    assert "latency_ms_median" not in failed


@pytest.fixture(scope="module")
def exported_half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "vit_digits-fp16.onnx"
    module = onnx_tools.HalfPrecision(load_model("vit_digits").module)
    onnx_tools.write_onnx(module, torch.zeros(1, 3, 32, 32), path)
    return path


@pytest.fixture
def half_graph(exported_half: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(exported_half, tmp_path))


def build_without_transfers(module: nn.Module, example: Tensor, job: Any) -> benchmark.Variant:
    """A candidate that cannot be timed with transfers."""
    setattr(torch.Tensor, "pin_memory", lambda x: x)  # noqa: B010 (in its worker alone)

    def fail(x: Tensor) -> Tensor:
        raise ValueError("no way back")

    return benchmark.Variant(module, 1, [], host_call=fail)


def test_failure_with_transfers_keeps_the_compute_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    job = make_export_job(tmp_path, build=build_without_transfers)
    jobs = [replace(job, candidate=name) for name in ("first", "second")]
    images = data.load_images("digits", "test").images[:8]
    rows, _ = benchmark.measure_setting(
        jobs,
        images,
        None,
        rounds=2,
        block_seconds=0.01,
        max_slowdown=10.0,
        second_baselines={"first": "second", "second": "third"},
        transfers=True,
    )
    for row in rows.values():
        assert row["status"] == "ok"
        assert row["speedup"] > 0
        assert row["reason"] == "transfers not measured: ValueError: no way back"
        assert not set(benchmark.TRANSFER_COLUMNS) & set(row)
    assert rows["first"]["graph_baseline"] == "second"
    assert rows["first"]["speedup_over_graph"] > 0
    assert "speedup_over_graph" not in rows["second"]
    notes = capsys.readouterr().out
    assert "note: there are no times with transfers: " in notes
    assert "note: there is no speedup over third: it was not chosen" in notes


def test_failed_export_sets_the_exit_code_of_a_measuring_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    failed = {"graph": "fp16", "status": "failed", "reason": "it did not work"}
    monkeypatch.setattr(part3, "export_graphs", lambda *_: {"fp16": failed})
    flags = ["--candidates", "tensorrt-fp16", "--output-dir", str(tmp_path)]
    assert part3.main([*SMALL, *flags]) == 1
    table = pd.read_csv(tmp_path / "tensorrt.csv").set_index("candidate")
    assert table.status.to_dict() == {"torch-cpu": "ok", "tensorrt-fp16": "unavailable"}


def test_environment_belongs_to_the_table_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: Any, **settings: Any) -> None:
        raise part3.cli.UserError("the baseline did not run")

    monkeypatch.setattr(part3, "measure_setting", fail)
    (tmp_path / "environment.json").write_text("of the run before")
    flags = ["--candidates", "torch-cpu", "--output-dir", str(tmp_path)]
    assert part3.main([*SMALL, *flags]) == 2
    assert (tmp_path / "environment.json").read_text() == "of the run before"


def test_rows_join_what_is_known_of_a_candidate():
    found: dict[str, dict[str, Any]] = {
        "torch-cpu": {"status": "ok", "latency_ms_median": 1.0, "reason": "slow", "other": 1},
        "tensorrt-fp16": {"status": "failed", "reason": "it crashed"},
    }
    scores = {"tensorrt-fp16": {"top1_percent": 50.0}}
    first, second = part3.make_rows(found, scores, {"batch_size": 8})
    assert first["reason"] == "slow; not scored at the largest batch size"
    assert "other" not in first
    about = {"batch_size": 8, "candidate": "tensorrt-fp16", "precision": "fp16"}
    assert second == about | {"status": "failed", "reason": "it crashed"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_pytorch_runs_in_the_layout_of_its_device(precision: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(part3, "memory_format", lambda device: torch.channels_last)
    seen: list[Tensor] = []
    module = nn.Conv2d(3, 8, 3).eval().requires_grad_(False)
    module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(2, 3, 8, 8)
    expected = module(x)
    call = part3.prepare(module, x, precision)
    seen.clear()
    y = call(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0.01, atol=0.01)
    for tensor in (*seen, module.weight):
        assert tensor.dtype == (torch.float16 if precision == "fp16" else torch.float32)
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_graph_candidate_keeps_the_weights_that_its_graph_reads(monkeypatch: pytest.MonkeyPatch):
    fake_cuda_graphs(monkeypatch)
    module = nn.Conv2d(3, 8, 3).eval().requires_grad_(False)
    alive = weakref.ref(module)
    x = torch.rand(2, 3, 8, 8)
    expected = module(x)
    variant = part3.build_graph(module, x, types.SimpleNamespace(precision="fp32"))
    del module
    gc.collect()
    assert alive() is not None
    assert variant.uploads
    torch.testing.assert_close(variant.call(x), expected)


@pytest.mark.parametrize("uploads", [True, False])
def test_images_from_the_host_are_copied_once(uploads: bool, monkeypatch: pytest.MonkeyPatch):
    empty, seen = torch.empty, list[Tensor]()
    monkeypatch.setattr(torch, "empty", lambda shape, pin_memory: empty(shape))

    def call(x: Tensor) -> Tensor:
        seen.append(x)
        return x.mean(dim=(2, 3))

    first, second = torch.rand(2, 4, 3, 8, 8)
    variant = benchmark.Variant(call, 1, [], uploads=uploads)
    host_call = benchmark.round_trip(variant, first)
    torch.testing.assert_close(host_call(second), second.mean(dim=(2, 3)))
    assert (seen[-1] is second) == uploads


def test_workers_let_cudnn_choose_and_leave_unused_weights_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch, "set_grad_enabled", lambda _: None)
    job = make_export_job(tmp_path)
    benchmark.prepare_process(replace(job, threads=torch.get_num_threads()))
    assert torch.backends.cudnn.benchmark is True
    assert part3.make_job("torch-fp16", job).needs_module is True
    assert part3.make_job("tensorrt-fp16", job).needs_module is False


def stand_in(monkeypatch: pytest.MonkeyPatch) -> standin.Gpu:
    """Stand-ins for the GPU's libraries, and for the two places where PyTorch meets them."""

    def join_stream(runner: Any) -> Tensor:
        interface = runner.device_logits.__cuda_array_interface__
        return torch.from_numpy(standin.as_array(interface["data"][0], interface["shape"]))

    monkeypatch.setattr(part3, "join_stream", join_stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(part3, "_opened", part3.contextlib.ExitStack())
    return standin.install(monkeypatch)


def test_tensorrt_candidate_serves_both_kinds_of_calls(
    half_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    gpu = stand_in(monkeypatch)
    model = load_model("vit_digits")
    x = data.preprocess(data.load_images("digits", "test").images[:4], model.preprocessing)
    expected = model.module(x)
    job = part3.make_job("tensorrt-fp16", make_export_job(tmp_path))
    made = part3.make_engine(job)
    assert made["engine_cached"] is False
    assert made["engine_build_seconds"] > 0
    variant = part3.build_tensorrt(model.module, x, job)
    assert gpu.builds == 1
    allocated = gpu.allocations
    torch.testing.assert_close(variant.call(x), expected, rtol=0.02, atol=0.02)
    assert variant.host_call is not None
    np.testing.assert_array_equal(variant.host_call(x), variant.call(x))
    assert gpu.allocations == allocated
    assert variant.columns["cuda_graph"] is True
    (plan,) = tmp_path.glob("*.plan")
    assert variant.size_bytes == plan.stat().st_size
    block = timing.time_block(variant.call, [x, x], 3)
    assert len(block.latencies_ms) == 3
    part3._opened.close()
    assert gpu.live == {}


class WorkerHere(part3.contextlib.nullcontext):
    """Runs in this process, where the stand-ins are."""

    def __enter__(self) -> "WorkerHere":
        return self

    def run(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)


def test_engines_are_made_before_anything_is_measured(
    half_graph: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    gpu = stand_in(monkeypatch)
    monkeypatch.setattr(part3, "Worker", WorkerHere)
    names = ["tensorrt-fp16", "tensorrt-fp8"]
    jobs = [part3.make_job(name, make_export_job(tmp_path)) for name in names]
    rows = part3.make_engines(jobs)
    assert rows["tensorrt-fp16"]["engine_cached"] is False
    assert rows["tensorrt-fp8"]["status"] == "unavailable"
    again = part3.make_engines(jobs)
    assert again["tensorrt-fp16"]["engine_cached"] is True
    assert gpu.builds == 1
    assert (gpu.live, gpu.current) == ({}, [])
    assert capsys.readouterr().out.count("kept") == 1


def test_engine_without_cuda_bindings_says_how_it_runs(
    half_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_in(monkeypatch)
    monkeypatch.delattr("cuda.bindings.driver")
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    x = torch.zeros(4, 3, 32, 32)
    job = part3.make_job("tensorrt-fp16", make_export_job(tmp_path))
    variant = part3.build_tensorrt(nn.Identity(), x, job)
    assert variant.columns["cuda_graph"] is False
    assert variant.columns["reason"].startswith("it runs as with --no-cuda-graph: cuda-bindings")
    plain = part3.build_tensorrt(nn.Identity(), x, replace(job, cuda_graph=False))
    assert plain.columns == {"cuda_graph": False}
    part3._opened.close()


@pytest.mark.parametrize("fault", ["device", "driver", "memory", "kernel"])
def test_tensorrt_that_this_gpu_cannot_serve_is_unavailable(
    half_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
):
    stand_in(monkeypatch).faults.add(fault)
    row: dict[str, Any] = {}
    with recorded(row):
        job = part3.make_job("tensorrt-fp16", make_export_job(tmp_path))
        part3.build_tensorrt(nn.Identity(), torch.zeros(4, 3, 32, 32), job)
    assert row["status"] == "unavailable"
    words = {"memory": "OutOfMemory", "kernel": "Could not find any implementation"}
    assert words.get(fault, "GPU") in row["reason"]


def test_tensorrt_that_is_only_a_stub_package_is_unavailable(
    half_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_in(monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    row: dict[str, Any] = {}
    with recorded(row):
        job = part3.make_job("tensorrt-fp16", make_export_job(tmp_path))
        part3.build_tensorrt(nn.Identity(), torch.zeros(4, 3, 32, 32), job)
    assert row == {
        "status": "unavailable",
        "reason": "TensorRT is not installed: its package here is an empty stub",
    }


def test_fp8_on_an_older_gpu_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand_in(monkeypatch)
    job = part3.make_job("tensorrt-fp8", make_export_job(tmp_path))
    with pytest.raises(UnavailableError, match=r"fp8 needs a GPU of compute capability 8\.9"):
        part3.build_tensorrt(nn.Identity(), torch.zeros(4, 3, 32, 32), job)


def test_operator_that_tensorrt_lacks_is_unavailable(
    half_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_in(monkeypatch)
    model = onnx.load(half_graph)
    next(n for n in model.graph.node if n.op_type == "Gelu").domain = "my.domain"
    onnx.save(model, half_graph)
    row: dict[str, Any] = {}
    with recorded(row):
        job = part3.make_job("tensorrt-fp16", make_export_job(tmp_path))
        part3.build_tensorrt(nn.Identity(), torch.zeros(4, 3, 32, 32), job)
    assert row["status"] == "unavailable"
    assert "no importer for Gelu" in row["reason"]


def test_engine_with_a_nan_weight_fails_parity(
    half_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_in(monkeypatch)
    graph = onnx.load(half_graph)
    weight = next(t for t in graph.graph.initializer if len(t.dims) == 2)
    values = numpy_helper.to_array(weight).copy()
    values[0, 0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(graph, half_graph)
    model = load_model("vit_digits")
    job = part3.make_job("tensorrt-fp16", make_export_job(tmp_path))
    images = data.load_images("digits", "test").images[:4]
    check = part3.parity_check(model, images)
    variant = part3.build_tensorrt(nn.Identity(), torch.zeros(4, 3, 32, 32), job)
    row: dict[str, Any] = {"candidate": "tensorrt-fp16"}
    with pytest.raises(onnx_graphs.ParityError, match="cosine nan"):
        check(row, lambda x: variant.call(data.preprocess(images, model.preprocessing)).numpy())
    assert row["parity_images"] == 4
    part3._opened.close()


# --- models ---------------------------------------------------------------------------------------


def test_checkpoint_of_part_2_is_loaded_by_part_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "best.safetensors"
    path.touch()
    path.with_suffix(".json").write_text('{"dataset": "digits"}')
    asked = []

    def load_checkpoint(path: Path) -> LoadedModel:
        asked.append(path)
        return replace(load_model("vit_digits"), module=nn.Linear(2, 2).train())

    part2 = types.SimpleNamespace(load_checkpoint=load_checkpoint)
    monkeypatch.setitem(sys.modules, "part2_tune", part2)
    model = part3.load_trained(str(path))
    assert asked == [path]
    assert not model.module.training
    assert not any(p.requires_grad for p in model.module.parameters())
    monkeypatch.setattr(part3, "PART2_MODEL", path)
    args = part3.parse_args([])
    assert (args.model, args.dataset) == (str(path), "digits")
    named = part3.checkpoint_of("smallcnn_cifar100")
    assert named == ROOT / "weights" / "smallcnn_cifar100.safetensors"


def test_data_set_and_folders_follow_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(part3, "PART2_MODEL", tmp_path / "absent.safetensors")
    assert part3.parse_args([]).model == "vit_tiny_imagenet"
    assert part3.parse_args([]).dataset == "tiny-imagenet"
    assert part3.parse_args(["--model", "vit_digits"]).dataset == "digits"
    assert part3.parse_args(["--model", "smallcnn_cifar100"]).dataset == "cifar100"
    assert part3.parse_args(["--model", "dinov2_vits14_lc"]).dataset == "tiny-imagenet"
    assert part3.parse_args(["--model", "vit_digits", "--dataset", "folder"]).dataset == "folder"
    assert part3.parse_args(["--output-dir", "x"]).engine_dir == Path("x/engines")


def test_graph_names_stay_inside_the_engine_folder(tmp_path: Path):
    for model in ("timm/resnet50", "../../etc/best.safetensors", "/abs/best.safetensors"):
        assert onnx_graphs.graph_path(tmp_path, model, "fp16").parent == tmp_path


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--model", "vit_digit"], "vit_digits"),
        (["--model", "/does/not/exist.safetensors"], "does not exist: run part2_tune.py"),
        (["--model", "x.safetensors", "--untrained"], "holds trained weights"),
        (["--dataset", "digit"], "digits"),
        (["--candidates", "tensorrt-fp61"], "tensorrt-fp16"),
        (["--candidates", ","], "at least one name"),
        (["--batch-sizes", "0"], "at least 1"),
        (["--batch-sizes", "361"], "has 360 images"),
        (["--batch-sizes", "1,x"], "at least 1"),
        (["--num-images", "361"], "has 360 images"),
        (["--threads", "0"], "at least 1"),
        (["--threads", "1,1000000"], "this machine has"),
        (["--rounds", "-1"], "at least 1"),
        (["--block-seconds", "nan"], "above 0"),
        (["--seed", "-1"], "whole number from 0"),
        (["--device", "tpu"], "invalid choice"),
        (["--no-such-flag"], "unrecognized"),
        (["--dataset", "tiny-imagenet", "--data-dir", __file__], "no wnids.txt"),
        (["--engine-dir", __file__], f"cannot write to --engine-dir {__file__}"),
        (["--output-dir", __file__], f"cannot write to --output-dir {__file__}"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    flags: list[str], hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [*SMALL, "--export-only", "--output-dir", str(tmp_path), *flags]
    assert part3.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert hint in captured.err
    assert list(tmp_path.iterdir()) == []


def test_untrained_weights_are_the_same_in_every_process(tmp_path: Path):
    arguments = [*SMALL, "--model", "timm/test_vit2", "--untrained", "--dataset", "digits"]
    arguments += ["--candidates", "torch-cpu"]
    assert part3.main([*arguments, "--output-dir", str(tmp_path)]) == 0
    (row,) = pd.read_csv(tmp_path / "tensorrt.csv").to_dict("records")
    assert row["parity_cosine"] > 0.9999
    assert np.isnan(row["top1_percent"])


def test_cuda_without_a_gpu_is_a_users_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert part3.main([*SMALL, "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error: --device cuda")
