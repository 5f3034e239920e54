"""Candidates of one model, measured side by side: a row each with latency, logits and memory.

Every candidate is built in a worker process of its own and serves questions there: its logits, the
time of k calls, its memory. The parent asks one at a time, so that none disturbs another.
"""

import contextlib
import gc
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import cli, data, evaluation, timing
from utils.cost import Shape, count_cost, quantized_share
from utils.isolation import Worker, peak_memory_mb, recorded, reset_peak_memory
from utils.models import LoadedModel, load_model

MEMORY_BATCHES = 3
TRANSFER_COLUMNS = {  # column: which of LATENCY_COLUMNS it is, with host-device transfers
    "transfers_latency_ms_median": "latency_ms_median",
    "transfers_latency_ms_p90": "latency_ms_p90",
    "transfers_wall_ms_mean": "wall_ms_mean",
    "transfers_images_per_s": "images_per_s",
    "transfers_speedup": "speedup",
}
GRAPH_COLUMNS = {  # the same over a second baseline, PyTorch's CUDA graph
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


@dataclass(frozen=True)
class Variant:
    """A built candidate: float32 images `[B, 3, S, S]` -> logits `[B, C]`."""

    call: Callable[[Tensor], Any]
    size_bytes: int
    quantized_shapes: list[Shape]  # of the weight matrices that are held in 8 bits
    extra_build_seconds: float = 0.0  # spent earlier in the run, on a file that candidates share
    host_call: Callable[[Tensor], Any] | None = None  # instead of `round_trip`, if it has its own
    columns: Mapping[str, Any] = field(default_factory=dict)  # further columns of its row


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
    """Set this worker's global state: no gradients, threads, TF32 off, seeds."""
    warnings.simplefilter("ignore")  # deprecations of the routes compared
    torch.set_grad_enabled(False)
    torch.set_num_threads(job.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cli.seed_everything(job.seed)


def build_variant(model: LoadedModel, job: Job) -> tuple[Variant, float]:
    """Build the candidate and call it once; return it and the seconds that took."""
    size = model.preprocessing.input_size
    example = torch.rand(job.batch_size, 3, size, size, device=job.device)
    module = model.module.to(job.device)
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
    job = _served["job"]
    batches = torch.from_numpy(images).split(job.batch_size)
    how = _served["preprocessing"]
    _served["inputs"] = [data.preprocess(batch, how, job.device) for batch in batches]


def load_host_inputs() -> None:
    """Copy the batches to pinned host memory, for timing with transfers."""
    variant, inputs = _served["variant"], _served["inputs"]
    _served["host_inputs"] = [batch.cpu().pin_memory() for batch in inputs]
    _served["host_call"] = variant.host_call or round_trip(variant.call, inputs[0])


def round_trip(call: Callable[[Tensor], Any], example: Tensor) -> Callable[[Tensor], Tensor]:
    """Images and logits in pinned host memory; both copies on the stream of the call."""
    images = torch.empty_like(example)
    logits = torch.empty(call(example).shape, pin_memory=True)

    def host_call(x: Tensor) -> Tensor:
        images.copy_(x, non_blocking=True)
        return logits.copy_(call(images), non_blocking=True)

    return host_call


def time_calls(calls: int) -> timing.Block:
    """Time calls of the candidate; images and logits stay on the device."""
    return timing.time_block(
        _served["variant"].call, _served["inputs"], calls, _served["job"].device
    )


def capture(call: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """Record the calls as one CUDA graph; images are copied into its buffer on the device."""
    images = example.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose kernels and workspaces outside the graph
            call(images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = call(images)

    def replay(x: Tensor) -> Tensor:
        images.copy_(x)
        graph.replay()
        return logits

    return replay


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


# --- what the parent does -------------------------------------------------------------------------


def measure_block(
    jobs: Sequence[Job],
    speed_images: Tensor,
    accuracy_images: Tensor | None,
    rounds: int,
    block_seconds: float,
    max_slowdown: float,
    check: Check | None = None,
    second_baseline: str | None = None,
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
        second_baseline: a candidate; the speedup over it goes into GRAPH_COLUMNS.
        transfers: time the candidates once more with host-device transfers, TRANSFER_COLUMNS.

    Returns:
        A row for each candidate, and the logits `[N, C]` of those that were scored.

    Raises:
        UserError, RuntimeError: the baseline did not run.
    """
    baseline = jobs[0].candidate
    load_before = os.getloadavg()[0]
    rows: dict[str, dict[str, Any]] = {}
    logits: dict[str, Tensor] = {}
    running: dict[str, timing.TimeBlock] = {}
    hosts: dict[str, timing.TimeBlock] = {}  # the same candidates with transfers
    latency_ms: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker()) for _ in jobs]
        for worker in workers:  # they start side by side; no build begins before all are idle
            worker.run(os.getpid)
        for job, worker in zip(jobs, workers, strict=True):
            name, time_block = job.candidate, partial(worker.run, time_calls)
            row = rows[name] = {"candidate": name, "status": "ok"}
            with recorded(row):
                row |= worker.run(open_candidate, job)
                if check is not None:
                    check(row, partial(worker.run, predict_logits))
                worker.run(load_inputs, speed_images.numpy())
                if transfers:
                    worker.run(load_host_inputs)
                latency_ms[name] = timing.warm_up(time_block)
                slowdown = latency_ms[name] / latency_ms[baseline]
                if accuracy_images is not None and slowdown > max_slowdown:
                    row["reason"] = f"not scored: {slowdown:.0f} times slower than {baseline}"
                elif accuracy_images is not None:
                    output = worker.run(predict_logits, accuracy_images.numpy())
                    logits[name] = torch.from_numpy(output)
                running[name] = time_block
                hosts[name] = partial(worker.run, time_host_calls)
            print(f"  {name:20}{describe(row)}", flush=True)
            check_baseline(rows[baseline], job.batch_size)
            if name not in running:
                worker.stop()  # what it holds is memory that the others need
        calls = {
            name: min(
                timing.calls_per_block(latency_ms[baseline], block_seconds),
                timing.calls_per_block(latency_ms[name], 2 * block_seconds),
            )
            for name in running
        }
        measure = partial(
            timing.measure_rounds,
            rounds=rounds,
            calls=calls,
            seed=jobs[0].seed,
            guard=lambda name: recorded(rows[name]),
        )
        blocks = measure(running)
        check_baseline(rows[baseline], jobs[0].batch_size)
        host_blocks = measure({name: hosts[name] for name in blocks}) if transfers else {}
        check_baseline(rows[baseline], jobs[0].batch_size)
    load = {"load_average_before": load_before, "load_average_after": os.getloadavg()[0]}
    for name, latency in timing.summarise(blocks, baseline, jobs[0].batch_size).items():
        rows[name] |= latency | load
    for name, latency in summarise_if(host_blocks, baseline, jobs[0].batch_size).items():
        rows[name] |= {column: latency[source] for column, source in TRANSFER_COLUMNS.items()}
    for name, latency in summarise_if(blocks, second_baseline, jobs[0].batch_size).items():
        rows[name] |= {column: latency[source] for column, source in GRAPH_COLUMNS.items()}
    return rows, {name: output for name, output in logits.items() if rows[name]["status"] == "ok"}


def summarise_if(
    blocks: Mapping[str, Sequence[timing.Block]], baseline: str | None, batch_size: int
) -> dict[str, dict[str, float | None]]:
    """`timing.summarise`, or nothing if the baseline has no blocks."""
    if baseline is None or baseline not in blocks:
        return {}
    return timing.summarise(blocks, baseline, batch_size)


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


def add_memory(rows: Sequence[dict[str, Any]], jobs: Sequence[Job], images: Tensor) -> None:
    """Measure each candidate's memory in a fresh process, after all timing is done."""
    for row, job in zip(tqdm(rows, desc="memory", disable=None, leave=False), jobs, strict=True):
        if row["status"] != "ok":
            continue
        outcome: dict[str, Any] = {}
        with recorded(outcome), Worker() as worker, tempfile.TemporaryDirectory() as folder:
            outcome |= worker.run(measure_memory, replace(job, folder=folder), images.numpy())
        if "status" in outcome:  # a measured candidate stays measured
            outcome = {"reason": f"memory not measured: {outcome['reason']}"}
        row |= outcome
