"""ONNX files: any batch size, nothing bloated, checked; where 8-bit pairs go and what they cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import part3_tensorrt as part3
from utils import data, onnx_tools
from utils.evaluation import centred_cosine
from utils.models import ModelSource, load_model
from utils.onnx_tools import check_onnx, onnx_session
from utils.workers import UnavailableError

DIGITS = ModelSource("vit_digits")


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
    preprocessing = load_model(DIGITS).preprocessing
    return data.preprocess(data.load_images("digits", split).images[:count], preprocessing)


def export(module: nn.Module, path: Path, dtype: torch.dtype | None = None) -> Path:
    """Part 3's export of a module of 32x32 images, in float32 or in place in another type."""
    precision = next((name for name, d in part3.DTYPES.items() if d == dtype), "fp32")
    part3.export_module(module, precision, 32, path, {"model": "a test"})
    return path


@pytest.fixture(scope="module", params=["cnn", "vit"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[nn.Module, Path]:
    module = small_cnn() if request.param == "cnn" else load_model(DIGITS).module
    folder = tmp_path_factory.mktemp("exported")
    return module, export(module, folder / f"{request.param}.onnx")


def test_export_agrees_with_pytorch_at_odd_batch_sizes(exported: tuple[nn.Module, Path]):
    module, path = exported
    for optimize in (True, False):
        call = onnx_session(path, 1, optimize)
        for batch_size in (1, 3, 7):
            x = digit_inputs(batch_size)
            logits = torch.from_numpy(call(x))
            torch.testing.assert_close(logits, module(x), rtol=1e-4, atol=1e-4)


def test_file_holds_each_weight_once_and_no_resizing(exported: tuple[nn.Module, Path]):
    module, path = exported
    found = check_onnx(path, 32, 10)
    assert found["onnx_opset"] == 20
    weights = sum(p.numel() for p in module.parameters()) * 4 / 1e6
    assert weights < found["size_mb"] < weights + 0.05
    model = onnx.load(path)
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"Resize", "BatchNormalization", "Expand", "Identity", "Dropout"}
    assert {entry.key: entry.value for entry in model.metadata_props}["model"] == "a test"


def test_attention_is_transpose_matmul_softmax_matmul(exported: tuple[nn.Module, Path]):
    module, path = exported
    graph = ir.load(path).graph
    softmaxes = [node for node in graph if node.op_type == "Softmax"]
    assert len(softmaxes) == (4 if hasattr(module, "blocks") else 0)
    for softmax in softmaxes:
        scores = softmax.inputs[0].producer()
        assert scores.op_type == "MatMul"
        assert scores.inputs[1].producer().op_type == "Transpose"
        assert [node.op_type for node in softmax.successors()] == ["MatMul"]
    assert not {"Shape", "Concat"} & {node.op_type for node in graph}


class Masked(nn.Module):
    """Attention of an image's rows with a mask, as Swin's shifted windows have it."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.mean(1)
        attended = nn.functional.scaled_dot_product_attention(
            rows, rows, rows, attn_mask=self.mask, scale=0.3
        )
        return attended.mean(2)


@pytest.mark.parametrize("boolean", [True, False])
def test_attention_keeps_its_mask_and_scale(boolean: bool, tmp_path: Path):
    mask = torch.ones(32, 32).tril().bool()
    additive = torch.zeros(32, 32).masked_fill(~mask, -torch.inf)
    module = Masked(mask if boolean else additive)
    call = onnx_session(export(module.eval(), tmp_path / "masked.onnx"), 1)
    x = digit_inputs(3)
    torch.testing.assert_close(torch.from_numpy(call(x)), module(x), rtol=1e-4, atol=1e-5)


def test_export_is_deterministic_and_keeps_no_local_path(
    exported: tuple[nn.Module, Path], tmp_path: Path
):
    module, path = exported
    content = export(module, tmp_path / path.name).read_bytes()
    assert path.read_bytes() == content
    assert str(Path.cwd()).encode() not in content
    assert b"stack_trace" not in content


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_inside_and_float32_outside(dtype: torch.dtype, tmp_path: Path):
    module = small_cnn()
    x = digit_inputs(3)
    expected = module(x)
    path = export(module, tmp_path / "low.onnx", dtype)
    check_onnx(path, 32, 10)
    graph = ir.load(path).graph
    inside = ir.DataType.FLOAT16 if dtype == torch.float16 else ir.DataType.BFLOAT16
    assert {v.dtype for v in (*graph.inputs, *graph.outputs)} == {ir.DataType.FLOAT}
    integers = {ir.DataType.INT64}
    assert {value.dtype for value in graph.initializers.values()} - integers == {inside}
    if dtype == torch.float16:  # ONNX Runtime's CPU has no bf16
        logits = torch.from_numpy(onnx_session(path, 1, optimize=False)(x))
        torch.testing.assert_close(logits, expected, rtol=0.01, atol=0.01)


def test_gelu_is_exact_in_float32_and_by_tanh_in_half_precision(tmp_path: Path):
    module = nn.Sequential(nn.Flatten(), nn.GELU())
    x = torch.linspace(-3, 3, 2 * 3 * 32 * 32).half().float().reshape(2, 3, 32, 32)
    rounding = 2**-10  # of half precision between 2 and 4
    for dtype, formula, error in ((None, "none", 1e-6), (torch.float16, "tanh", 5e-4 + rounding)):
        path = export(module, tmp_path / f"{formula}.onnx", dtype)
        (gelu,) = (node for node in ir.load(path).graph if node.op_type == "Gelu")
        assert gelu.attributes.get_string("approximate", "none") == formula
        activations = torch.from_numpy(onnx_session(path, 1, optimize=False)(x))
        torch.testing.assert_close(activations, module(x), rtol=0, atol=error)


class Standardised(nn.Module):
    """A convolution whose weights are standardised in the network, as an NFNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 3, 16, 16))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean(0)) / self.weight.std(0)
        return self.head(nn.functional.conv2d(x, weight).mean((2, 3)))


def test_weights_that_are_computed_are_folded(tmp_path: Path):
    torch.manual_seed(0)
    module = Standardised().eval().requires_grad_(False)
    path = export(module, tmp_path / "folded.onnx")
    (convolution,) = (node for node in ir.load(path).graph if node.op_type == "Conv")
    assert onnx_tools.weight_axis(convolution) == 0
    x = digit_inputs(2)
    logits = torch.from_numpy(onnx_session(path, 1)(x))
    torch.testing.assert_close(logits, module(x), rtol=1e-4, atol=1e-4)


def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx_tools, "EXTERNAL_DATA_BYTES", 10_000)
    module, path = small_cnn(), tmp_path / "large[1].onnx"
    export(module, path)
    names = [node.inputs[0].name for node in ir.load(path).graph if node.op_type == "Conv"]
    ranges = onnx_tools.calibrate(path, names, [digit_inputs(2).numpy()], 1)
    assert all(largest > 0 for largest, _ in ranges.values())
    beside = tmp_path / "large[1].onnx.data"
    assert beside.stat().st_size > 50_000
    assert onnx_tools.onnx_files(path) == [path, beside]
    (tmp_path / "large[1].onnx.more").write_bytes(b"of another")
    assert onnx_tools.onnx_bytes(path) == path.stat().st_size + beside.stat().st_size
    before = onnx_tools.hash_onnx(path)
    content = bytearray(beside.read_bytes())
    content[0] ^= 1
    beside.write_bytes(content)
    assert onnx_tools.hash_onnx(path) != before


def test_check_refuses_what_part_3_cannot_serve(exported: tuple[nn.Module, Path], tmp_path: Path):
    _, path = exported
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(Exception, match=r"(?i)pars|protobuf|decod"):
        check_onnx(broken, 32, 10)
    model = ir.load(path)
    model.graph.outputs.append(model.graph.inputs[0])
    ir.save(model, broken)
    with pytest.raises(ValueError, match=r"expected float32 \[N, 3, 32, 32\] in, \[N, 10\] out"):
        check_onnx(broken, 32, 10)
    fixed = onnx.load(path)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(fixed, broken)
    with pytest.raises(ValueError, match="for any N"):
        check_onnx(broken, 32, 10)


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


# --- explicit quantisation ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float16 files of the digits ViT and of a small CNN."""
    folder = tmp_path_factory.mktemp("halves")
    modules = {"vit": load_model(DIGITS).module, "cnn": small_cnn()}
    return {
        name: export(module, folder / f"{name}.onnx", torch.float16)
        for name, module in modules.items()
    }


def quantize(source: Path, target: Path, kind: str, per_channel: bool = True) -> dict[str, float]:
    products = onnx_tools.find_products(ir.load(source).graph, kind)
    tensors = [value.name for value in onnx_tools.find_activations(products)]
    batches = [batch.numpy() for batch in digit_inputs(64, "train").split(8)]
    ranges = onnx_tools.calibrate(source, tensors, batches, 1)
    return onnx_tools.quantize_onnx(source, target, kind, ranges, per_channel)


def restored(node: ir.Node) -> list[bool]:
    """For each of the first two inputs: does it come from a DequantizeLinear?"""
    makers = [value.producer() for value in node.inputs[:2]]
    return [maker is not None and maker.op_type == "DequantizeLinear" for maker in makers]


def quantized_products(path: Path) -> list[ir.Node]:
    products = [node for node in ir.load(path).graph if node.op_type in onnx_tools.PRODUCTS]
    return [node for node in products if all(restored(node))]


@pytest.mark.parametrize(("kind", "activations"), [("int8", 32), ("fp8", 16)])
def test_of_a_vit_the_blocks_are_quantised(
    kind: str, activations: int, halves: dict[str, Path], tmp_path: Path
):
    counts = quantize(halves["vit"], tmp_path / "q.onnx", kind)
    # Four blocks of four linear layers, and in int8 attention's two products. Neither the stem's
    # convolutions nor the classifier.
    products = 24 if kind == "int8" else 16
    kinds = [node.op_type for node in quantized_products(tmp_path / "q.onnx")]
    assert kinds == ["MatMul"] * products
    assert (counts["quantized_weights"], counts["weights"]) == (16, 22)
    assert counts["quantized_activations"] == activations
    assert 50 < counts["quantized_work_percent"] < 95
    graph = ir.load(tmp_path / "q.onnx").graph
    makers = [value.producer() for node in graph for value in node.inputs if value is not None]
    restoring = [maker for maker in makers if maker and maker.op_type == "DequantizeLinear"]
    assert len(restoring) == 2 * products  # nothing else reads a restored tensor


def test_of_a_cnn_the_convolutions_are_quantised_in_int8_only(
    halves: dict[str, Path], tmp_path: Path
):
    quantize(halves["cnn"], tmp_path / "q.onnx", "int8")
    kinds = [node.op_type for node in quantized_products(tmp_path / "q.onnx")]
    assert sorted(kinds) == ["Conv", "Conv", "Gemm"]
    with pytest.raises(UnavailableError, match=r"next to nothing to quantise: 1 of 5 weights, 0 %"):
        quantize(halves["cnn"], tmp_path / "f.onnx", "fp8")
    classifier = export(Standardised().eval(), tmp_path / "classifier.onnx", torch.float16)
    with pytest.raises(UnavailableError, match="next to nothing to quantise: 0 of 2 weights"):
        quantize(classifier, tmp_path / "f.onnx", "int8")
    assert not (tmp_path / "f.onnx").exists()


@pytest.mark.parametrize("per_channel", [True, False])
def test_scales_are_symmetric_and_of_each_output_channel(
    per_channel: bool, halves: dict[str, Path], tmp_path: Path
):
    quantize(halves["cnn"], tmp_path / "q.onnx", "int8", per_channel=per_channel)
    for node in quantized_products(tmp_path / "q.onnx"):
        activation, weight = (value.producer() for value in node.inputs[:2])
        original = weight.inputs[0].producer().inputs[0].const_value.numpy().astype(np.float32)
        others = tuple(range(1, original.ndim)) if per_channel else None
        scales = weight.inputs[1].const_value.numpy()
        assert scales.dtype == np.float16
        expected = np.abs(original).max(axis=others) / 127
        np.testing.assert_allclose(scales.astype(np.float32), expected, rtol=0.01)
        assert ("axis" in weight.attributes) is per_channel
        assert activation.inputs[1].const_value.numpy().shape == ()
        for pair in (activation, weight):
            assert pair.inputs[2].dtype == ir.DataType.INT8
            assert not pair.inputs[2].const_value.numpy().any()
            assert list(pair.inputs[0].producer().inputs)[1:] == list(pair.inputs)[1:]


@pytest.mark.parametrize(
    ("network", "kind", "products", "fidelity"),
    [("vit", "int8", 24, 0.999), ("vit", "fp8", 16, 0.995), ("cnn", "int8", 3, 0.999)],
)
def test_quantised_file_is_valid_and_close(
    network: str,
    kind: str,
    products: int,
    fidelity: float,
    halves: dict[str, Path],
    tmp_path: Path,
):
    path = tmp_path / "q.onnx"
    quantize(halves[network], path, kind, per_channel=kind == "int8")
    check_onnx(path, 32, 10)
    assert len(quantized_products(path)) == products
    x = digit_inputs(45)
    plain, logits = (
        torch.from_numpy(onnx_session(file, 1, optimize=False)(x))
        for file in (halves[network], path)
    )
    assert fidelity < centred_cosine(logits, plain) < 1 - 1e-7
    zeros = [v for name, v in ir.load(path).graph.initializers.items() if name.endswith("_zero")]
    assert {value.dtype for value in zeros} == {onnx_tools.TYPES[kind]}


def make_graph(nodes: Sequence[Any], weights: dict[str, tuple[int, ...]]) -> ir.Graph:
    """A graph from `images`; all tensors but the weights are float32 `[batch, 32, 8, 8]`."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    names = [name for node in nodes for name in node.output]
    shape = ("batch", 32, 8, 8)
    values = [helper.make_tensor_value_info(name, kind, shape) for name in ("images", *names)]
    constants = [
        numpy_helper.from_array(np.ones(size, np.float32), name) for name, size in weights.items()
    ]
    graph = helper.make_graph(
        nodes, "g", values[:1], values[-1:], constants, value_info=values[1:-1]
    )
    opset = helper.make_opsetid("", 20)
    return ir.from_proto(helper.make_model(graph, opset_imports=[opset], ir_version=10)).graph


def make_node(operator: str, inputs: str, output: str) -> Any:
    return onnx.helper.make_node(operator, inputs.split(), [output], name=output)


TWO_HEADS = [("MatMul", "body head", "a"), ("MatMul", "x head2", "b")]


@pytest.mark.parametrize(
    "tail",
    [
        [("MatMul", "body head", "a"), ("Add", "a constant", "out")],
        # Two heads whose logits are averaged, as of a distilled network.
        [*TWO_HEADS, ("Add", "a b", "c"), ("Mul", "c constant", "out")],
        # An auxiliary head whose largest logits are added.
        [*TWO_HEADS, ("ReduceMax", "b", "c"), ("Add", "a c", "out")],
        # By cosine similarity.
        [("Sigmoid", "body", "n"), ("MatMul", "n head", "a"), ("Sigmoid", "a", "out")],
    ],
)
def test_classifiers_are_what_the_output_is_made_of(tail: list[tuple[str, str, str]]):
    nodes = [make_node("Relu", "images", "x"), make_node("MatMul", "x matrix", "body")]
    nodes += [make_node(*step) for step in tail]
    weights: dict[str, tuple[int, ...]] = {"constant": (32,)}
    weights |= dict.fromkeys(("matrix", "head", "head2"), (32, 32))
    products = onnx_tools.find_products(make_graph(nodes, weights), "int8")
    assert [node.name for node in products] == ["body"]


@pytest.mark.parametrize(
    ("kernel", "matrix", "quantized"),
    [
        ((32, 32, 3, 3), (32, 32), ["conv", "product"]),  # a convolutional network
        ((32, 16, 1, 1), (32, 64), ["product"]),  # mostly linear: a patch embedding stays as it is
        ((32, 1, 3, 3), (32, 32), ["product"]),  # depthwise
        ((32, 32, 3, 3), (32, 8), ["conv"]),  # narrow
    ],
)
def test_wide_products_are_quantised(
    kernel: tuple[int, ...], matrix: tuple[int, ...], quantized: list[str]
):
    nodes = [
        make_node("Conv", "images kernel", "conv"),
        make_node("MatMul", "conv matrix", "product"),
    ]
    nodes += [make_node("MatMul", "product head", "out")]
    graph = make_graph(nodes, {"kernel": kernel, "matrix": matrix, "head": (matrix[1], 32)})
    for kind in ("int8", "fp8"):
        products = onnx_tools.find_products(graph, kind)
        wanted = [name for name in quantized if kind == "int8" or name != "conv"]
        assert [node.name for node in products] == wanted


def test_range_counts_every_channel(tmp_path: Path):
    """1.2 million values, 384 channels: every 24th value would always be of the same 16."""
    values = np.random.default_rng(0).normal(size=(3200, 384)).astype(np.float32)
    values[:, 5] = 20
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    tensors = [helper.make_tensor_value_info(n, kind, ["batch", 384]) for n in ("images", "inner")]
    graph = helper.make_graph([make_node("Relu", "images", "inner")], "g", tensors[:1], tensors[1:])
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "g.onnx")
    batches = [values[:3000], values[3000:]]  # the last is incomplete
    largest, best = onnx_tools.calibrate(tmp_path / "g.onnx", ["inner"], batches, 1)["inner"]
    assert largest == 20
    assert best == pytest.approx(20, rel=0.05)


def test_clipping_gives_up_an_outlier_for_precision():
    values = np.abs(np.random.default_rng(0).normal(size=100_000)).astype(np.float32)
    values[0] = 20
    assert onnx_tools._best_range(values, 20.0) < 15
    uniform = np.linspace(0, 1, 10_000, dtype=np.float32)
    assert onnx_tools._best_range(uniform, 1.0) == pytest.approx(1, abs=0.03)


def test_nan_in_an_activation_stops_the_calibration(halves: dict[str, Path]):
    batch = digit_inputs(2).numpy()
    batch[1, 0, 0, 0] = np.nan
    products = onnx_tools.find_products(ir.load(halves["cnn"]).graph, "int8")
    name = onnx_tools.find_activations(products)[0].name
    with pytest.raises(FloatingPointError, match="NaN"):
        onnx_tools.calibrate(halves["cnn"], [name], [batch], 1)
    assert not list(halves["cnn"].parent.glob(".*"))


def test_channel_of_zeros_keeps_a_scale(tmp_path: Path):
    module = small_cnn()
    module.get_parameter("1.conv.weight")[3] = 0
    source = export(module, tmp_path / "half.onnx", torch.float16)
    quantize(source, tmp_path / "q.onnx", "int8")
    constants = ir.load(tmp_path / "q.onnx").graph.initializers.items()
    scales = [value.const_value.numpy() for name, value in constants if name.endswith("_scale")]
    assert min(float(scale.min()) for scale in scales) > 0
    logits = onnx_session(tmp_path / "q.onnx", 1, optimize=False)(digit_inputs(3))
    assert np.isfinite(logits).all()
