"""Part 3 from its command line: files, tables, reasons, bad input; candidates on stand-ins."""

import contextlib
import functools
import gc
import json
import math
import os
import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pandas as pd
import pytest
import timm
import torch
from torch import Tensor, nn

import part3_tensorrt as part3
from tests import tensorrt_standin as standin
from tests.test_onnx_tools import DIGITS, digit_inputs, export, small_cnn
from tests.test_tensorrt_runner import make_job, row_of
from tests.test_training import fake_cuda_graphs
from utils import benchmark, cli, data, evaluation, onnx_tools, results, timing
from utils.models import load_model
from utils.workers import Outcome, attempt

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--model", "vit_digits", "--batch-sizes", "4", "--rounds", "2", "--device", "cpu"]
SMALL += ["--block-seconds", "0.01", "--num-images", "60", "--threads", "1"]
ON_GPU = [n for n, c in part3.CANDIDATES.items() if c.device == "cuda" and c.export != "own"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a `--quick` run that exports a file of each kind."""
    folder = tmp_path_factory.mktemp("quick")
    wanted = "onnxruntime-cpu,tensorrt-bf16,tensorrt-int8,tensorrt-fp8"
    flags = ["--rounds", "2", "--candidates", wanted, "--output-dir", str(folder)]
    assert part3.main(["--quick", *flags]) == 0
    return folder / "vit_digits"


def test_quick_writes_and_checks_every_file(quick: Path):
    exports = pd.read_csv(quick / "exports.csv").set_index("export")
    assert tuple(exports.reset_index()[list(part3.EXPORT_COLUMNS)]) == part3.EXPORT_COLUMNS
    assert list(exports.index) == ["fp32", "fp16", "bf16", "int8", "fp8"]
    assert (exports.status == "ok").all()
    assert list(exports.onnx_opset) == [20, 20, 22, 20, 20]
    for name, row in exports.iterrows():
        assert onnx_tools.hash_onnx(Path(row.file)) == row.sha256
        assert row.parity_cosine >= part3.GATES[str(name)] or name == "bf16"
        assert row.parity_images == part3.PARITY_IMAGES or name == "bf16"
    assert exports.reason["bf16"].startswith("compared as an engine only")
    assert exports.size_mb["fp16"] < 0.6 * exports.size_mb["fp32"]
    assert exports.quantized_weights.dropna().to_dict() == {"int8": 16, "fp8": 16}
    assert exports.quantized_activations.to_dict()["int8"] == 32
    assert set(exports.calibration_images.dropna()) == {part3.CALIBRATION_IMAGES}
    files = {path.name for path in (quick / "engines").iterdir()}
    assert files == {f"vit_digits-{name}.onnx" for name in exports.index}
    metadata = ir.load(quick / "engines" / "vit_digits-fp8.onnx").metadata_props
    assert json.loads(metadata["classes"]) == [str(i) for i in range(10)]
    assert len(json.loads(metadata["mean"])) == len(json.loads(metadata["std"])) == 3


def test_quick_compares_on_the_cpu_and_says_why_the_rest_is_missing(quick: Path):
    table = pd.read_csv(quick / "tensorrt.csv")
    assert tuple(table[list(part3.COLUMNS)]) == part3.COLUMNS
    ran = table[table.status == "ok"]
    assert list(ran.candidate) == ["torch-cpu", "onnxruntime-cpu"] * 2
    assert list(ran.batch_size) == [16, 16, 1, 1]
    assert (ran.latency_ms_median > 0).all()
    assert (ran.parity_cosine > 0.9999).all()
    card = json.loads((ROOT / "weights" / "vit_digits.json").read_text())
    assert ran.top1_percent.tolist() == pytest.approx([card["top1"]] * 4, abs=0.01)
    assert ran.speedup_over_graph.isna().all()  # there is no CUDA graph on a CPU
    missing = table[table.status == "unavailable"]
    assert set(missing.candidate) == {f"tensorrt-{n}" for n in ("bf16", "int8", "fp8")}
    assert set(missing.reason) == {"no NVIDIA GPU is in use"}
    environment = json.loads((quick / "environment.json").read_text())
    assert environment["checkpoints"] == {"vit_digits.safetensors": card["sha256"]}


def test_own_file_is_checked_and_measured_beside_the_others(quick: Path, tmp_path: Path):
    own = quick / "engines" / "vit_digits-fp32.onnx"
    flags = ["--candidates", "onnxruntime-cpu-own", "--output-dir", str(tmp_path)]
    assert part3.main([*SMALL, *flags, "--onnx", str(own)]) == 0
    table = pd.read_csv(tmp_path / "vit_digits" / "tensorrt.csv").set_index("candidate")
    assert table.status.to_dict() == {"torch-cpu": "ok", "onnxruntime-cpu-own": "ok"}
    assert table.parity_cosine["onnxruntime-cpu-own"] > 0.9999
    assert own.is_file()


def test_own_file_that_does_not_fit_is_named(quick: Path, tmp_path: Path):
    source, fixed = quick / "engines" / "vit_digits-fp32.onnx", tmp_path / "fixed.onnx"
    fitting = digits_reference()
    with pytest.raises(cli.UserError, match="where this run writes its files: copy it elsewhere"):
        part3.require_fit(source, fitting, quick / "engines")
    part3.require_fit(source, fitting, tmp_path)
    larger = replace(fitting, preprocessing=replace(fitting.preprocessing, input_size=64))
    for reference in (larger, replace(fitting, logits=torch.zeros(8, 7))):
        size, outputs = reference.preprocessing.input_size, reference.logits.shape[1]
        wanted = rf"expected float32 \[N, 3, {size}, {size}\] in, \[N, {outputs}\] out, for any N"
        with pytest.raises(cli.UserError, match=wanted):
            part3.require_fit(source, reference, tmp_path)
    model = onnx.load(source)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, fixed)
    with pytest.raises(cli.UserError, match="for any N"):
        part3.require_fit(fixed, fitting, quick)


def test_an_own_file_in_bf16_is_compared_as_an_engine_only(
    quick: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(part3, "Worker", WorkerHere)
    run: Any = types.SimpleNamespace(source=DIGITS, threads=[1])
    row = part3.check_own(run, quick / "engines/vit_digits-bf16.onnx", digits_reference())
    assert (row["status"], row["reason"].partition(":")[0]) == ("ok", "compared as an engine only")


def test_export_needs_no_test_images(
    tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(part3, "Worker", WorkerHere)
    monkeypatch.setattr(benchmark, "prepare_process", lambda job: None)
    for path in [*(image_folder / "test").rglob("*.png")]:
        path.unlink()
    flags = ["--dataset", "folder", "--data-dir", str(image_folder), "--export-only"]
    flags += ["--candidates", "tensorrt-fp16"]
    arguments = ["--model", "vit_digits", "--device", "cpu", "--output-dir", str(tmp_path)]
    killed = tmp_path / "vit_digits" / "engines" / ".unfinished-x"  # a run that was
    killed.mkdir(parents=True)
    assert part3.main([*arguments, *flags]) == 0
    assert not killed.exists()
    exports = pd.read_csv(tmp_path / "vit_digits" / "exports.csv").set_index("export")
    assert exports.status.to_dict() == {"fp16": "ok"}
    assert exports.parity_images["fp16"] == 9  # the training images
    assert (tmp_path / "vit_digits" / "engines" / "vit_digits-fp16.onnx").is_file()
    assert not (tmp_path / "vit_digits" / "tensorrt.csv").exists()
    own = timm.create_model("test_resnet", num_classes=3).state_dict()
    torch.save(own, tmp_path / "mine.pth")
    monkeypatch.chdir(tmp_path)
    chosen = ["--model", "timm/test_resnet", "--checkpoint", "mine.pth"]
    assert part3.main([*arguments, *flags, *chosen]) == 0
    file = tmp_path / "timm-test_resnet-mine" / "engines" / "timm-test_resnet-mine-fp16.onnx"
    assert json.loads(ir.load(file).metadata_props["classes"]) == ["ant", "cat", "dog"]


# --- files that cannot be made --------------------------------------------------------------------


class WorkerHere(contextlib.nullcontext):
    """Runs in this process, where the stand-ins are."""

    def __enter__(self) -> "WorkerHere":
        return self

    def run(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)


def digits_reference(module: nn.Module | None = None) -> part3.Reference:
    images = data.load_images("digits", "test").images[:8]
    model = load_model(DIGITS)
    logits = (module or model.module)(data.preprocess(images, model.preprocessing))
    return part3.Reference(images.numpy(), "test", logits, model.preprocessing, classified=True)


class Overflowing(nn.Module):
    """A network whose activations exceed float16's largest number."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.mean((2, 3)) + 2) * 1e5)


class Unexportable(nn.Module):
    """What it does depends on the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([image.mean() + torch.zeros(10) for image in x if image.sum() > 0])


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Unexportable, "Error: "), (Overflowing, "ParityError: the logits hold NaN or infinity, as")],
)
def test_failed_export_is_a_row_and_leaves_no_older_file(
    network: Callable[[], nn.Module], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = replace(load_model(DIGITS), module=network().eval().requires_grad_(False))
    monkeypatch.setattr(part3, "Worker", WorkerHere)
    monkeypatch.setattr(part3, "load_model", lambda source: model)
    monkeypatch.setattr(benchmark, "prepare_process", lambda job: None)
    older = tmp_path / "vit_digits-fp16.onnx"
    for path in (older, older.with_name(f"{older.name}.data")):
        path.write_text("older")
    run: Any = types.SimpleNamespace(source=DIGITS, model=model)
    reference = digits_reference(Overflowing())
    ranges = functools.partial(attempt, part3.find_ranges, run, {"status": "failed"})
    half = part3.make_export(run, "fp16", make_job(tmp_path), reference, ranges)
    assert half["status"] == "failed"
    assert reason in half["reason"]
    row = part3.make_export(run, "int8", make_job(tmp_path), reference, ranges)
    assert row["status"] == "unavailable"
    assert not {"file", "calibration_images"} & (half.keys() | row.keys())
    assert list(tmp_path.iterdir()) == []
    missing = part3.why_missing(part3.CANDIDATES["tensorrt-int8"], "cuda", {"int8": row})
    assert missing is not None
    assert missing.reason.startswith("no int8 file: it starts from")


def test_gates_ask_for_the_cosine_and_in_8_bits_for_agreement():
    def row(cosine: float, agreement: float | None = 100.0) -> dict[str, float | None]:
        return {"parity_cosine": cosine, "parity_agreement_percent": agreement}

    part3.require_parity(row(0.97, 95), "fp8")
    part3.require_parity(row(0.97, None), "fp8")  # random weights, or no classes
    part3.require_parity(row(0.9999, 80), "fp16")
    with pytest.raises(part3.ParityError, match="85 % of the images get PyTorch's class"):
        part3.require_parity(row(0.967, 85), "fp8")
    for precision, cosine in {"int8": 0.5, "tf32": 0.5, "bf16": 0.9}.items():
        with pytest.raises(part3.ParityError, match="wanted"):
            part3.require_parity(row(cosine, None), precision)
    with pytest.raises(part3.ParityError, match=r"NaN or infinity$"):
        part3.require_parity(row(math.nan), "fp32")
    with pytest.raises(part3.ParityError, match="NaN or infinity, as when fp16 exceeds 65504"):
        part3.require_parity(row(math.nan), "int8")


@pytest.mark.parametrize("classified", [True, False])
def test_agreement_is_left_out_where_the_largest_logit_names_no_class(classified: bool):
    reference = replace(digits_reference(), classified=classified)
    found = part3.compare_logits(reference.logits, reference)
    assert tuple(found) == part3.PARITY_COLUMNS
    assert found["parity_agreement_percent"] == (100.0 if classified else None)
    with pytest.raises(part3.ParityError, match=r"logits \[8, 3\], PyTorch gives \[8, 10\]"):
        part3.compare_logits(reference.logits[:, :3], reference)


def test_exports_are_those_that_the_candidates_read():
    choose = functools.partial(part3.choose_exports, own=False)
    assert choose(["torch-fp32"]) == []
    assert choose(["tensorrt-tf32", "onnxruntime-cuda"]) == ["fp32"]
    assert choose(["tensorrt-fp8"]) == ["fp16", "fp8"]
    assert choose(["onnxruntime-cpu"], own=True) == ["fp32", "own"]


@pytest.mark.parametrize("domain", ["", "ai.onnx"])  # two spellings of one
def test_an_own_file_is_checked_at_batch_1_too(tmp_path: Path, domain: str):
    pixels = torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8)
    how = data.Preprocessing(8, (0, 0, 0), (1, 1, 1))
    wanted = data.preprocess(pixels, how).mean((2, 3))
    reference = part3.Reference(pixels.numpy(), "noise", wanted, how, classified=True)

    def check(logits: str) -> dict[str, Any]:
        text = f"""<ir_version: 10, opset_import: ["{domain}": 20]>
            own (float[N,3,8,8] images) => (float[N,3] logits)
            {{ pooled = GlobalAveragePool(images) logits = {logits} }}"""
        onnx.save(onnx.parser.parse_model(text), tmp_path / "own")
        return part3.check_export(tmp_path / "own", 1, reference)

    assert check("Flatten(pooled)")["parity_cosine"] == pytest.approx(1)
    with pytest.raises(RuntimeError, match="same number of dimensions"):
        check("Squeeze(pooled)")  # it drops the batch axis of a single image


def test_ranges_that_are_not_found_are_looked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    looked: list[Any] = []

    def fail(*arguments: Any) -> None:
        looked.append(arguments)
        raise MemoryError("no room")

    monkeypatch.setattr(part3, "find_ranges", fail)
    monkeypatch.setattr(part3, "Worker", WorkerHere)
    monkeypatch.setattr(benchmark, "prepare_process", lambda job: None)
    run: Any = types.SimpleNamespace(
        source=DIGITS, model=load_model(DIGITS), folder=tmp_path, environment={}
    )
    names = ["fp16", "int8", "fp8"]
    rows = part3.export_all(run, names, make_job(tmp_path), digits_reference(), Path())
    assert [rows[name]["status"] for name in names] == ["ok", "unavailable", "unavailable"]
    assert len(looked) == 1


def test_candidates_of_a_gpu_run_bring_their_baselines():
    names = part3.choose_candidates(["tensorrt-int8", "torch-fp32"], "cuda", own=False)
    assert names == ["torch-fp32", "torch-fp32-graph", "torch-fp16-graph", "tensorrt-int8"]
    names = part3.choose_candidates(["tensorrt-bf16"], "cuda", own=False)
    assert names == ["torch-fp32", "torch-fp32-graph", "torch-bf16-graph", "tensorrt-bf16"]
    names = part3.choose_candidates(["tensorrt-int8"], "cpu", own=False)
    assert names == ["torch-cpu", "tensorrt-int8"]
    assert part3.choose_candidates(None, "cuda", own=False) == ON_GPU
    assert part3.choose_candidates(None, "cpu", own=True) == list(part3.CANDIDATES)


def test_every_candidate_is_compared_with_the_graph_of_its_precision():
    for name in ON_GPU:
        own = part3.CANDIDATES[name].precision
        other = part3.CANDIDATES[part3.GRAPH_BASELINES[own]].precision
        assert other == {"int8": "fp16", "fp8": "fp16"}.get(own, own)


def test_candidate_for_another_device_says_so():
    missing = part3.why_missing(part3.CANDIDATES["torch-cpu"], "cuda", {})
    assert missing == Outcome("unavailable", "it runs with --device cpu")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
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
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    for tensor in (*seen, module.weight):
        assert tensor.dtype == part3.DTYPES.get(precision, torch.float32)
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


# --- TensorRT, on stand-ins -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The row of a checked fp16 file of the small CNN."""
    path = export(small_cnn(), tmp_path_factory.mktemp("half") / "cnn.onnx", torch.float16)
    return row_of(path)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> standin.Gpu:
    """Stand-ins for the GPU's libraries, and for the two places where PyTorch meets them."""

    def join_stream(runner: Any) -> Tensor:
        interface = runner.device_logits.__cuda_array_interface__
        return torch.from_numpy(standin.as_array(interface["data"][0], interface["shape"]))

    monkeypatch.setattr(part3, "join_stream", join_stream)
    monkeypatch.setattr(part3, "Worker", WorkerHere)
    monkeypatch.setattr(part3, "_opened", contextlib.ExitStack())
    return standin.install(monkeypatch, gpu=standin.Gpu(capability=(8, 0)))


def test_tensorrt_candidate_serves_both_kinds_of_calls(
    gpu: standin.Gpu, half: dict[str, Any], tmp_path: Path
):
    x = digit_inputs(4)
    expected = small_cnn()(x)
    job = part3.add_engine(make_job(tmp_path, export=half), layers=False)
    assert job.columns["engine_cached"] is False
    card = json.loads(Path(job.columns["engine_file"]).with_suffix(".json").read_text())
    assert job.columns["engine_build_seconds"] == card["build_seconds"]
    variant = part3.build_tensorrt(nn.Identity(), x, job)
    assert gpu.builds == 1
    allocated = gpu.allocations
    torch.testing.assert_close(variant.call(x), expected, rtol=0.02, atol=0.02)
    assert variant.host_call is not None
    np.testing.assert_array_equal(variant.host_call(x), variant.call(x))
    assert gpu.allocations == allocated
    assert variant.columns["cuda_graph"] is True
    assert variant.columns["engine_memory_mb"] > 0
    assert variant.size_bytes == Path(job.columns["engine_file"]).stat().st_size
    block = timing.time_block(variant.call, [x, x], 3)
    assert len(block.latencies_ms) == 3
    part3._opened.close()
    assert (gpu.live, gpu.orphans) == ({}, [])


def test_engines_are_made_before_anything_is_measured(
    gpu: standin.Gpu, half: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    job = make_job(tmp_path, export=half)
    torch_job = replace(job, candidate="torch-fp32", build=part3.build_eager)
    jobs = [torch_job, job, replace(job, candidate="tensorrt-fp8", precision="fp8")]
    made = [part3.add_engine(job, layers=True) for job in jobs]
    assert made[0] == torch_job
    (listed,) = tmp_path.glob("*-layers.json")
    assert f"  layers {listed}\n" in capsys.readouterr().out
    assert json.loads(listed.read_text())
    assert made[2].missing is not None
    assert made[2].missing.status == "unavailable"
    assert "capability 8.9" in made[2].missing.reason
    assert gpu.builds == 2  # the one that is timed is not the one that tells of its layers
    again = part3.add_engine(job, layers=False)
    assert again.columns["engine_cached"] is True
    assert capsys.readouterr().out.count("kept") == 1
    assert (gpu.live, gpu.current, gpu.orphans) == ({}, [], [])


@pytest.mark.parametrize(
    ("fault", "status", "text"),
    [
        ("device", "unavailable", "no usable GPU"),
        ("driver", "unavailable", "driver may be older"),
        ("memory", "unavailable", "out of memory"),
        ("kernel", "failed", "NVRTC Compilation failure"),
    ],
)
def test_what_the_machine_lacks_is_unavailable_and_a_refused_build_failed(
    gpu: standin.Gpu, half: dict[str, Any], tmp_path: Path, fault: str, status: str, text: str
):
    gpu.faults.add(fault)
    job = part3.add_engine(make_job(tmp_path, export=half), layers=False)
    assert job.missing is not None
    assert job.missing.status == status
    assert text in job.missing.reason


def test_engine_that_is_not_replayed_says_how_it_runs(
    gpu: standin.Gpu, half: dict[str, Any], tmp_path: Path
):
    gpu.faults.add("capture")
    job = part3.add_engine(make_job(tmp_path, export=half), layers=False)
    x = digit_inputs(4)
    variant = part3.build_tensorrt(nn.Identity(), x, job)
    assert variant.columns["cuda_graph"] is False
    assert variant.columns["reason"].startswith("it runs as with --no-cuda-graph: operation not")
    plain = part3.build_tensorrt(nn.Identity(), x, replace(job, cuda_graph=False))
    assert plain.columns["cuda_graph"] is False
    assert "reason" not in plain.columns
    part3._opened.close()


def test_engine_that_computes_something_else_is_not_timed(
    gpu: standin.Gpu, half: dict[str, Any], tmp_path: Path
):
    job = part3.add_engine(make_job(tmp_path, export=half), layers=False)
    variant = part3.build_tensorrt(nn.Identity(), digit_inputs(4), job)
    preprocessing = load_model(DIGITS).preprocessing
    reference = digits_reference(small_cnn())

    def predict(images: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(images)
        return evaluation.predict(
            lambda x: variant.call(x).clone(), tensor, preprocessing, 4
        ).numpy()

    row: dict[str, Any] = {"candidate": "tensorrt-fp16"}
    part3.check_parity(reference, row, predict)
    assert row["parity_cosine"] > 0.999
    other = replace(reference, logits=reference.logits.roll(1, 1))
    with pytest.raises(part3.ParityError, match=r"with PyTorch's logits, wanted 0\.999"):
        part3.check_parity(other, row, predict)
    assert row["parity_images"] == 8
    part3._opened.close()


def test_streams_serve_side_by_side_and_the_best_within_a_latency_is_named(
    gpu: standin.Gpu, half: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    job = part3.add_engine(make_job(tmp_path, export=half), layers=False)
    opened: list[Any] = []
    serve = part3.serve_streams

    def watch(runners: Any, seconds: float) -> Any:
        opened.append(len(set(runners)))
        rate, latencies = serve(runners, seconds)
        assert rate > 0
        assert len(latencies) >= len(runners)
        return rate, latencies

    monkeypatch.setattr(part3, "serve_streams", watch)
    monkeypatch.setattr(part3.timing, "CALLS_FOR_P99", 2)
    run: Any = types.SimpleNamespace(
        source=DIGITS,
        model=load_model(DIGITS),
        speed=types.SimpleNamespace(images=data.load_images("digits", "test").images[:8]),
        batch_sizes=[4],
        rounds=2,
        block_seconds=0.01,
        write_table=lambda name, rows, columns: results.write_csv(tmp_path / name, rows, columns),
    )
    timed = [{"candidate": "tensorrt-fp32", "batch_size": 4, "status": "ok"}]
    others = [replace(job, candidate="tensorrt-fp8"), replace(job, build=part3.build_eager)]
    rows = part3.compare_streams(run, [*others, job], timed, [1, 3])
    assert [row["status"] for row in rows] == ["ok", "ok"], rows[0]["reason"]
    assert opened == [1, 3] * 3  # a round to warm up, and two
    table = pd.read_csv(tmp_path / "streams.csv")
    assert tuple(table) == part3.STREAM_COLUMNS
    assert list(table.streams) == [1, 3]
    assert (table.latency_ms_p99 >= table.latency_ms_median).all()
    assert (table.calls >= 2 * table.streams).all()
    fastest = max(rows, key=lambda row: row["images_per_s"])
    assert f"streams {fastest['streams']}" in part3.choose_streams(rows, 1e6)
    assert part3.choose_streams(rows, 1e-6).startswith("no engine serves")
    few = [row | {"latency_ms_p99": None} for row in rows]
    assert part3.choose_streams(few, 1e6).startswith("too few batches")
    gpu.faults.add("context")
    (failed,) = part3.compare_streams(run, [job], timed, [1, 3])
    assert failed["status"] != "ok"
    assert failed["reason"]
    assert (gpu.live, gpu.orphans) == ({}, [])


# --- the command line -----------------------------------------------------------------------------


def test_defaults_follow_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(part3, "PART2_RESULTS", tmp_path)
    assert part3.parse_args([]).model == "vit_tiny_imagenet"
    assert part3.parse_args([]).dataset == "tiny-imagenet"
    assert part3.parse_args(["--model", "vit_digits"]).dataset == "digits"
    assert part3.parse_args(["--model", "smallcnn_cifar100"]).dataset == "cifar100"
    assert part3.parse_args(["--model", "dinov2_vits14_lc"]).dataset == "tiny-imagenet"
    assert part3.parse_args(["--model", "vit_digits", "--dataset", "folder"]).dataset == "folder"
    for name in ("earlier/best", "later/best", "later/default"):
        saved = tmp_path / f"{name}.safetensors"
        saved.parent.mkdir(exist_ok=True)
        saved.touch()
        os.utime(saved, (0, len(list(tmp_path.glob("*/*.safetensors")))))
        saved.with_suffix(".json").write_text('{"dataset": "digits"}')
    args = part3.parse_args([])
    assert (args.model, args.dataset) == (str(tmp_path / "later/best.safetensors"), "digits")
    (tmp_path / "later/best.safetensors").unlink()
    assert part3.parse_args([]).model == str(tmp_path / "later/default.safetensors")


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--model", "vit_digit"], "vit_digits"),
        (["--dataset", "digit"], "digits"),
        (["--candidates", "tensorrt-fp61"], "tensorrt-fp16"),
        (["--threads", "1,1000000"], "this machine has"),
        (["--optimization-level", "6"], "invalid choice"),
        (["--no-such-flag"], "unrecognized"),
        (["--output-dir", __file__], "cannot write to --output-dir"),
        (["--onnx", "missing.onnx"], "--onnx missing.onnx is no file"),
        ([], "none of the --candidates reads an ONNX file"),
        (["--streams", "1,2"], "use an NVIDIA GPU"),
        (["--layers"], "use an NVIDIA GPU"),
        (["--candidates", "onnxruntime-cpu-own"], "it runs the file that --onnx names"),
        (["--onnx", __file__], f"--onnx {__file__} is not an ONNX file of this model: "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    flags: list[str], hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = [*SMALL, "--candidates", "torch-cpu", "--output-dir", str(tmp_path), *flags]
    assert part3.main([*arguments, "--export-only"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert hint in captured.err
    assert not list(tmp_path.rglob("*.csv"))
