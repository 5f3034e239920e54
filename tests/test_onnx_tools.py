"""ONNX files: any batch size, nothing bloated, checked, the same bytes each time."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from utils import data, onnx_tools
from utils.models import load_model


class Residual(nn.Module):
    """x + silu(norm(conv(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.silu(self.norm(self.conv(x)))


def small_cnn() -> nn.Module:
    """32x32 images to 10 logits: stem, two residual blocks, a hidden layer and a classifier."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        Residual(32),
        nn.MaxPool2d(2),
        Residual(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    return net.eval().requires_grad_(False)


def digit_inputs(count: int, split: str = "test") -> Tensor:
    """The first preprocessed digits, float32 `[count, 3, 32, 32]`."""
    how = load_model("vit_digits").preprocessing
    return data.preprocess(data.load_images("digits", split).images[:count], how)


@pytest.fixture(scope="module", params=["cnn", "vit"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, Path]:
    module = small_cnn() if request.param == "cnn" else load_model("vit_digits").module
    path = tmp_path_factory.mktemp("exported") / f"{request.param}.onnx"
    onnx_tools.write_onnx(module, torch.zeros(1, 3, 32, 32), path)
    return module, path


def test_export_agrees_with_pytorch_at_odd_batch_sizes(exported: tuple[nn.Module, Path]):
    module, path = exported
    for optimize in (True, False):
        call = onnx_tools.onnx_session(path, 1, optimize)
        for batch_size in (1, 3, 7):
            x = digit_inputs(batch_size)
            logits = call(x)
            assert logits.shape == (batch_size, 10)
            torch.testing.assert_close(torch.from_numpy(logits), module(x), rtol=1e-4, atol=1e-4)


def test_graph_holds_each_weight_once_and_no_resizing(exported: tuple[nn.Module, Path]):
    module, path = exported
    found = onnx_tools.check_onnx(path)
    assert found["onnx_opset"] == onnx_tools.ONNX_OPSET
    weights = sum(p.numel() for p in module.parameters()) * 4 / 1e6
    assert weights < found["size_mb"] < weights + 0.05
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert not operators & {"Resize", "BatchNormalization", "Expand", "Identity", "Dropout"}


def test_position_embedding_is_added_as_one_constant(exported: tuple[nn.Module, Path]):
    module, path = exported
    if not hasattr(module, "pos_embed"):
        pytest.skip("a convolutional net has none")
    graph = onnx.load(path).graph
    (constant,) = (t for t in graph.initializer if t.name == "pos_embed")
    np.testing.assert_array_equal(
        onnx.numpy_helper.to_array(constant), module.get_parameter("pos_embed").numpy()
    )
    assert [node.op_type for node in graph.node if "pos_embed" in node.input] == ["Add"]


def test_export_is_deterministic_and_keeps_no_local_path(
    exported: tuple[nn.Module, Path], tmp_path: Path
):
    module, path = exported
    onnx_tools.write_onnx(module, torch.rand(5, 3, 32, 32), tmp_path / path.name)
    content = path.read_bytes()
    assert (tmp_path / path.name).read_bytes() == content
    assert str(Path.cwd()).encode() not in content
    assert b"stack_trace" not in content


def test_half_precision_graph_is_float16_inside_and_float32_outside(tmp_path: Path):
    module, path = small_cnn(), tmp_path / "half.onnx"
    x = digit_inputs(3)
    expected = module(x)
    onnx_tools.write_onnx(onnx_tools.HalfPrecision(module), torch.zeros(1, 3, 32, 32), path)
    graph = onnx.load(path).graph
    outside = (*graph.input, *graph.output)
    assert {v.type.tensor_type.elem_type for v in outside} == {onnx.TensorProto.FLOAT}
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    kinds = {t.data_type for t in graph.initializer if t.data_type in floats}
    assert kinds == {onnx.TensorProto.FLOAT16}
    logits = torch.from_numpy(onnx_tools.onnx_session(path, 1, optimize=False)(x))
    torch.testing.assert_close(logits, expected, rtol=0.01, atol=0.01)


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx_tools, "EXTERNAL_DATA_BYTES", 10_000)
    module, path = small_cnn(), tmp_path / "large.onnx"
    onnx_tools.write_onnx(module, torch.zeros(1, 3, 32, 32), path)
    copy = tmp_path / "copy.onnx"
    onnx_tools.save_onnx(onnx.load(path), copy)
    for file in (path, copy):
        assert file.with_name(f"{file.name}.data").stat().st_size > 50_000
        assert file.stat().st_size < 30_000
        assert onnx_tools.check_onnx(file)["size_mb"] > 0.08
        x = digit_inputs(3)
        logits = torch.from_numpy(onnx_tools.onnx_session(file, 1)(x))
        torch.testing.assert_close(logits, module(x), rtol=1e-4, atol=1e-4)
    names = {"large.onnx", "large.onnx.data", "copy.onnx", "copy.onnx.data"}
    assert {entry.name for entry in tmp_path.iterdir()} == names


def test_failed_write_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_text("old")

    def fail() -> None:
        with onnx_tools.replacing_graph(path) as unfinished:
            unfinished.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_export_happens_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module, example = small_cnn(), torch.zeros(1, 3, 32, 32)
    path, seconds = onnx_tools.export_onnx(module, example, tmp_path)
    assert seconds == 0
    written = path.stat().st_mtime_ns
    again, seconds = onnx_tools.export_onnx(module, example, tmp_path)
    assert again == path
    assert seconds > 0
    assert path.stat().st_mtime_ns == written


def test_check_refuses_a_truncated_file_and_a_fixed_batch(
    exported: tuple[nn.Module, Path], tmp_path: Path
):
    _, path = exported
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(Exception, match=r"(?i)pars|protobuf|decod"):
        onnx_tools.check_onnx(broken)
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, broken)
    with pytest.raises(Exception, match=r"batch|shape"):
        onnx_tools.check_onnx(broken)


def test_cuda_session_says_why_it_is_missing(
    exported: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
):
    _, path = exported
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ImportError, match="no CUDA provider"):
        onnx_tools.onnx_cuda_session(path)


def test_cuda_session_notices_a_silent_fallback(
    exported: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
):
    _, path = exported
    real = onnxruntime.InferenceSession

    def fall_back(path: Path, providers: Any) -> Any:
        assert providers[0][1]["use_tf32"] == "0"
        return real(path, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", fall_back)
    stream = type("Stream", (), {"cuda_stream": 42})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    with pytest.raises(ImportError, match="fell back to the CPU"):
        onnx_tools.onnx_cuda_session(path)


def test_8_bit_weight_shapes_are_outputs_by_inputs(tmp_path: Path):
    weight = onnx.numpy_helper.from_array(np.zeros((4, 6), np.int8), "w")
    other = onnx.numpy_helper.from_array(np.zeros((4, 6), np.float32), "f")
    graph = onnx.helper.make_graph([], "g", [], [], [weight, other])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "w.onnx")
    assert onnx_tools.onnx_int8_shapes(tmp_path / "w.onnx") == [(6, 4)]


def test_size_counts_external_data(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(b"12345")
    (tmp_path / "model.onnx.data").write_bytes(b"678")
    (tmp_path / "other.onnx").write_bytes(b"9")
    assert onnx_tools.onnx_bytes(tmp_path / "model.onnx") == 8
