"""Candidates of one model, measured side by side: a row each with latency, logits and memory.

Every candidate is built in a worker process of its own and serves questions there: its logits, the
time of k calls, its memory. The parent asks one at a time, so that none disturbs another.
"""

import contextlib
import gc
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import cli, data, evaluation, timing
from utils.cost import Shape, count_cost, quantized_share
from utils.isolation import (
    UnavailableError,
    Worker,
    peak_memory_mb,
    recorded,
    reset_peak_memory,
)
from utils.models import LoadedModel, load_model

NEEDS_CAPABILITY = {"tf32": (8, 0), "fp8": (8, 9)}
MEMORY_BATCHES = 3
INPUT_BATCHES = 4  # timed inputs take turns, so that consecutive calls differ
TRANSFER_COLUMNS = {  # column: which of LATENCY_COLUMNS it is, with host-device transfers
    "transfers_latency_ms_median": "latency_ms_median",
    "transfers_latency_ms_p90": "latency_ms_p90",
    "transfers_wall_ms_mean": "wall_ms_mean",
    "transfers_images_per_s": "images_per_s",
    "transfers_speedup": "speedup",
}
GRAPH_COLUMNS = {  # the same over a second baseline, the column `graph_baseline`
    "speedup_over_graph": "speedup",
    "speedup_over_graph_p10": "speedup_p10",
    "speedup_over_graph_p90": "speedup_p90",
}


@dataclass(frozen=True)
class Job:
    """What a worker process needs to know to build one candidate."""

    candidate: str
    build: "Build"
    model: str
    untrained: bool
    batch_size: int
    device: str
    threads: int
    seed: int
    folder: str  # for exported files, shared by the candidates of a run
    load: Callable[[str, bool], LoadedModel] = load_model  # from `model` and `untrained`
    needs_module: bool = True  # on the device; a candidate that reads a file does not


@dataclass(frozen=True)
class Variant:
    """A built candidate: float32 images `[B, 3, S, S]` -> logits `[B, C]`."""

    call: Callable[[Tensor], Any]
    size_bytes: int
    quantized_shapes: list[Shape]  # of the weight matrices that are held in 8 bits
    extra_build_seconds: float = 0.0  # spent earlier in the run, on a file that candidates share
    uploads: bool = False  # `call` also takes images in pinned host memory
    host_call: Callable[[Tensor], Any] | None = None  # instead of `round_trip`, if it has its own
    columns: Mapping[str, Any] = field(default_factory=dict)  # further columns of its row
    onnx_path: Path | None = None  # its file, if ONNX Runtime runs it


Build = Callable[[nn.Module, Tensor, Job], Variant]  # takes a float32 module, an example batch
Predict = Callable[[np.ndarray], np.ndarray]  # uint8 images [N, 3, H, W] -> logits [N, C]
Check = Callable[[dict[str, Any], Predict], None]


# --- what a worker process does: it builds one candidate and serves it ----------------------------

_served: dict[str, Any] = {}  # in a worker process only: its job, model and variant


def open_candidate(job: Job) -> dict[str, Any]:
    """Build the candidate in this process; return the columns known once it is built."""
    prepare_process(job)
    model = job.load(job.model, job.untrained)
    size = model.preprocessing.input_size
    cost = count_cost(model.module, torch.zeros(1, 3, size, size))
    variant, seconds = build_variant(model, job)
    return {
        "size_mb": variant.size_bytes / 1e6,
        "build_seconds": seconds,
        **quantized_share(cost, variant.quantized_shapes),
        **variant.columns,
    }


def prepare_process(job: Job) -> None:
    """Set this worker's global state: no gradients, threads, TF32 off, cuDNN tuned, seeds."""
    warnings.simplefilter("ignore")  # deprecations of the routes compared
    torch.set_grad_enabled(False)
    torch.set_num_threads(job.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # as ONNX Runtime and TensorRT, it tries its kernels
    cli.seed_everything(job.seed)


def require_compiler(device: str) -> None:
    """UnavailableError unless torch.compile finds a compiler: of C++ for a CPU, of C for a GPU."""
    if device == "cuda":
        language = "C"
        found = any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler

        language, found = "C++", False
        with contextlib.suppress(Exception):
            found = bool(get_cpp_compiler())
    if not found:
        raise UnavailableError(f"torch.compile needs a {language} compiler (gcc) on this machine")


def build_variant(model: LoadedModel, job: Job) -> tuple[Variant, float]:
    """Build the candidate and call it once; return it and the seconds that took."""
    size = model.preprocessing.input_size
    example = torch.rand(job.batch_size, 3, size, size, device=job.device)
    module = model.module.to(job.device) if job.needs_module else model.module
    start = time.perf_counter()
    variant = job.build(module, example, job)
    variant.call(example)
    timing.synchronize()
    _served.update(job=job, preprocessing=model.preprocessing, variant=variant)
    return variant, time.perf_counter() - start + variant.extra_build_seconds


def predict_logits(images: np.ndarray) -> np.ndarray:
    """Logits `[N, C]` of uint8 images `[N, 3, H, W]`, in batches of the candidate's size."""
    job, variant, how = _served["job"], _served["variant"], _served["preprocessing"]
    tensor = torch.from_numpy(images)
    return evaluation.predict(variant.call, tensor, how, job.batch_size, job.device).numpy()


def load_inputs(images: np.ndarray) -> None:
    """Preprocess uint8 images `[K * B, 3, H, W]` into the K batches that will be timed."""
    _served["inputs"] = split_inputs(images, _served["preprocessing"], _served["job"])


def split_inputs(images: np.ndarray, how: data.Preprocessing, job: Job) -> list[Tensor]:
    """Batches of the job's size, preprocessed, on its device."""
    batches = torch.from_numpy(images).split(job.batch_size)
    return [data.preprocess(batch, how, job.device) for batch in batches]


def load_host_inputs() -> None:
    """Copy the batches to pinned host memory, for timing with transfers."""
    variant, inputs = _served["variant"], _served["inputs"]
    _served["host_inputs"] = [batch.cpu().pin_memory() for batch in inputs]
    _served["host_call"] = variant.host_call or round_trip(variant, inputs[0])


def round_trip(variant: Variant, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Images and logits in pinned host memory; both copies on the stream of the call."""
    images = torch.empty_like(example)
    logits = torch.empty(variant.call(example).shape, pin_memory=True)

    def host_call(x: Tensor) -> Tensor:
        output = variant.call(x if variant.uploads else images.copy_(x, non_blocking=True))
        return logits.copy_(output, non_blocking=True)

    return host_call


def time_calls(calls: int) -> timing.Block:
    """Time calls of the candidate; images and logits stay on the device.

    A CUDA graph and TensorRT begin with a copy of the images, on the device, into the buffer that
    they read; eager PyTorch and ONNX Runtime read them where they are.
    """
    return timing.time_block(
        _served["variant"].call, _served["inputs"], calls, _served["job"].device
    )


def time_host_calls(calls: int) -> timing.Block:
    """Time calls with the transfers: images start and logits end in pinned host memory."""
    return timing.time_block(
        _served["host_call"], _served["host_inputs"], calls, _served["job"].device
    )


def measure_memory(job: Job, images: np.ndarray) -> dict[str, float | None]:
    """Peak memory in MB of building the candidate, and then of running it.

    CPU: the resident set of the whole process, libraries included; what building left behind is
    handed back before the second figure. GPU: what PyTorch reserved.
    """
    prepare_process(job)
    build_variant(job.load(job.model, job.untrained), job)
    load_inputs(images)
    build_peak = peak_memory_mb(job.device)
    gc.collect()
    reset_peak_memory(job.device)
    time_calls(MEMORY_BATCHES)
    return {"build_peak_memory_mb": build_peak, "peak_memory_mb": peak_memory_mb(job.device)}


def check_capability(precision: str) -> None:
    """UnavailableError if this GPU has no arithmetic of that precision."""
    needed = NEEDS_CAPABILITY.get(precision, (0, 0))
    if torch.cuda.get_device_capability() < needed:
        wanted = ".".join(map(str, needed))
        raise UnavailableError(f"{precision} needs a GPU of compute capability {wanted} or newer")


def allow_tf32() -> None:
    """TF32 matrix products and convolutions in this process; UnavailableError without them."""
    check_capability("tf32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


# --- what the parent does -------------------------------------------------------------------------


def measure_setting(
    jobs: Sequence[Job],
    speed_images: Tensor,
    accuracy_images: Tensor | None,
    rounds: int,
    block_seconds: float,
    max_slowdown: float,
    check: Check | None = None,
    second_baselines: Mapping[str, str] | None = None,
    transfers: bool = False,
) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Build all candidates for one batch size and thread count, then time them in rounds.

    Args:
        jobs: one a candidate, the baseline first; same batch size, threads and device.
        speed_images: uint8 `[K * B, 3, H, W]`, the K batches that take turns.
        accuracy_images: uint8 `[N, 3, H, W]`, or None if logits are not wanted.
        rounds: how often each candidate has its turn.
        block_seconds: length of the baseline's turn; the others get as many calls, and fewer
            where that would take more than twice as long.
        max_slowdown: a candidate this many times slower than the baseline is timed, but its
            logits are not taken.
        check: called with each candidate's row and its `predict_logits` before it is timed; it
            adds columns to the row, or raises to keep the candidate out of the timing.
        second_baselines: for each candidate another; the speedup over that goes into GRAPH_COLUMNS.
        transfers: time the candidates once more with host-device transfers, TRANSFER_COLUMNS.

    Returns:
        A row for each candidate, and the logits `[N, C]` of those that were scored.

    Raises:
        UserError, RuntimeError: the baseline did not run.
    """
    baseline, batch_size = jobs[0].candidate, jobs[0].batch_size
    load_before = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        workers = {job.candidate: stack.enter_context(Worker()) for job in jobs}
        for worker in workers.values():  # they start side by side; none builds before all are idle
            worker.run(os.getpid)
        rows, latency_ms, logits = build_all(
            jobs, workers, speed_images, accuracy_images, max_slowdown, check
        )
        calls = {
            name: min(
                timing.calls_per_block(latency_ms[baseline], block_seconds),
                timing.calls_per_block(latency, 2 * block_seconds),
            )
            for name, latency in latency_ms.items()
        }
        measure = partial(timing.measure_rounds, rounds=rounds, calls=calls, seed=jobs[0].seed)
        turns = {name: partial(workers[name].run, time_calls) for name in calls}
        blocks = measure(turns, guard=lambda name: recorded(rows[name]))
        check_baseline(rows[baseline], batch_size)
        load = {"load_average_before": load_before, "load_average_after": os.getloadavg()[0]}
        for name, latency_row in timing.summarise(blocks, baseline, batch_size).items():
            rows[name] |= latency_row | load
        add_graph_speedups(rows, blocks, second_baselines or {}, batch_size)
        if transfers:
            timed = {name: workers[name] for name in blocks}
            add_transfers(rows, timed, measure, baseline, batch_size)
    return rows, {name: output for name, output in logits.items() if rows[name]["status"] == "ok"}


def build_all(
    jobs: Sequence[Job],
    workers: Mapping[str, Worker],
    speed_images: Tensor,
    accuracy_images: Tensor | None,
    max_slowdown: float,
    check: Check | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, float], dict[str, Tensor]]:
    """Build, check, warm up and score the candidates one after the other; see `measure_setting`.

    Returns:
        A row for each candidate, the warm latency in ms of those that can be timed, and the logits
        `[N, C]` of those that were scored.
    """
    baseline = jobs[0].candidate
    rows: dict[str, dict[str, Any]] = {}
    latency_ms: dict[str, float] = {}
    logits: dict[str, Tensor] = {}
    for job in jobs:
        name, worker = job.candidate, workers[job.candidate]
        row = rows[name] = {"candidate": name, "status": "ok"}
        with recorded(row):
            row |= worker.run(open_candidate, job)
            if check is not None:
                check(row, partial(worker.run, predict_logits))
            worker.run(load_inputs, speed_images.numpy())
            latency = timing.warm_up(partial(worker.run, time_calls))
            slowdown = latency / latency_ms.get(baseline, latency)
            if accuracy_images is not None and slowdown > max_slowdown and name != baseline:
                add_reason(row, f"not scored: {slowdown:.0f} times slower than {baseline}")
            elif accuracy_images is not None:
                output = worker.run(predict_logits, accuracy_images.numpy())
                logits[name] = torch.from_numpy(output)
            latency_ms[name] = latency
        print(f"  {name:24}{describe(row)}", flush=True)
        check_baseline(rows[baseline], job.batch_size)
        if name not in latency_ms:
            worker.stop()  # what it holds is memory that the others need
    return rows, latency_ms, logits


def add_graph_speedups(
    rows: dict[str, dict[str, Any]],
    blocks: Mapping[str, Sequence[timing.Block]],
    second_baselines: Mapping[str, str],
    batch_size: int,
) -> None:
    """Fill GRAPH_COLUMNS; a second baseline that was not timed leaves them empty, with a note."""
    for second in dict.fromkeys(second_baselines.values()):
        served = [name for name in blocks if second_baselines.get(name) == second]
        if second not in blocks:
            if served:
                reason = rows.get(second, {}).get("reason", "it was not chosen")
                print(f"note: there is no speedup over {second}: {reason}")
            continue
        chosen = {name: blocks[name] for name in (second, *served)}
        summary = timing.summarise(chosen, second, batch_size)
        for name in served:
            rows[name]["graph_baseline"] = second
            rows[name] |= {column: summary[name][like] for column, like in GRAPH_COLUMNS.items()}


def add_transfers(
    rows: dict[str, dict[str, Any]],
    workers: Mapping[str, Worker],
    measure: Callable[..., dict[str, list[timing.Block]]],
    baseline: str,
    batch_size: int,
) -> None:
    """Time the candidates once more, with transfers; who fails only here keeps what it has."""
    outcomes: dict[str, dict[str, Any]] = {name: {} for name in workers}
    turns: dict[str, timing.TimeBlock] = {}
    for name, worker in workers.items():
        with recorded(outcomes[name]):
            worker.run(load_host_inputs)
            turns[name] = partial(worker.run, time_host_calls)
    blocks = measure(turns, guard=lambda name: recorded(outcomes[name]))
    for name, outcome in outcomes.items():
        if outcome:
            add_reason(rows[name], f"transfers not measured: {outcome['reason']}")
    if baseline not in blocks:
        print(f"note: there are no times with transfers: {outcomes[baseline]['reason']}")
        return
    for name, latency_row in timing.summarise(blocks, baseline, batch_size).items():
        rows[name] |= {column: latency_row[like] for column, like in TRANSFER_COLUMNS.items()}


def note_load(threads: int) -> None:
    """Say so if other programs seem to use the cores that `threads` threads will need."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load + threads > cores + 0.5:
        print(
            f"note: the last minute's load average is {load:.1f} on {cores} cores; what shares "
            f"them with the benchmark spoils its times"
        )


def add_reason(row: dict[str, Any], text: str) -> None:
    """Say something more of a candidate that ran."""
    row["reason"] = "; ".join(filter(None, [row.get("reason"), text]))


def check_baseline(row: dict[str, Any], batch_size: int) -> None:
    """Without its baseline a comparison means nothing: UserError, or RuntimeError if it failed."""
    message = f"{row['candidate']} did not run at batch size {batch_size}: {row.get('reason')}"
    if row["status"] == "unavailable":
        raise cli.UserError(f"{message}; try smaller --batch-sizes")
    if row["status"] == "failed":
        raise RuntimeError(message)


def describe(row: dict[str, Any]) -> str:
    """One line on how building went."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    return f"built in {row['build_seconds']:.1f} s {row.get('reason', '')}"


def load_image_sets(
    load: Callable[..., data.ImageSet], dataset: str, num_images: int | None, batch: int, seed: int
) -> tuple[data.ImageSet, data.ImageSet]:
    """The images for accuracy, and INPUT_BATCHES batches for speed (fewer if few images).

    Args:
        load: `data.load_images` of that data set.
        batch: the largest of the run, which every smaller one is cut from.
    """
    accuracy = load(split=data.ACCURACY_SPLIT[dataset], num_images=num_images, seed=seed)
    speed = load(split=data.SPEED_SPLIT[dataset])
    if batch > len(speed):
        raise cli.UserError(
            f"batches of {batch}: {dataset} {speed.split} has {len(speed)} images; "
            f"use smaller --batch-sizes"
        )
    batches = min(INPUT_BATCHES, len(speed) // batch)
    return accuracy, data.take_subset(speed, batches * batch, seed)


def add_memory(rows: Sequence[dict[str, Any]], jobs: Sequence[Job], images: Tensor) -> None:
    """Measure each candidate's memory in a fresh process, after all timing is done."""
    for row, job in zip(tqdm(rows, desc="memory", disable=None, leave=False), jobs, strict=True):
        if row["status"] != "ok":
            continue
        outcome: dict[str, Any] = {}
        with recorded(outcome), Worker() as worker, tempfile.TemporaryDirectory() as folder:
            outcome |= worker.run(measure_memory, replace(job, folder=folder), images.numpy())
        if "status" in outcome:  # a measured candidate stays measured
            add_reason(row, f"memory not measured: {outcome['reason']}")
        else:
            row |= outcome
