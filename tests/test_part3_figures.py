"""What the figures of Part 3 compute, on tables small enough to check by hand."""

from pathlib import Path

import pandas as pd
import pytest

from reports import draw_figures
from reports import part3_figures as figures

CEILINGS = pd.DataFrame(
    [
        {"ceiling": "fp32", "tflops": 50.0},
        {"ceiling": "tf32", "tflops": 400.0},
        {"ceiling": "fp16", "tflops": 800.0},
        {"ceiling": "copy", "gb_per_s": 1000.0},
    ]
)


def row(candidate: str, ms: float, batch_size: int = 1, **more: object) -> dict[str, object]:
    precision = candidate.split("-")[1]
    base = precision if precision in figures.PRECISION_COLOURS else "fp16"
    about = {"model": "m", "status": "ok", "gflop_per_image": 100.0, "image_size": 100}
    size_mb = {"fp32": 40.0, "tf32": 40.0}.get(precision, 20.0)
    return {
        **about,
        "candidate": candidate,
        "precision": precision,
        "batch_size": batch_size,
        "latency_ms_median": ms,
        "images_per_s": 1e3 * batch_size / ms,
        "graph_baseline": f"torch-{base}-graph",
        "size_mb": size_mb,
        **more,
    }


TABLE = pd.DataFrame(
    [
        row("torch-fp32", 24.0),
        row("torch-fp32-graph", 12.0),
        row("torch-fp16-graph", 4.0),
        row("tensorrt-int8", 2.0),
        row("torch-fp32", 99.0, batch_size=64),
        row("torch-fp32-graph", 90.0, batch_size=64),
        row("torch-fp16-compile", float("nan"), batch_size=64, status="unavailable"),
    ]
)


def test_a_speedup_is_the_product_of_its_parts():
    ok = TABLE[TABLE.status == "ok"]
    factors = {"launches": 2.0, "precision": 3.0, "kernels": 2.0}
    launches_only = {"launches": 99 / 90, "precision": 1.0, "kernels": 1.0}
    assert figures.speedup_parts(ok).to_dict("records") == [
        {"batch_size": 1, "candidate": "tensorrt-int8"} | factors,
        {"batch_size": 64, "candidate": "torch-fp32-graph"} | launches_only,
    ]


def test_the_floor_is_the_longer_of_arithmetic_and_memory():
    rows = figures.roofline_rows(TABLE, CEILINGS).to_dict("records")
    assert len(rows) == 5  # the ceiling of int8 is not measured, and one row did not run
    assert "tensorrt-int8" not in {row["candidate"] for row in rows}
    assert rows[0]["floor_ms"] == pytest.approx(100 / 50)  # 100 GFLOP at 50 TFLOP/s
    assert rows[0]["floor_percent"] == pytest.approx(100 * 2 / 24)
    assert rows[0]["tflops"] == pytest.approx(100 / 24)
    assert rows[0]["flop_per_byte"] == pytest.approx(100e9 / (40e6 + 3 * 100**2 * 4))
    assert rows[0]["bound"] == "arithmetic"
    small = figures.roofline_rows(TABLE.assign(gflop_per_image=0.001), CEILINGS).iloc[0].to_dict()
    assert small["floor_ms"] == pytest.approx((40 + 0.12) / 1000)
    assert small["bound"] == "memory"


def test_every_figure_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(draw_figures, "FIGURES", tmp_path)
    TABLE.to_csv(tmp_path / "gpu.csv", index=False)
    without = draw_figures.draw_gpu(tmp_path / "gpu.csv")
    assert [path.name for path in without] == ["part3_m_latency.png", "part3_m_speedup.png"]
    CEILINGS.to_csv(tmp_path / "gpu_ceilings.csv", index=False)
    drawn = draw_figures.draw_gpu(tmp_path / "gpu.csv")
    assert drawn[-1].name == "part3_roofline.png"
    assert all(path.stat().st_size > 5000 for path in drawn)
    assert len(pd.read_csv(tmp_path / "gpu_roofline.csv")) == 5


def test_the_roof_is_memory_then_arithmetic():
    assert figures.attainable_tflops(10, 600, 3000) == 30
    assert figures.attainable_tflops(1000, 600, 3000) == 600
