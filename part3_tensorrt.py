"""Part 3: take a trained model to ONNX and from there to TensorRT; inference time and speedup.

The model is exported once per precision, and every ONNX file is checked against PyTorch on real
images. Then PyTorch (eager, as a CUDA graph, compiled), ONNX Runtime and TensorRT run side by side.
A candidate that does not agree with PyTorch is not timed. Without an NVIDIA GPU the export, the
checks and a comparison of PyTorch with ONNX Runtime on the CPU still run.

    python part3_tensorrt.py                        # Part 2's network, else vit_tiny_imagenet
    python part3_tensorrt.py --model timm/NAME --checkpoint mine.safetensors
    python part3_tensorrt.py --onnx mine.onnx       # your own file of the model, measured, too
    python part3_tensorrt.py --export-only          # write and check the files, measure nothing
    python part3_tensorrt.py --quick                # under a minute, offline, CPU
    python part3_tensorrt.py --list                 # the candidates
"""

from utils import cli  # isort: skip  # first: it says in one line if this Python is too old

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import benchmark, data, evaluation, onnx_tools, results, tensorrt_runner, timing
from utils.benchmark import Build, Job, Predict, Run, Variant
from utils.models import WEIGHTS_DIR, load_model, run_name
from utils.tensorrt_runner import EngineError, Runner
from utils.training import capture, memory_format
from utils.workers import Outcome, UnavailableError, Worker, attempt, recorded

PART2_RESULTS = Path("results/part2")
EXPORTS = ("fp32", "fp16", "bf16", "int8", "fp8", "own")  # precisions; the last with --onnx
EIGHT_BIT = ("int8", "fp8")  # what is not quantised in such a file is fp16
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# The least mean cosine of the (centred) logits with those of PyTorch in float32 on the CPU, and in
# 8 bits the least percentage of images with the same class: below it an engine is broken, above it
# the accuracy column speaks.
GATES = {"fp32": 0.9999, "tf32": 0.9995, "fp16": 0.999, "bf16": 0.99}
GATES |= {"int8": 0.9, "fp8": 0.9, "own": 0.9}
LEAST_AGREEMENT = 90.0
PARITY_IMAGES = 64
CALIBRATION_IMAGES = 256  # training images, none of them scored, that set the 8-bit ranges
PLAN_FORMAT = 3  # raise it when the builder is configured in another way

PARITY_COLUMNS: tuple[str, ...] = ("parity_cosine", "parity_max_difference")
PARITY_COLUMNS += ("parity_agreement_percent", "parity_images")
EXPORT_COLUMNS: tuple[str, ...] = ("model", "export", "file", "sha256", "status")
EXPORT_COLUMNS += ("reason", "onnx_opset", "nodes", "size_mb", "export_seconds")
EXPORT_COLUMNS += (*PARITY_COLUMNS, "quantized_weights", "weights")
EXPORT_COLUMNS += ("quantized_activations", "quantized_work_percent", "calibration_images")
COLUMNS: tuple[str, ...] = ("model", "dataset", "gflop_per_image", "image_size", "candidate")
COLUMNS += ("precision", "device", "threads", "batch_size", "status", "reason")
COLUMNS += timing.LATENCY_COLUMNS
COLUMNS += ("graph_baseline", *benchmark.GRAPH_COLUMNS, *benchmark.TRANSFER_COLUMNS)
COLUMNS += (*PARITY_COLUMNS, *evaluation.ACCURACY_COLUMNS, "accuracy_batch_size", "size_mb")
COLUMNS += ("engine_memory_mb", *benchmark.MEMORY_COLUMNS, "build_seconds")
COLUMNS += ("engine_file", "engine_build_seconds", "engine_cached", "cuda_graph")
COLUMNS += benchmark.LOAD_COLUMNS
STREAM_COLUMNS: tuple[str, ...] = ("model", "candidate", "precision", "batch_size", "streams")
STREAM_COLUMNS += ("status", "reason", "images_per_s", "latency_ms_median", "latency_ms_p99")
STREAM_COLUMNS += ("rounds", "calls")
SHOWN_STREAMS = {
    "candidate": ("candidate", "s"),
    "batch_size": ("batch", "d"),
    "streams": ("streams", "d"),
    "images_per_s": ("images/s", ",.0f"),
    "latency_ms_median": ("ms", ".3f"),
    "latency_ms_p99": ("p99 ms", ".3f"),
}
SHOWN = {
    "candidate": ("candidate", "s"),
    "batch_size": ("batch", "d"),
    "threads": ("threads", "d"),
    "latency_ms_median": ("ms", ".3f"),
    "speedup": ("speedup", "ratio"),
    "speedup_over_graph": ("over graph", ".2f"),
    "transfers_latency_ms_median": ("with copies", ".3f"),
    "top1_percent": ("top-1", ".2f"),
    "agreement_percent": ("agrees %", ".1f"),
    "parity_cosine": ("cosine", ".4f"),
    "size_mb": ("MB", ".1f"),
    "engine_memory_mb": ("GPU MB", ".0f"),
}
QUICK = {
    "model": "vit_digits",
    "device": "cpu",
    "batch_sizes": [1, 16],
    "rounds": 7,
    "block_seconds": 0.1,
}


@dataclass(frozen=True, kw_only=True)
class EngineJob(Job):
    """A benchmark's job with what Part 3's candidates need; `engine_dir` holds files and plans."""

    precision: str = "fp32"
    export: Mapping[str, Any]  # of EXPORT_COLUMNS, on the ONNX file; empty for PyTorch
    engine_dir: Path
    timing_dir: Path  # for the builder's timings, which all models share
    engine_batch_sizes: tuple[int, ...]  # of the run: an engine serves them all
    optimization_level: int
    detailed: bool = False  # an engine that tells of its layers, not one that is timed
    cuda_graph: bool


# --- the candidates: each takes (module, example batch, job) and returns a Variant ----------------


def build_eager(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """PyTorch, eager."""
    return Variant(prepare(module, example, job.precision), benchmark.state_bytes(module))


def build_graph(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """PyTorch, the eager calls replayed as one CUDA graph."""
    call = capture(prepare(module, example, job.precision), example)
    size = benchmark.state_bytes(module)
    return Variant(call, size, uploads=True, columns={"cuda_graph": True})


def build_compiled(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """PyTorch by torch.compile, with CUDA graphs."""
    from torch._dynamo.utils import counters

    benchmark.require_compiler(job.device)
    call = torch.compile(prepare(module, example, job.precision), mode="reduce-overhead")
    call(example)
    replayed = not counters["inductor"]["cudagraph_skips"]
    return Variant(call, benchmark.state_bytes(module), columns={"cuda_graph": replayed})


def build_onnxruntime(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """ONNX Runtime, TF32 off."""
    path = verify_onnx(job.export)
    if example.is_cuda:
        torch.cuda.set_stream(torch.cuda.Stream())  # the one that ONNX Runtime will work on
        call = onnx_tools.onnx_cuda_session(path)
    else:
        call = onnx_tools.onnx_session(path, job.threads)
    return Variant(call, onnx_tools.onnx_bytes(path))


def build_tensorrt(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """TensorRT, strongly typed, one profile per batch size, replayed as a CUDA graph."""
    plan = tensorrt_runner.read_plan(Path(job.columns["engine_file"]))
    with contextlib.ExitStack() as stack:
        stack.enter_context(tensorrt_runner.primary_context())
        runner = stack.enter_context(Runner(plan, job.batch_size, job.cuda_graph))
        _opened.push(stack.pop_all())
    logits = join_stream(runner)

    def call(x: Tensor) -> Tensor:
        runner.copy_from_device(x.data_ptr(), x.nbytes)
        runner.execute()
        return logits

    columns = {"cuda_graph": not runner.no_graph, "engine_memory_mb": runner.memory_bytes / 1e6}
    if job.cuda_graph and runner.no_graph:
        columns["reason"] = f"it runs as with --no-cuda-graph: {runner.no_graph}"
    return Variant(call, len(plan), host_call=lambda x: runner.submit(x.numpy()), columns=columns)


@dataclass(frozen=True)
class Candidate:
    """How to build it, where it runs, and which ONNX file it reads."""

    build: Build
    device: str
    precision: str
    export: str | None = None


CANDIDATES = {  # the first of each device is its baseline
    "torch-cpu": Candidate(build_eager, "cpu", "fp32"),
    "onnxruntime-cpu": Candidate(build_onnxruntime, "cpu", "fp32", "fp32"),
}
for precision in ("fp32", "tf32", "fp16", "bf16"):
    CANDIDATES[f"torch-{precision}"] = Candidate(build_eager, "cuda", precision)
    CANDIDATES[f"torch-{precision}-graph"] = Candidate(build_graph, "cuda", precision)
    CANDIDATES[f"torch-{precision}-compile"] = Candidate(build_compiled, "cuda", precision)
CANDIDATES["onnxruntime-cuda"] = Candidate(build_onnxruntime, "cuda", "fp32", "fp32")
CANDIDATES["tensorrt-tf32"] = Candidate(build_tensorrt, "cuda", "tf32", "fp32")
for precision in EXPORTS:
    CANDIDATES[f"tensorrt-{precision}"] = Candidate(build_tensorrt, "cuda", precision, precision)
CANDIDATES["onnxruntime-cpu-own"] = Candidate(build_onnxruntime, "cpu", "own", "own")

# PyTorch's CUDA graph of the same precision, or of the nearest that PyTorch has: a speedup over it
# is not due to launches, nor to the precision but for 8 bits.
GRAPH_BASELINES = {p: f"torch-{p}-graph" for p in ("fp32", "tf32", "fp16", "bf16")}
GRAPH_BASELINES |= {"int8": "torch-fp16-graph", "fp8": "torch-fp16-graph"}

# In a worker process only. It holds the engine until the process ends, which frees everything.
_opened = contextlib.ExitStack()


def prepare(module: nn.Module, example: Tensor, precision: str) -> Callable[[Tensor], Tensor]:
    """The module in that precision and in the layout that its device is fastest with, in place.

    Images and logits are float32 and contiguous: the call converts them. TF32 is a setting of the
    process.
    """
    if precision == "tf32":
        benchmark.allow_tf32()
    dtype = DTYPES.get(precision, torch.float32)
    layout = memory_format(example.device)
    module = module.to(dtype).to(memory_format=layout)
    return lambda x: module(x.to(dtype, memory_format=layout)).float()


def join_stream(runner: Runner) -> Tensor:
    """Make the engine's stream PyTorch's, its events included; the engine's logits as a tensor."""
    torch.cuda.set_stream(torch.cuda.ExternalStream(runner.stream_handle))
    return torch.as_tensor(runner.device_logits, device="cuda")


# --- parity with PyTorch --------------------------------------------------------------------------


class ParityError(Exception):
    """Logits too far from PyTorch's."""


@dataclass(frozen=True)
class Reference:
    """Images uint8 `[N, 3, H, W]` and PyTorch's float32 logits `[N, C]` of them."""

    images: np.ndarray
    what: str  # these images are
    logits: Tensor
    preprocessing: data.Preprocessing
    classified: bool  # the largest logit names a class; random weights are too near to a draw


def make_reference(run: Run) -> Reference:
    """PARITY_IMAGES labelled images, else training images, else noise, and PyTorch's logits."""
    model, seed = run.model, run.source.seed
    for split in (data.ACCURACY_SPLIT[run.dataset], "train"):
        with contextlib.suppress(cli.UserError):
            images = run.load(split=split, num_images=PARITY_IMAGES, seed=seed, fewer=True).images
            what = f"{len(images)} {split} images of {run.dataset}"
            break
    else:
        side = model.preprocessing.input_size
        shape = (PARITY_IMAGES, 3, side, side)
        noise = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
        images, what = torch.from_numpy(noise), f"noise, as there are no images of {run.dataset}"
    logits = evaluation.predict(model.module, images, model.preprocessing, 16)
    classified = model.trained and model.num_classes > 0
    return Reference(images.numpy(), what, logits, model.preprocessing, classified)


def compare_logits(logits: Tensor, reference: Reference) -> dict[str, Any]:
    """PARITY_COLUMNS of logits `[N, C]` of the reference's images."""
    wanted = reference.logits
    if logits.shape != wanted.shape:
        raise ParityError(f"logits {list(logits.shape)}, PyTorch gives {list(wanted.shape)}")
    agreement = evaluation.percent(logits.argmax(1) == wanted.argmax(1))
    return {
        "parity_cosine": evaluation.centred_cosine(logits, wanted),
        "parity_max_difference": (logits - wanted).abs().max().item(),
        "parity_agreement_percent": agreement if reference.classified else None,
        "parity_images": len(logits),
    }


def check_parity(reference: Reference, row: dict[str, Any], predict: Predict) -> None:
    """Compare a candidate's logits with PyTorch's before it is timed."""
    row |= compare_logits(torch.from_numpy(predict(reference.images)), reference)
    require_parity(row, CANDIDATES[row["candidate"]].precision)


def require_parity(row: Mapping[str, Any], precision: str) -> None:
    """Hold a row's parity against the gates of a precision.

    Raises:
        ParityError: it is below one of them, or is not a number.
    """
    cosine, agreement = row["parity_cosine"], row["parity_agreement_percent"]
    if math.isnan(cosine):
        hint = "" if precision in ("fp32", "tf32", "bf16") else ", as when fp16 exceeds 65504"
        raise ParityError(f"the logits hold NaN or infinity{hint}")
    if cosine < GATES[precision]:
        raise ParityError(f"cosine {cosine:.5f} with PyTorch's logits, wanted {GATES[precision]}")
    if precision in EIGHT_BIT and agreement is not None and agreement < LEAST_AGREEMENT:
        raise ParityError(
            f"{agreement:.0f} % of the images get PyTorch's class, wanted {LEAST_AGREEMENT}"
        )


# --- ONNX export of each precision ----------------------------------------------------------------


class LowPrecision(nn.Module):
    """A module, which it converts in place, that takes float32 images and gives float32 logits."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module.to(dtype), dtype
        self.train(module.training)

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images.to(self.dtype)).float()


def tanh_gelu(x: Any, approximate: str = "none") -> Any:
    """GELU in ONNX by its tanh formula, for half precision: it differs by at most 5e-4.

    In TensorRT 10.6 on an H200 the exact one's error function took nearly as long as the product
    before it, and longer in 8 bits. The formula is in section 2 of https://arxiv.org/abs/1606.08415.
    """
    from onnxscript import opset20 as op

    return op.Gelu(x, approximate="tanh")


def export_module(
    module: nn.Module, precision: str, size: int, path: Path, metadata: Mapping[str, str]
) -> None:
    """Export a module of float32 images `[B, 3, size, size]`, which half precision converts."""
    translations = {}
    if precision in DTYPES:
        module = LowPrecision(module, DTYPES[precision])
        translations[torch.ops.aten.gelu.default] = tanh_gelu
    opset = 22 if precision == "bf16" else 20  # the first whose convolutions take bf16
    example = torch.zeros(2, 3, size, size)
    onnx_tools.export_onnx(module, example, path, opset, translations, metadata)


def export_float(precision: str, job: EngineJob, classes: Sequence[str] | None, path: Path) -> None:
    """In a worker: export the model in a float precision, with what its user must know."""
    benchmark.prepare_process(job)
    model = load_model(job.source)
    preprocessing = model.preprocessing
    metadata = {
        "model": model.name,
        "classes": json.dumps(classes),
        "mean": json.dumps(preprocessing.mean),
        "std": json.dumps(preprocessing.std),
        "interpolation": preprocessing.interpolation,
    }
    export_module(model.module, precision, preprocessing.input_size, path, metadata)


def find_ranges(run: Run, half: Mapping[str, Any]) -> tuple[dict[str, onnx_tools.Range], int]:
    """The ranges of all activations that are quantised, and of how many training images.

    Args:
        half: the row of the fp16 file.

    Raises:
        UnavailableError: there is no such file, or there are no such images.
    """
    if half["status"] != "ok":
        raise UnavailableError("it starts from the fp16 file, which there is not")
    images = benchmark.load_calibration(run, CALIBRATION_IMAGES)
    arguments = (verify_onnx(half), images, run.model.preprocessing, run.threads[0])
    with Worker() as worker:
        return worker.run(calibrate, *arguments), len(images)


def calibrate(
    path: Path, images: np.ndarray, preprocessing: data.Preprocessing, threads: int
) -> dict[str, onnx_tools.Range]:
    """In a worker: the ranges, image by image, which bounds the memory."""
    graph = ir.load(path).graph
    # All of them, whatever is exported, and in one order: it decides which values are sampled.
    products = onnx_tools.find_products(graph, "int8")  # fp8's are among them
    tensors = [value.name for value in onnx_tools.find_activations(products)]
    bar = tqdm(images, desc="calibrating", unit="img", disable=None, leave=False)
    batches = (data.preprocess(torch.from_numpy(x[None]), preprocessing).numpy() for x in bar)
    return onnx_tools.calibrate(path, tensors, batches, threads)


def verify_onnx(row: Mapping[str, Any]) -> Path:
    """The ONNX file of a row of EXPORT_COLUMNS, if it is still the one that was checked."""
    path = Path(row["file"])
    if onnx_tools.hash_onnx(path) != row["sha256"]:
        raise RuntimeError(f"{path} is no longer the file that was checked: another run wrote it?")
    return path


def check_export(path: Path, threads: int, reference: Reference) -> dict[str, Any]:
    """In a worker: check an ONNX file, and compare it with PyTorch by ONNX Runtime."""
    size, outputs = reference.preprocessing.input_size, reference.logits.shape[1]
    row = onnx_tools.check_onnx(path, size, outputs) | {"sha256": onnx_tools.hash_onnx(path)}
    weights = ir.load(path).graph.initializers.values()
    if any(weight.dtype == ir.DataType.BFLOAT16 for weight in weights):
        return row | {"reason": "compared as an engine only: ONNX Runtime has no bf16 on a CPU"}
    call = onnx_tools.onnx_session(path, threads, optimize=False)
    images = torch.from_numpy(reference.images)
    # Other batches than the two images of the export; few, for each of them restores all weights.
    logits = [
        evaluation.predict(call, part, reference.preprocessing, batch_size=min(len(part), 8))
        for part in images.tensor_split([1])
        if len(part)
    ]
    return row | compare_logits(torch.cat(logits), reference)


def make_export(
    run: Run, precision: str, job: EngineJob, reference: Reference, ranges: Callable[[], Outcome]
) -> dict[str, Any]:
    """Make one of EXPORTS in a process of its own; a row of EXPORT_COLUMNS.

    The file comes into the folder when it has passed; a failure leaves no older one there.
    """
    stem = run_name(run.source)
    row: dict[str, Any] = {"model": run.source.name, "export": precision, "status": "ok"}
    target = job.engine_dir / f"{stem}-{precision}.onnx"
    for old in (target, target.with_name(f"{target.name}.data")):
        old.unlink(missing_ok=True)
    if precision in EIGHT_BIT and not ranges().ok:
        return row | ranges().columns
    scratch = tempfile.TemporaryDirectory(dir=job.engine_dir, prefix=".unfinished-")
    with recorded(row), Worker() as worker, scratch as folder:
        path = Path(folder) / target.name
        images, start = None, time.perf_counter()
        if precision in EIGHT_BIT:
            widths, images = ranges().value
            # TensorRT documents scales per channel of fp8 weights for Hopper alone.
            hopper = run.device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
            half, per_channel = target.with_name(f"{stem}-fp16.onnx"), precision == "int8" or hopper
            arguments = (half, path, precision, widths, per_channel)
            row |= worker.run(onnx_tools.quantize_onnx, *arguments)
        else:
            worker.run(export_float, precision, job, run.model.classes, path)
        row["export_seconds"] = time.perf_counter() - start
        row |= worker.run(check_export, path, job.threads, reference)
        if "parity_cosine" in row:
            require_parity(row, precision)
        for file in onnx_tools.onnx_files(path):
            file.replace(target.with_name(file.name))
        results.written.append(target)
        row |= {"file": str(target), "calibration_images": images}
    return row


def check_own(run: Run, path: Path, reference: Reference) -> dict[str, Any]:
    """A row of EXPORT_COLUMNS on a user's file."""
    row: dict[str, Any] = {"model": run.source.name, "export": "own", "status": "ok"}
    row["file"] = str(path)
    with recorded(row), Worker() as worker:
        row |= worker.run(check_export, path, run.threads[0], reference)
        if "parity_cosine" in row:
            require_parity(row, "own")
    return row


def export_all(
    run: Run, names: Sequence[str], job: EngineJob, reference: Reference, own: Path | None
) -> dict[str, dict[str, Any]]:
    """Make these of EXPORTS, and check a file of one's own; a row of EXPORT_COLUMNS for each."""
    print(f"ONNX files in {job.engine_dir}; cosine with PyTorch on {reference.what}")
    rows: dict[str, dict[str, Any]] = {}
    ranges = functools.cache(lambda: attempt(find_ranges, run, rows["fp16"]))
    for name in names:
        if own and name == "own":
            row = check_own(run, own, reference)
        else:
            row = make_export(run, name, job, reference, ranges)
        rows[name] = row
        cosine = f"{row['parity_cosine']:.5f}" if "parity_cosine" in row else ""
        print(f"  {name:8}{cosine} {row.get('reason', '')}", flush=True)
        # Not by `write_table`: what was measured earlier is only replaced by what is measured now.
        results.write_csv(run.folder / "exports.csv", list(rows.values()), EXPORT_COLUMNS)
    results.write_json(run.folder / "exports_environment.json", run.environment)
    return rows


# --- building a TensorRT engine -------------------------------------------------------------------


def identify(job: EngineJob, device: Any) -> dict[str, Any]:
    """All that decides whether a plan fits: it is in the plan's name and on its card."""
    import tensorrt as trt

    return {
        "onnx": job.export["sha256"],
        "precision": job.precision,
        "batch_sizes": job.engine_batch_sizes,
        "optimization_level": job.optimization_level,
        "detailed": job.detailed,
        "gpu": device.name(),
        "compute_capability": list(device.compute_capability()),
        "tensorrt": trt.__version__,
        "cuda": torch.version.cuda,
        "format": PLAN_FORMAT,
    }


def make_engine(job: EngineJob) -> dict[str, Any]:
    """In a worker: have the candidate's engine in the folder, with its card; the columns on it.

    Raises:
        EngineError, MemoryError: TensorRT cannot parse, build or load it.
    """
    benchmark.check_capability(job.precision)
    with tensorrt_runner.primary_context() as device:
        onnx, identity = verify_onnx(job.export), identify(job, device)
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        path = job.engine_dir / f"{onnx.stem}-{job.precision}-{key}.plan"
        seconds = None
        # Missing, damaged or foreign: build it; lack of memory is no reason to.
        with contextlib.suppress(EngineError):
            tensorrt_runner.load_engine(tensorrt_runner.read_plan(path))
            seconds = json.loads(path.with_suffix(".json").read_text())["build_seconds"]
        cached = seconds is not None
        if not cached:
            start = time.perf_counter()
            label = f"{identity['tensorrt']}-{identity['cuda']}-{identity['gpu']}"
            timing_cache = job.timing_dir / f"timing-{re.sub('[^0-9a-zA-Z.]+', '-', label)}.cache"
            plan = build_plan(job, onnx, timing_cache)
            tensorrt_runner.load_engine(plan)
            seconds = round(time.perf_counter() - start, 2)
            card = {
                "identity": identity,
                "sha256": hashlib.sha256(plan).hexdigest(),
                "build_seconds": seconds,
            }
            results.replace_file(path, plan)
            results.write_json(path.with_suffix(".json"), card)
    return {"engine_file": str(path), "engine_build_seconds": seconds, "engine_cached": cached}


def build_plan(job: EngineJob, onnx: Path, timing_cache: Path) -> bytes:
    """Parse the ONNX file and build its engine; the timing cache makes the next build faster."""
    import tensorrt as trt

    builder = tensorrt_runner.create(trt.Builder)
    network = builder.create_network(
        1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # version 11 knows nothing else
    )
    parse_onnx(network, onnx)
    config = configure(builder, network, job)
    cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.exists() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):  # of another GPU or TensorRT
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    tensorrt_runner.take_errors()  # of a cache that is damaged: it is not used
    with tqdm(desc=f"building {onnx.stem}", total=0, disable=None, leave=False) as bar:
        config.progress_monitor = make_monitor(bar)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise tensorrt_runner.refusal(f"TensorRT cannot build {onnx.name}")
    tensorrt_runner.take_errors()  # of kernels that it tried and left out
    results.replace_file(timing_cache, bytes(cache.serialize()))
    return bytes(plan)


def parse_onnx(network: Any, path: Path) -> None:
    """Parse by path, which finds external weights too; every error is printed."""
    import tensorrt as trt

    parser = trt.OnnxParser(network, tensorrt_runner.shared_logger())
    if parser.parse_from_file(str(path)):
        return
    errors = [str(parser.get_error(i)).strip() for i in range(parser.num_errors)]
    for error in errors:
        print(f"{path.name}: {error}", file=sys.stderr)
    first = (errors or tensorrt_runner.take_errors() or ["no reason given"])[0]
    raise EngineError(f"TensorRT cannot parse {path.name}: {first}")


def configure(builder: Any, network: Any, job: EngineJob) -> Any:
    """Set what the ONNX file does not decide, and a profile for each batch size.

    A profile of one batch size gives faster kernels than one wide range.
    """
    import tensorrt as trt

    config = builder.create_builder_config()
    config.builder_optimization_level = job.optimization_level
    if job.detailed:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job.precision == "tf32":
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and float32 would not be float32
    images = network.get_input(0)
    size = job.columns["image_size"]  # which a user's file may leave open
    for batch_size in job.engine_batch_sizes:
        shape = trt.Dims([batch_size, 3, size, size])
        profile = builder.create_optimization_profile()
        profile.set_shape(images.name, shape, shape, shape)
        if config.add_optimization_profile(profile) < 0:
            raise tensorrt_runner.refusal(f"TensorRT refuses a profile for {batch_size} images")
    return config


def make_monitor(bar: Any) -> Any:
    """A `trt.IProgressMonitor` that moves a bar over the steps of all phases known so far."""
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            bar.total += num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            bar.update()
            return True  # False would end the build

        def phase_finish(self, phase_name: str) -> None:
            bar.refresh()

    return Monitor()


def list_layers(job: EngineJob) -> Path:
    """In a worker: a file of the layers and their times, of an engine built for that."""
    plan = tensorrt_runner.read_plan(Path(make_engine(job)["engine_file"]))
    size = max(job.engine_batch_sizes)
    with tensorrt_runner.primary_context(), Runner(plan, size, cuda_graph=False) as runner:
        layers = runner.layers()
    path = job.engine_dir / f"{Path(job.export['file']).stem}-{job.precision}-layers.json"
    results.replace_file(path, json.dumps(layers, indent=1).encode())
    return path


def add_engine(job: EngineJob, layers: bool) -> EngineJob:
    """Have an engine built by a process that shares the GPU's memory with no other.

    Returns:
        The job, if it is one of TensorRT with its plan, or with the reason why there is none.
    """
    if job.build != build_tensorrt or job.missing:
        return job
    with Worker() as worker:
        engine = attempt(worker.run, make_engine, job)
        columns = dict(job.columns) | (engine.value or {})
        if engine.ok and layers:
            listed = attempt(worker.run, list_layers, replace(job, detailed=True))
            print(f"  layers {listed.value or listed.reason}", flush=True)
    if not engine.ok:
        print(f"  engine {job.candidate:24}{engine.status}: {engine.reason}", flush=True)
        return replace(job, missing=engine)
    kept = ", kept" if columns["engine_cached"] else ""
    print(f"  engine {job.candidate:24}{columns['engine_build_seconds']:.1f} s{kept}", flush=True)
    results.written.append(Path(columns["engine_file"]))
    return replace(job, columns=columns)


# --- throughput with several streams --------------------------------------------------------------


def measure_streams(
    job: EngineJob, images: np.ndarray, counts: Sequence[int], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """In a worker: how many images per second an engine serves with so many CUDA streams.

    Each stream has an engine, pinned buffers and a CUDA graph of its own, so that the copies of one
    batch overlap with the work on others. The weights are on the GPU once for each stream.

    Args:
        images: float32 `[B, 3, H, W]`, preprocessed: the batch that every stream serves.
        counts: numbers of streams; they take turns in each round.
        seconds: of one turn.

    Returns:
        The columns of each count: the median of images per second over the rounds, and the latency
        of a batch by the host's clock, from the start of its upload until its logits are there.
    """
    plan = tensorrt_runner.read_plan(Path(job.columns["engine_file"]))
    found: dict[int, list[tuple[float, list[float]]]] = {count: [] for count in counts}
    with contextlib.ExitStack() as stack:
        stack.enter_context(tensorrt_runner.primary_context())
        runners = []
        for _ in range(max(counts)):
            runners.append(stack.enter_context(Runner(plan, job.batch_size, job.cuda_graph)))
            np.copyto(runners[-1].host_images, images)
        for turn in range(rounds + 1):
            for count in counts:
                rate, latencies = serve_streams(runners[:count], seconds)
                if turn:  # the first one warms up
                    found[count].append((rate * len(images), latencies))
    rows = []
    for count, turns in found.items():
        latencies_ms = 1000 * np.concatenate([latencies for _, latencies in turns])
        row = {
            "streams": count,
            "images_per_s": float(np.median([rate for rate, _ in turns])),
            "latency_ms_median": float(np.median(latencies_ms)),
            "latency_ms_p99": timing.p99_of(latencies_ms),
            "rounds": rounds,
            "calls": len(latencies_ms),
        }
        rows.append(row)
    return rows


def serve_streams(runners: Sequence[Runner], seconds: float) -> tuple[float, list[float]]:
    """Keep every stream busy for so long; batches per second, and latencies in seconds.

    The rate counts until the last batch is done: it is never too high.
    """
    starts: dict[Runner, float] = {}
    latencies = []
    begin = time.perf_counter()
    for runner in itertools.cycle(runners):
        if runner in starts:
            runner.wait()
            latencies.append(time.perf_counter() - starts.pop(runner))
            if time.perf_counter() - begin > seconds:
                break
        starts[runner] = time.perf_counter()
        runner.submit(runner.host_images)
    for runner in starts:  # the oldest first
        runner.wait()
        latencies.append(time.perf_counter() - starts[runner])
    return len(latencies) / (time.perf_counter() - begin), latencies


def compare_streams(
    run: Run,
    jobs: Sequence[EngineJob],
    timed: Sequence[Mapping[str, Any]],
    counts: Sequence[int],
) -> list[dict[str, Any]]:
    """Rows of STREAM_COLUMNS for every engine, batch size and number of streams; streams.csv.

    Args:
        timed: rows of COLUMNS; an engine that is not ok there is not measured here.
    """
    rows: list[dict[str, Any]] = []
    passed = {(row["candidate"], row["batch_size"]) for row in timed if row["status"] == "ok"}
    engines = [job for job in jobs if job.build == build_tensorrt]
    for job, batch_size in itertools.product(engines, run.batch_sizes):
        if (job.candidate, batch_size) not in passed:
            continue
        row: dict[str, Any] = {"model": run.source.name, "candidate": job.candidate}
        row |= {"precision": job.precision, "batch_size": batch_size, "status": "ok"}
        images = data.preprocess(run.speed.images[:batch_size], run.model.preprocessing)
        chosen = replace(job, batch_size=batch_size)
        measured: list[dict[str, Any]] = [{}]
        with recorded(row), Worker() as worker:
            arguments = (chosen, images.numpy(), counts, run.rounds, run.block_seconds)
            measured = worker.run(measure_streams, *arguments)
        rows += [row | columns for columns in measured]
        run.write_table("streams.csv", rows, STREAM_COLUMNS)
    return rows


def choose_streams(rows: Sequence[Mapping[str, Any]], most_ms: float) -> str:
    """Which engine, batch size and streams serve most images within a latency, as a sentence."""
    sure = [row for row in rows if row["status"] == "ok" and row["latency_ms_p99"] is not None]
    if not sure:
        return "too few batches for a 99th percentile: use more --rounds or --block-seconds"
    within = [row for row in sure if row["latency_ms_p99"] <= most_ms]
    if not within:
        return f"no engine serves 99 % of its batches within {most_ms:g} ms"
    best = max(within, key=lambda row: row["images_per_s"])
    return (
        f"most images within {most_ms:g} ms for 99 % of the batches: {best['images_per_s']:,.0f}/s "
        f"by {best['candidate']}, batch size {best['batch_size']}, streams {best['streams']}"
    )


# --- the command line -----------------------------------------------------------------------------


def part2_network(**architecture: Any) -> nn.Module:
    """Part 2's network, built from its card."""
    from part2_tune import SmallCNN

    return SmallCNN(**architecture)


def newest_network() -> str:
    """What Part 2 saved last, of its winner if that is not the default; else the reference ViT."""
    saved = sorted(PART2_RESULTS.glob("*/*.safetensors"), key=lambda path: path.stat().st_mtime)
    if not saved:
        return "vit_tiny_imagenet"
    best = saved[-1].with_name("best.safetensors")
    return str(best if best in saved else saved[-1])


def dataset_of(name: str) -> str:
    """The data set that a model was trained on: its card's, else Tiny-ImageNet."""
    path = Path(name) if name.endswith(".safetensors") else WEIGHTS_DIR / f"{name}.safetensors"
    try:
        return str(json.loads(path.with_suffix(".json").read_text())["dataset"])
    except (OSError, ValueError, LookupError, TypeError):
        return "tiny-imagenet"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `--quick` changes the defaults, and explicit flags still win."""
    parser = cli.Parser(__doc__)
    benchmark.add_arguments(parser, Path("results/part3"), [1, 8, 32, 128])
    parser.set_defaults(memory=False)
    add = parser.add_argument
    add("--onnx", type=Path, help="an ONNX file of the model that you made: measured, too")
    add("--export-only", action="store_true", help="write and check the files, measure nothing")
    add("--layers", action="store_true", help="list the layers of each engine (a second build)")
    level = "of TensorRT's builder: higher searches longer for faster kernels"
    add("--optimization-level", type=int, choices=range(6), default=3, help=level)
    replay = "replay TensorRT engines as CUDA graphs"
    add("--cuda-graph", action=argparse.BooleanOptionalAction, default=True, help=replay)
    several = "measure throughput, host to host, with so many CUDA streams, e.g. 1,2,4"
    add("--streams", type=cli.int_list, help=several)
    bound = "ms: name what serves most images with 99 %% of the batches faster; with --streams"
    add("--max-latency", type=cli.positive_float, default=10.0, help=bound)
    args = cli.parse_quick(parser, argv, QUICK)
    args.model = args.model or newest_network()
    args.dataset = args.dataset or dataset_of(args.model)
    return args


def check_flags(args: argparse.Namespace, device: str) -> None:
    """UserError for a file that is not there, and for what needs a GPU or a measurement."""
    if args.onnx and not args.onnx.is_file():
        raise cli.UserError(f"--onnx {args.onnx} is no file")
    if (args.streams or args.layers) and device != "cuda":
        raise cli.UserError("--streams and --layers are of TensorRT engines: use an NVIDIA GPU")
    if (args.streams or args.layers) and args.export_only:
        raise cli.UserError("--streams and --layers need engines, --export-only builds none")


def require_fit(own: Path, reference: Reference, engine_dir: Path) -> None:
    """UserError if a user's ONNX file is not one of the model, or would be written over."""
    if own.resolve().parent == engine_dir.resolve():
        raise cli.UserError(f"--onnx {own} is where this run writes its files: copy it elsewhere")
    size, outputs = reference.preprocessing.input_size, reference.logits.shape[1]
    if not (checked := attempt(onnx_tools.check_onnx, own, size, outputs)).ok:
        raise cli.UserError(f"--onnx {own} is not an ONNX file of this model: {checked.reason}")


def open_engine_dir(folder: Path) -> Path:
    """Make the folder of files and engines, without what a run left there that was killed."""
    for unfinished in cli.make_output_dir(folder).glob(".unfinished-*"):
        shutil.rmtree(unfinished)
    return folder


def list_candidates() -> None:
    """Print each candidate with its device, its precision and one line on what it is."""
    for name, candidate in CANDIDATES.items():
        what = candidate.build.__doc__
        print(f"{name:24}{candidate.device:6}{candidate.precision:6}{what}")


def choose_candidates(wanted: Sequence[str] | None, device: str, own: bool) -> list[str]:
    """The candidates of this run with their baselines; a CPU run lists those it lacks a GPU for."""
    for name in wanted or ():
        cli.check_name(name, CANDIDATES, "candidate")
        if CANDIDATES[name].export == "own" and not own:
            raise cli.UserError(f"--candidates {name}: it runs the file that --onnx names")
    everything = [name for name, c in CANDIDATES.items() if device in ("cpu", c.device)]
    chosen = {next(name for name, c in CANDIDATES.items() if c.device == device)}
    chosen |= set(wanted or everything)
    chosen |= {name for name, c in CANDIDATES.items() if c.export == "own" and c.device == device}
    if device == "cuda":
        precisions = {CANDIDATES[name].precision for name in chosen} & GRAPH_BASELINES.keys()
        chosen |= {GRAPH_BASELINES[precision] for precision in precisions}
    return [name for name, c in CANDIDATES.items() if name in chosen and (own or c.export != "own")]


def choose_exports(names: Sequence[str], own: bool) -> list[str]:
    """The exports that these candidates read, the one that 8 bits start from, and one's own."""
    wanted = {CANDIDATES[name].export for name in names} | ({"own"} if own else set())
    if any(CANDIDATES[name].precision in EIGHT_BIT for name in names):
        wanted.add("fp16")
    return [export for export in EXPORTS if export in wanted]


def why_missing(
    candidate: Candidate, device: str, exports: Mapping[str, Mapping[str, Any]]
) -> Outcome | None:
    """Why a candidate cannot start here; None if it can."""
    if candidate.device != device:
        reason = "no NVIDIA GPU is in use" if device == "cpu" else "it runs with --device cpu"
        return Outcome("unavailable", reason)
    row = exports.get(candidate.export or "", {"status": "ok"})
    if row["status"] == "ok":
        return None
    what = "--onnx" if candidate.export == "own" else f"no {candidate.export} file"
    return Outcome(row["status"], f"{what}: {row['reason']}")


def make_job(
    run: Run, name: str, job: EngineJob, exports: Mapping[str, Mapping[str, Any]]
) -> EngineJob:
    """The job of one candidate, with the reason if it cannot start."""
    candidate = CANDIDATES[name]
    columns = {"gflop_per_image": run.cost.gflop, "image_size": run.model.preprocessing.input_size}
    graph_baseline = GRAPH_BASELINES.get(candidate.precision)
    return replace(
        job,
        candidate=name,
        build=candidate.build,
        precision=candidate.precision,
        export=exports.get(candidate.export or "", {}),
        needs_module=candidate.export is None,
        missing=why_missing(candidate, run.device, exports),
        columns=columns | {"precision": candidate.precision},
        graph_baseline=graph_baseline if candidate.device == "cuda" else None,
    )


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Export the ONNX files, build the engines, then measure every candidate side by side."""
    args = parse_args(argv)
    if args.list:
        list_candidates()
        return 0
    device = cli.pick_device(args.device).type
    check_flags(args, device)
    names = choose_candidates(args.candidates, device, bool(args.onnx))
    with benchmark.open_run(args, part2_network, images=not args.export_only) as run:
        job = EngineJob(
            candidate="",
            build=build_eager,
            source=run.source,
            device=device,
            threads=run.threads[0],
            export={},
            engine_dir=open_engine_dir(run.folder / "engines"),
            timing_dir=args.output_dir,
            engine_batch_sizes=tuple(sorted(run.batch_sizes)),
            optimization_level=args.optimization_level,
            cuda_graph=args.cuda_graph,
        )
        reference, wanted = make_reference(run), choose_exports(names, bool(args.onnx))
        if args.export_only and not wanted:
            raise cli.UserError("--export-only: none of the --candidates reads an ONNX file")
        if args.onnx:
            require_fit(args.onnx, reference, job.engine_dir)
        exports = export_all(run, wanted, job, reference, args.onnx)
        failed = any(row["status"] == "failed" for row in exports.values())
        if args.export_only:
            print(run.folder / "exports.csv")
            return int(failed)
        jobs = [add_engine(make_job(run, name, job, exports), args.layers) for name in names]
        check, on_gpu = functools.partial(check_parity, reference), device == "cuda"
        rows = benchmark.measure(run, jobs, "tensorrt.csv", COLUMNS, check, transfers=on_gpu)
        if args.streams:
            served = compare_streams(run, jobs, rows, args.streams)
            failed |= any(row["status"] == "failed" for row in served)
            results.print_table(served, SHOWN_STREAMS)
            print(choose_streams(served, args.max_latency))
        shown = {key: s for key, s in SHOWN.items() if key != "threads" or len(run.threads) > 1}
        return benchmark.finish(run, "tensorrt.csv", rows, shown) or int(failed)


if __name__ == "__main__":
    sys.exit(main())
