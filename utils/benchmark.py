"""Candidates of one model, measured side by side: a row each with latency, logits and memory.

Every candidate is built in a worker process of its own and serves questions there: its logits, the
time of k calls, its memory. The parent asks one at a time, so that none disturbs another.
"""

import contextlib
import copy
import gc
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils import cli, data, evaluation, timing
from utils.cost import quantized_share
from utils.isolation import Worker, peak_memory_mb, recorded, reset_peak_memory
from utils.models import load_model

MEMORY_BATCHES = 3


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


@dataclass(frozen=True)
class Variant:
    """A built candidate: float32 images `[B, 3, S, S]` -> logits `[B, C]`."""

    call: Callable[[Tensor], Any]
    size_bytes: int
    quantized_shapes: list[tuple[int, int]]  # of the weight matrices that are held in 8 bits
    extra_build_seconds: float = 0.0  # spent earlier in the run, on a file that candidates share


Build = Callable[[nn.Module, Tensor, Job], Variant]  # takes a float32 module, an example batch


# --- what a worker process does: it builds one candidate and serves it ----------------------------

_served: dict[str, Any] = {}  # in a worker process only: its job, model and variant


def open_candidate(job: Job) -> dict[str, Any]:
    """Build the candidate in this process; return the columns known once it is built."""
    warnings.simplefilter("ignore")  # deprecations of the routes compared; the report names them
    torch.set_grad_enabled(False)
    torch.set_num_threads(job.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cli.seed_everything(job.seed)
    model = load_model(job.model, job.untrained)
    size = model.preprocessing.input_size
    example = torch.rand(job.batch_size, 3, size, size)
    original = copy.deepcopy(model.module)
    start = time.perf_counter()
    module, example = model.module.to(job.device), example.to(job.device)
    variant = job.build(module, example, job)
    variant.call(example)
    timing.synchronize()
    seconds = time.perf_counter() - start + variant.extra_build_seconds
    _served.update(job=job, preprocessing=model.preprocessing, variant=variant)
    return {
        "size_mb": variant.size_bytes / 1e6,
        "build_seconds": seconds,
        **quantized_share(original, example[:1].cpu(), variant.quantized_shapes),
    }


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


def time_calls(calls: int) -> timing.Block:
    """Time calls of the candidate; images and logits stay on the device."""
    return timing.time_block(
        _served["variant"].call, _served["inputs"], calls, _served["job"].device
    )


def measure_memory(job: Job, images: np.ndarray) -> dict[str, float | None]:
    """Peak memory in MB of building the candidate, and then of running it.

    CPU: the resident set of the whole process, libraries included; what building left behind is
    handed back before the second figure. GPU: what PyTorch allocated.
    """
    open_candidate(job)
    load_inputs(images)
    build_peak = peak_memory_mb(job.device)
    gc.collect()
    reset_peak_memory(job.device)
    time_calls(MEMORY_BATCHES)
    return {"build_peak_memory_mb": build_peak, "peak_memory_mb": peak_memory_mb(job.device)}


def measure_block(
    jobs: Sequence[Job],
    speed_images: Tensor,
    accuracy_images: Tensor | None,
    rounds: int,
    block_seconds: float,
    max_slowdown: float,
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

    Returns:
        A row for each candidate, and the logits `[N, C]` of those that were scored.

    Raises:
        RuntimeError: the baseline did not run.
    """
    baseline = jobs[0].candidate
    rows: dict[str, dict[str, Any]] = {}
    logits: dict[str, Tensor] = {}
    running: dict[str, timing.TimeBlock] = {}
    latency_ms: dict[str, float] = {}
    os.environ["OMP_NUM_THREADS"] = str(jobs[0].threads)  # inherited by the workers
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker()) for _ in jobs]
        for worker in workers:  # they import side by side; no build starts before all are idle
            worker.run(os.getpid)
        for job, worker in zip(jobs, workers, strict=True):
            name = job.candidate
            row = rows[name] = {"candidate": name, "status": "ok"}
            with recorded(row):
                row |= worker.run(open_candidate, job)
                worker.run(load_inputs, speed_images.numpy())
                time_block = partial(worker.run, time_calls)
                latency_ms[name] = timing.warm_up(time_block)
                slowdown = latency_ms[name] / latency_ms[baseline]
                if slowdown > max_slowdown:
                    row["reason"] = f"not scored: {slowdown:.0f} times slower than {baseline}"
                elif accuracy_images is not None:
                    output = worker.run(predict_logits, accuracy_images.numpy())
                    logits[name] = torch.from_numpy(output)
                running[name] = time_block
            print(f"  {name:20}{describe(row)}", flush=True)
            if baseline not in running:
                raise RuntimeError(f"the baseline {baseline} did not run: {row['reason']}")
        calls = {
            name: min(
                timing.calls_per_block(latency_ms[baseline], block_seconds),
                timing.calls_per_block(latency_ms[name], 2 * block_seconds),
            )
            for name in running
        }
        load_before = os.getloadavg()[0]
        blocks = timing.measure_rounds(running, rounds, calls, jobs[0].seed)
        load = {"load_average_before": load_before, "load_average_after": os.getloadavg()[0]}
    for name, latency in timing.summarise(blocks, baseline, jobs[0].batch_size).items():
        rows[name] |= latency | load
    return rows, logits


def describe(row: dict[str, Any]) -> str:
    """One line on how building went."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}"
    return f"built in {row['build_seconds']:.1f} s {row.get('reason', '')}"


def add_memory(rows: dict[str, dict[str, Any]], jobs: Sequence[Job], images: Tensor) -> None:
    """Measure each candidate's memory in a fresh process, after all timing is done."""
    for job in tqdm(jobs, desc="memory", disable=None, leave=False):
        row = rows[job.candidate]
        if row["status"] == "ok":
            with recorded(row), Worker() as worker:
                row |= worker.run(measure_memory, job, images.numpy())
