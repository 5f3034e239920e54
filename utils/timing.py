"""Latency of several candidates, measured in one run of interleaved rounds.

A candidate is whatever can time a block of k calls and return a `Block`. A round gives every
candidate one block, in shuffled order, so that a drift of the machine hits all alike; a speedup is
the median over rounds of the ratio to the baseline's block of the same round. Nothing here knows
about models or data sets.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

Clock = Callable[[], int]  # nanoseconds

LATENCY_COLUMNS = (
    "latency_ms_median",
    "latency_ms_p90",
    "latency_ms_p99",
    "wall_ms_mean",
    "images_per_s",
    "speedup",
    "speedup_p10",
    "speedup_p90",
    "rounds",
    "calls",
)
CALLS_FOR_P99 = 100
WARM_UP_BLOCKS = 20  # at most; stable is when two blocks in a row agree
STABLE_WITHIN = 0.10
SLOW_MS = 2000.0


@dataclass(frozen=True)
class Block:
    """k consecutive calls: `latencies_ms` float64 `[k]`, and the host's wall time for all k."""

    latencies_ms: np.ndarray
    wall_ms: float


TimeBlock = Callable[[int], Block]


def time_block(
    call: Callable[[Any], Any],
    inputs: Sequence[Any],
    calls: int,
    device: torch.device | str = "cpu",
    clock: Clock = time.perf_counter_ns,
) -> Block:
    """Time `calls` calls; the inputs take turns, and the last output is checked.

    Timed: `call(input)` with its input already on the device and its output left there. On a GPU
    each call lies between two events on the current stream, and the wall time runs from the first
    enqueue until the device has finished.

    Raises:
        FloatingPointError: the last output holds NaN or infinity.
    """
    on_gpu = torch.device(device).type == "cuda"
    collecting = gc.isenabled()
    gc.disable()
    try:
        block, output = (_time_on_gpu if on_gpu else _time_on_cpu)(call, inputs, calls, clock)
    finally:
        if collecting:
            gc.enable()
    if not bool(torch.isfinite(torch.as_tensor(output)).all()):
        raise FloatingPointError("the output holds NaN or infinity")
    return block


def _time_on_cpu(
    call: Callable[[Any], Any], inputs: Sequence[Any], calls: int, clock: Clock
) -> tuple[Block, Any]:
    stamps = []
    output = None
    for i in range(calls):
        x = inputs[i % len(inputs)]
        start = clock()
        output = call(x)
        stamps.append((start, clock()))
    latencies = np.array([end - start for start, end in stamps]) / 1e6
    return Block(latencies, (stamps[-1][1] - stamps[0][0]) / 1e6), output


def _time_on_gpu(
    call: Callable[[Any], Any], inputs: Sequence[Any], calls: int, clock: Clock
) -> tuple[Block, Any]:
    def event() -> torch.cuda.Event:
        made = torch.cuda.Event(enable_timing=True)
        made.record()  # only then CUDA creates it, and not within the time
        return made

    events = [(event(), event()) for _ in range(calls)]
    output = None
    synchronize()
    wall_start = clock()
    for i, (start, end) in enumerate(events):
        start.record()
        output = call(inputs[i % len(inputs)])
        end.record()
    synchronize()
    wall_ms = (clock() - wall_start) / 1e6
    return Block(np.array([start.elapsed_time(end) for start, end in events]), wall_ms), output


def synchronize() -> None:
    """Wait for the GPU, if there is one in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def warm_up(time_block: TimeBlock) -> float:
    """Call until two consecutive blocks agree within 10 %; return the least latency in ms.

    The least, as other programs may stall some blocks. A candidate so slow that one call takes
    seconds gets blocks of a single call.
    """
    found = [float(np.median(time_block(1).latencies_ms))]
    calls = 3 if found[0] < SLOW_MS else 1
    for _ in range(WARM_UP_BLOCKS):
        found.append(float(np.median(time_block(calls).latencies_ms)))
        if abs(found[-1] - found[-2]) <= STABLE_WITHIN * found[-2]:
            break
    return min(found)


def calls_per_block(latency_ms: float, block_seconds: float) -> int:
    """How many calls fill a block: at least 1, at most 1000."""
    return max(1, min(1000, math.ceil(block_seconds * 1e3 / max(latency_ms, 1e-6))))


def measure_rounds(
    candidates: Mapping[str, TimeBlock],
    rounds: int,
    calls: Mapping[str, int],
    seed: int = 0,
    guard: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, list[Block]]:
    """Give every candidate one block of its `calls` in each round, in shuffled order.

    One untimed call precedes each block: it brings the candidate's code and weights back into the
    caches and lets another candidate's spinning worker threads go to sleep. A candidate whose
    error `guard(name)` swallows is left out of the remaining rounds and of the result.
    """
    generator = np.random.default_rng(seed)
    blocks: dict[str, list[Block]] = {name: [] for name in candidates}
    for _ in tqdm(range(rounds), desc="timing", unit="round", disable=None, leave=False):
        for name in generator.permutation(list(blocks)).tolist():
            block = None
            with guard(name):
                candidates[name](1)
                block = candidates[name](calls[name])
            if block is None:
                del blocks[name]
            else:
                blocks[name].append(block)
    return blocks


def p99_of(latencies_ms: np.ndarray) -> float | None:
    """The 99th percentile; None of fewer than CALLS_FOR_P99, which do not tell it."""
    return float(np.percentile(latencies_ms, 99)) if len(latencies_ms) >= CALLS_FOR_P99 else None


def summarise(
    blocks: Mapping[str, Sequence[Block]], baseline: str, batch_size: int
) -> dict[str, dict[str, float | None]]:
    """Turn measured blocks into one row of LATENCY_COLUMNS per candidate.

    Latency percentiles are over all calls; p99 is by `p99_of`. The speedup is the median over
    rounds of (baseline's block median / own block median), `speedup_p10` and `speedup_p90` are the
    10th and 90th percentile of the same ratios.
    """
    reference = [np.median(block.latencies_ms) for block in blocks[baseline]]
    rows: dict[str, dict[str, float | None]] = {}
    for name, own in blocks.items():
        samples = np.concatenate([block.latencies_ms for block in own])
        wall_ms = sum(block.wall_ms for block in own) / len(samples)
        ratios = [r / np.median(b.latencies_ms) for r, b in zip(reference, own, strict=True)]
        low, speedup, high = np.percentile(ratios, [10, 50, 90])
        rows[name] = {
            "latency_ms_median": float(np.median(samples)),
            "latency_ms_p90": float(np.percentile(samples, 90)),
            "latency_ms_p99": p99_of(samples),
            "wall_ms_mean": wall_ms,
            "images_per_s": batch_size * 1e3 / wall_ms,
            "speedup": float(speedup),
            "speedup_p10": float(low),
            "speedup_p90": float(high),
            "rounds": len(own),
            "calls": len(samples),
        }
    return rows
