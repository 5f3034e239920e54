"""The profile of a training step: its groups and counts; it also runs where there is no GPU."""

from pathlib import Path

import pandas as pd
import pytest
import torch

import part2_tune as part2
from reports import profile_step


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("triton_poi_fused__native_batch_norm_convolution_backward_8", profile_step.FUSED),
        ("sm90_xmma_wgrad_indexed_implicit_gemm_bf16bf16_bf16f32_nhwckrsc", "convolution"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop>", "convolution"),
        ("nvjet_tst_128x64_64x11_2x1_v_bz_TNN", "matrix product"),
        ("void at::native::multi_tensor_apply_kernel<LpNormFunctor>", "optimiser, elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::elementwise_kernel<128, 4>", "other"),
    ],
)
def test_kernels_are_grouped_by_name(kernel: str, group: str):
    assert profile_step.group_of(kernel) == group


def test_arithmetic_of_learning_from_an_image():
    task = profile_step.random_task(100, 32, torch.device("cpu"))
    network = part2.SmallCNN(64, [1, 2, 3], 0.0, profile_step.NUM_CLASSES)
    stem = 9 * 3 * 64 * 32**2
    first, others = 2 * 64**2 * 32**2, 64 * 128 * 16**2 + 128 * 256 * 8**2
    second, third = 4 * 128**2 * 16**2, 6 * 256**2 * 8**2
    inner = 9 * (first + others + second + third) + 256 * 100
    # Twice, as a multiplication and an addition are two; the images need no gradient.
    expected = 2 * (2 * stem + 3 * inner) / 1e9
    assert profile_step.training_gflop(network, task) == pytest.approx(expected)


def test_a_fixed_convolution_has_no_gradients():
    task = profile_step.random_task(100, 32, torch.device("cpu"))
    network = part2.SmallCNN(8, [0, 0, 0], 0.0, profile_step.NUM_CLASSES, pool=True, whiten=True)
    fixed, first = 9 * 3 * part2.WHITE_CHANNELS * 32**2, 9 * part2.WHITE_CHANNELS * 8 * 32**2
    inner = 9 * (8 * 16 * 16**2 + 16 * 32 * 8**2) + 32 * 100
    expected = 2 * (fixed + 2 * first + 3 * inner) / 1e9
    assert profile_step.training_gflop(network, task) == pytest.approx(expected)


def test_the_profile_runs_on_a_cpu(tmp_path: Path):
    argv = ["--quick", "--device", "cpu", "--output-dir", str(tmp_path)]
    assert profile_step.main(argv) == 0
    profile = pd.read_csv(tmp_path / "step_profile.csv")
    assert tuple(profile.columns) == profile_step.PROFILE_COLUMNS
    assert profile.configuration.unique().tolist() == ["default", "sprint"]
    for _, step in profile.groupby("configuration"):
        assert step.share_percent.sum() == pytest.approx(100)
        assert "convolution" in step.group.tolist()
    (row,) = pd.read_csv(tmp_path / "convolutions.csv").to_dict("records")
    assert tuple(row) == profile_step.CONVOLUTION_COLUMNS
    ms = sum(row[f"{part}_ms"] for part in ("forward", "input_gradient", "weight_gradient"))
    assert row["gflop"] == pytest.approx(2 * 9 * 32**2 * 8 * 32**2 / 1e9)
    assert row["tflops"] == pytest.approx(3 * row["gflop"] / ms)


def test_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert profile_step.main(["--quick", "--output-dir", str(tmp_path / "file" / "x")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
