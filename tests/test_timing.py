"""The timing harness on a fake clock: interleaving, ratios, percentiles, drift."""

import contextlib
import gc
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from utils import timing


class Machine:
    """A fake clock that only moves when a candidate works, at a pace that may drift."""

    def __init__(self, pace: Callable[[float], float] = lambda _: 1.0) -> None:
        self.now_ns = 0
        self.pace = pace
        self.log: list[str] = []

    def clock(self) -> int:
        return self.now_ns

    def candidate(self, name: str, cost_ms: float) -> timing.TimeBlock:
        def call(_: object) -> torch.Tensor:
            self.log.append(name)
            self.now_ns += int(cost_ms * 1e6 * self.pace(self.now_ns / 1e9))
            return torch.zeros(1)

        return lambda calls: timing.time_block(call, [None], calls, clock=self.clock)


def run(machine: Machine, costs: dict[str, float], rounds: int = 20, calls: int = 5, seed: int = 0):
    candidates = {name: machine.candidate(name, cost) for name, cost in costs.items()}
    blocks = timing.measure_rounds(candidates, rounds, dict.fromkeys(costs, calls), seed)
    return blocks, timing.summarise(blocks, next(iter(costs)), batch_size=8)


def test_every_round_gives_every_candidate_one_block_after_one_untimed_call():
    machine = Machine()
    run(machine, {"a": 1.0, "b": 2.0, "c": 3.0}, rounds=6, calls=4)
    turns = [machine.log[i : i + 5] for i in range(0, len(machine.log), 5)]
    assert len(turns) == 18
    assert all(len(set(turn)) == 1 for turn in turns)
    for i in range(0, 18, 3):
        assert {turn[0] for turn in turns[i : i + 3]} == {"a", "b", "c"}


def test_order_of_turns_is_shuffled_and_reproducible():
    def order(seed: int) -> list[str]:
        machine = Machine()
        run(machine, {"a": 1.0, "b": 2.0, "c": 3.0}, rounds=12, calls=1, seed=seed)
        return machine.log

    assert order(0) == order(0)
    assert order(0) != order(1)
    rounds = [tuple(order(0)[i : i + 6 : 2]) for i in range(0, 72, 6)]
    assert len(set(rounds)) > 2


def test_known_costs_give_known_latency_and_speedup():
    _, rows = run(Machine(), {"base": 6.0, "fast": 2.0})
    assert rows["base"]["latency_ms_median"] == pytest.approx(6.0)
    assert rows["fast"]["latency_ms_median"] == pytest.approx(2.0)
    assert rows["fast"]["images_per_s"] == pytest.approx(8 / 2e-3)
    assert rows["fast"]["speedup"] == pytest.approx(3.0)
    assert rows["base"]["speedup"] == 1.0
    assert rows["fast"]["calls"] == 100
    assert rows["fast"]["rounds"] == 20


def test_injected_slow_down_of_one_candidate_is_found():
    machine = Machine()
    slow = {"a": 1.0, "b": 1.0 * 1.07}
    _, rows = run(machine, slow)
    assert rows["b"]["speedup"] == pytest.approx(1 / 1.07, rel=1e-3)


def test_drift_common_to_all_is_not_reported_as_a_difference():
    """The machine slows down fivefold during the run: the medians move, the ratio does not."""
    machine = Machine(pace=lambda seconds: 1.0 + 4.0 * min(seconds, 2.0) / 2.0)
    blocks, rows = run(machine, {"a": 2.0, "b": 2.0}, rounds=40, calls=2)
    first, last = (np.median(blocks["a"][i].latencies_ms) for i in (0, -1))
    assert last > 2 * first
    assert rows["b"]["speedup"] == pytest.approx(1.0, abs=0.02)


def test_candidate_that_fails_in_the_middle_is_left_out_and_the_others_go_on():
    machine = Machine()
    steady, good = machine.candidate("a", 1.0), machine.candidate("b", 1.0)
    turns = iter(range(5))  # fails in its third round, two questions a round

    def failing(calls: int) -> timing.Block:
        if next(turns, None) is None:
            raise MemoryError
        return good(calls)

    candidates = {"a": steady, "b": failing}
    calls = {"a": 2, "b": 2}
    blocks = timing.measure_rounds(
        candidates, 6, calls, guard=lambda _: contextlib.suppress(MemoryError)
    )
    assert {name: len(own) for name, own in blocks.items()} == {"a": 6}
    turns = iter(range(5))
    with pytest.raises(MemoryError):
        timing.measure_rounds(candidates, 6, calls)


def test_percentiles_are_numpys_and_p99_needs_a_hundred_calls():
    latencies = np.arange(1.0, 101.0)
    rows = timing.summarise({"a": [timing.Block(latencies, float(latencies.sum()))]}, "a", 1)
    assert rows["a"]["latency_ms_median"] == 50.5
    assert rows["a"]["latency_ms_p90"] == pytest.approx(np.percentile(latencies, 90))
    assert rows["a"]["latency_ms_p99"] == pytest.approx(np.percentile(latencies, 99))
    short = latencies[:99]
    rows = timing.summarise({"a": [timing.Block(short, float(short.sum()))]}, "a", 1)
    assert rows["a"]["latency_ms_p99"] is None


def test_speedup_is_the_median_of_ratios_within_rounds():
    def blocks(*latencies: float) -> list[timing.Block]:
        return [timing.Block(np.array([ms]), ms) for ms in latencies]

    rows = timing.summarise({"a": blocks(2, 4, 100), "b": blocks(1, 1, 100)}, "a", 1)
    assert rows["b"]["speedup"] == 2.0  # of 2, 4, 1
    assert rows["b"]["speedup_p10"] == pytest.approx(1.2)
    assert rows["b"]["speedup_p90"] == pytest.approx(3.6)


def test_inputs_take_turns():
    seen: list[int] = []

    def call(x: int) -> torch.Tensor:
        seen.append(x)
        return torch.zeros(1)

    timing.time_block(call, [10, 20, 30], 7)
    assert seen == [10, 20, 30, 10, 20, 30, 10]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_output_that_is_not_finite_is_an_error(bad: float):
    with pytest.raises(FloatingPointError):
        timing.time_block(lambda _: torch.tensor([1.0, bad]), [None], 2)


def test_garbage_collector_is_off_while_timing_and_back_afterwards():
    states: list[bool] = []

    def call(_: object) -> torch.Tensor:
        states.append(gc.isenabled())
        return torch.zeros(1)

    assert gc.isenabled()
    timing.time_block(call, [None], 3)
    assert states == [False] * 3
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        timing.time_block(lambda _: 1 / 0, [None], 1)
    assert gc.isenabled()


def test_gpu_events_are_made_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch):
    log: list[str] = []

    class Event:
        """Counts as made by its first record."""

        def __init__(self, enable_timing: bool) -> None:
            self.made = False

        def record(self) -> None:
            log.append("again" if self.made else "made")
            self.made = True

        def elapsed_time(self, end: "Event") -> float:
            return 1.0

    def call(_: object) -> torch.Tensor:
        log.append("call")
        return torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    block = timing.time_block(call, [None], 2, device="cuda")
    assert log == ["made"] * 4 + ["again", "call", "again"] * 2
    assert block.latencies_ms.tolist() == [1.0, 1.0]


def test_warm_up_ends_when_two_blocks_agree_and_not_before():
    costs = iter([90.0, 50.0, 30.0, 20.0, 19.5, 19.4])
    asked: list[float] = []

    def block(calls: int) -> timing.Block:
        asked.append(next(costs))
        return timing.Block(np.full(calls, asked[-1]), asked[-1] * calls)

    assert timing.warm_up(block) == 19.5
    assert asked == [90.0, 50.0, 30.0, 20.0, 19.5]
    costs = iter([5.0, 180.0, 190.0])  # two blocks that another program stalled
    assert timing.warm_up(block) == 5.0


def test_calls_per_block():
    assert timing.calls_per_block(10.0, 0.5) == 50
    assert timing.calls_per_block(3000.0, 0.5) == 1
    assert timing.calls_per_block(0.0, 0.5) == 1000
