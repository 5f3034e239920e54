"""The measured ceilings: rows, units, and that they are rates."""

import pytest
import torch

from utils import roofline, timing


def test_ceilings_have_one_row_each():
    rows = roofline.measure_ceilings("cpu", size=64)
    assert [row["ceiling"] for row in rows] == ["fp32", "tf32", "fp16", "copy"]
    assert all(set(row) <= set(roofline.CEILING_COLUMNS) for row in rows)
    assert all(row["tflops"] > 0 for row in rows[:3])
    assert rows[3]["gb_per_s"] > 0
    assert {row["device"] for row in rows} == {"cpu"}


def test_rates_follow_from_the_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roofline, "median_seconds", lambda call, x, device: 1e-6)
    rows = roofline.measure_ceilings("cpu", size=100)
    assert rows[0]["tflops"] == pytest.approx(2.0)  # 2 * 100^3 operations in a microsecond
    assert rows[3]["gb_per_s"] == pytest.approx(80.0)  # 40,000 bytes read and as many written


def test_the_first_block_is_only_a_warm_up(monkeypatch: pytest.MonkeyPatch):
    times = iter([[9.0], [2.0, 4.0, 3.0]])

    def time_block(call, inputs, calls, device):
        assert calls == roofline.CALLS
        return timing.Block(torch.tensor(next(times)).numpy(), 0.0)

    monkeypatch.setattr(timing, "time_block", time_block)
    assert roofline.median_seconds(torch.clone, torch.zeros(1), "cpu") == pytest.approx(3e-3)
