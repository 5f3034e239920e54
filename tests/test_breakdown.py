"""Which group an operator falls into, and that the groups are those of what was called."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import part1_quantize
from reports import draw_figures
from utils import breakdown
from utils.benchmark import Job
from utils.models import load_model


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["aten::linear", "aten::addmm", "aten::copy_"], "linear"),  # the copy of its bias
        (["aten::contiguous", "aten::clone", "aten::copy_"], breakdown.COPIES),
        (["call", "Torch-Compiled Region: 0/0", "mkldnn::_linear_pointwise"], "linear"),
        (["aten::scaled_dot_product_attention", "aten::empty"], "attention"),
        (["aten::matmul", "aten::bmm"], "attention"),
        (["aten::conv2d", "aten::convolution", "aten::copy_"], "convolution"),
        (["aten::layer_norm", "aten::native_layer_norm"], "normalization"),
        (["aten::gelu"], "activation"),
        (["graph_0_cpp_fused_gelu_0"], "fused"),
        (["graph_0_cpp_fused_gelu_quantize_per_tensor_8"], "fused with quantization"),
        (["graph_0_cpp_fused_amax_amin_clamp_div_gelu_5"], "fused with quantization"),
        (["call", "aten::nonsense"], "other"),
    ],
)
def test_group_of_a_pytorch_operator(names: list[str], group: str):
    assert breakdown.torch_group(names) == group


@pytest.mark.parametrize(
    ("operator", "ranks", "group"),
    [
        ("MatMul", [3], "linear"),  # its weight was repacked
        ("MatMul", [3, 2], "linear"),
        ("MatMul", [4, 4], "attention"),
        ("FusedMatMul", [4, 4], "attention"),
        ("Add", [3, 1], "linear"),  # its bias
        ("Add", [3, 3], breakdown.COPIES),
        ("DynamicQuantizeMatMul", [3, 1, 1, 1], "linear"),
        ("DynamicQuantizeLinear", [3], "quantization"),
        ("Softmax", [4], "attention"),
        ("BiasGelu", [3, 1], "activation"),
        ("Nonsense", [], "other"),
    ],
)
def test_group_of_an_onnx_node(operator: str, ranks: list[int], group: str):
    assert breakdown.onnx_group(operator, ranks) == group


def test_every_group_has_a_place_in_the_figure():
    assert set(breakdown.TORCH_OPERATORS) | set(breakdown.ONNX_OPERATORS) < set(breakdown.GROUPS)


def test_profile_counts_what_was_called_and_nothing_else():
    module = nn.Sequential(nn.Linear(64, 64), nn.GELU())
    with torch.no_grad():
        block, microseconds = breakdown.profile_torch(module, [torch.rand(8, 64)], 5)
    assert set(microseconds) == {"linear", "activation", "other"}
    assert all(time > 0 for time in microseconds.values())
    assert sum(microseconds.values()) < 1e3 * block.wall_ms


def test_what_no_operator_accounts_for_is_other():
    rows = breakdown.group_rows({"linear": 6e3, "other": 1e3}, 10, calls=2, latency_ms=4)
    shown = [(row["group"], row["ms"], row["share_percent"]) for row in rows]
    assert shown == [("linear", 3, 60), ("other", 2, 40)]
    assert [(row["profiled_ms"], row["latency_ms"]) for row in rows] == [(5, 4)] * 2


def test_onnx_profile_of_a_vision_transformer(tmp_path: Path):
    model = load_model("vit_digits", untrained=True)
    size = model.preprocessing.input_size
    images = torch.rand(4, 3, size, size)
    build = part1_quantize.build_onnx_fp32
    setting = {"batch_size": 4, "device": "cpu", "threads": 1, "seed": 0, "untrained": True}
    job = Job("onnx-fp32", build, "vit_digits", folder=str(tmp_path), **setting)  # type: ignore[arg-type]
    with torch.no_grad():
        variant = build(model.module, images, job)
    assert variant.onnx_path is not None
    profiles = [breakdown.profile_onnx(variant.onnx_path, job, [images], n) for n in (1, 100)]
    for block, microseconds in profiles:
        missing = {"quantization", "fused", "fused with quantization", "other"}
        assert set(microseconds) == set(breakdown.GROUPS) - missing
        assert 0 < sum(microseconds.values()) <= 1e3 * block.wall_ms
    linear = [microseconds["linear"] for _, microseconds in profiles]
    assert linear[1] > 20 * linear[0]  # summed over calls, the warm-up left out


def test_figure_shows_the_first_setting_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(draw_figures, "FIGURES", tmp_path)
    setting = {"model": "m", "threads": 1, "status": "ok"}
    rows = [
        setting | {"candidate": "fp32", "batch_size": 16, "group": "linear", "ms": 3.0},
        setting | {"candidate": "fp32", "batch_size": 16, "group": "other", "ms": 1.0},
        setting | {"candidate": "bf16", "batch_size": 16, "group": "linear", "ms": 1.0},
        setting | {"candidate": "fp32", "batch_size": 1, "group": "linear", "ms": 9.0},
    ]
    table = pd.DataFrame(rows)
    assert draw_figures.draw_breakdown(table, "cpu_breakdown") == [
        tmp_path / "part1_cpu_breakdown.png"
    ]
    assert (tmp_path / "part1_cpu_breakdown.png").stat().st_size > 5000
    assert draw_figures.draw_breakdown(table[table.status == "failed"], "none") == []


def test_figures_of_a_folder_with_a_breakdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[tuple[str, str]] = []
    for kind in ("draw_part1", "draw_breakdown"):

        def draw(table: pd.DataFrame, name: str, kind: str = kind) -> list[Path]:
            drawn.append((kind, name))
            return []

        monkeypatch.setattr(draw_figures, kind, draw)
    monkeypatch.setattr(draw_figures, "draw_gpu", lambda path: [])
    monkeypatch.setattr(draw_figures, "DATA", tmp_path)
    monkeypatch.setattr(draw_figures, "FIGURES", tmp_path)
    for name in ("part1_cpu", "part1_cpu_breakdown"):
        (tmp_path / f"{name}.csv").write_text("status\nok\n")
    assert draw_figures.main() == 0
    assert drawn == [("draw_part1", "cpu"), ("draw_breakdown", "cpu_breakdown")]
