"""Where the quantising pairs go, what their scales are, and what they cost in fidelity."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from tests.test_onnx_tools import digit_inputs, small_cnn
from utils import onnx_quantization as quantization
from utils.evaluation import centred_cosine
from utils.models import load_model
from utils.onnx_tools import HalfPrecision, check_onnx, onnx_session, write_onnx


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float16 graphs of the digits ViT and of a small CNN."""
    folder = tmp_path_factory.mktemp("graphs")
    modules = {"vit": load_model("vit_digits").module, "cnn": small_cnn()}
    for name, module in modules.items():
        write_onnx(HalfPrecision(module), torch.zeros(1, 3, 32, 32), folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in modules}


def quantize(source: Path, target: Path, kind: str, parts: Sequence[str]) -> dict[str, int]:
    images = digit_inputs(64, "train").numpy()
    return quantization.quantize_graph(source, target, kind, parts, images, 16, 1)


class Placement:
    """A quantised graph, read back."""

    def __init__(self, path: Path) -> None:
        self.graph = onnx.load(path).graph
        self.maker = {output: node for node in self.graph.node for output in node.output}
        self.constants = {t.name: t for t in self.graph.initializer}

    def products(self) -> list[Any]:
        return [n for n in self.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]

    def restored(self, node: Any) -> list[bool]:
        """For each of the first two inputs: does it come from a DequantizeLinear?"""
        makers = [self.maker.get(name) for name in list(node.input)[:2]]
        return [maker is not None and maker.op_type == "DequantizeLinear" for maker in makers]

    def quantized(self) -> list[Any]:
        return [node for node in self.products() if all(self.restored(node))]


def test_linear_pairs_stand_before_every_wide_product_but_the_last(
    graphs: dict[str, Path], tmp_path: Path
):
    counts = quantize(graphs["vit"], tmp_path / "q.onnx", "int8", ["linear"])
    placed = Placement(tmp_path / "q.onnx")
    # Four blocks of four linear layers, and of the stem's five convolutions those with at least
    # 16 channels on both sides. Neither the attention's eight products nor the classifier.
    kinds = [node.op_type for node in placed.quantized()]
    assert kinds == ["Conv"] * 3 + ["MatMul"] * 16
    assert counts == {"quantized_weights": 19, "quantized_activations": 19}
    plain = [node for node in placed.products() if not any(placed.restored(node))]
    assert [node.op_type for node in plain] == ["Conv"] * 2 + ["MatMul"] * 8 + ["Gemm"]
    consumers = [node for node in placed.graph.node for name in node.input if "_restored" in name]
    assert {node.op_type for node in consumers} == {"Conv", "MatMul"}


def test_scales_are_per_output_channel_and_symmetric(graphs: dict[str, Path], tmp_path: Path):
    quantize(graphs["vit"], tmp_path / "q.onnx", "int8", ["linear"])
    placed = Placement(tmp_path / "q.onnx")
    for node in placed.quantized():
        activation, weight = (placed.maker[name] for name in list(node.input)[:2])
        axis = {entry.name: entry.i for entry in weight.attribute}["axis"]
        original = numpy_helper.to_array(
            placed.constants[placed.maker[weight.input[0]].input[0]]
        ).astype(np.float32)
        others = tuple(i for i in range(original.ndim) if i != axis)
        assert axis == (0 if node.op_type == "Conv" else 1)
        scales = numpy_helper.to_array(placed.constants[weight.input[1]])
        assert scales.dtype == np.float16
        np.testing.assert_allclose(
            scales.astype(np.float32), np.abs(original).max(axis=others) / 127, rtol=0.01
        )
        assert not activation.attribute
        assert numpy_helper.to_array(placed.constants[activation.input[1]]).shape == ()
        for pair in (activation, weight):
            assert not numpy_helper.to_array(placed.constants[pair.input[2]]).any()
            assert placed.constants[pair.input[2]].data_type == onnx.TensorProto.INT8
            assert list(placed.maker[pair.input[0]].input)[1:] == list(pair.input)[1:]


def test_attention_and_residual_are_variants(graphs: dict[str, Path], tmp_path: Path):
    quantize(graphs["vit"], tmp_path / "a.onnx", "int8", ["linear", "attention"])
    attention = Placement(tmp_path / "a.onnx")
    assert [n.op_type for n in attention.quantized()].count("MatMul") == 24
    quantize(graphs["vit"], tmp_path / "r.onnx", "int8", ["linear", "residual"])
    residual = Placement(tmp_path / "r.onnx")
    sums = [n for n in residual.graph.node if n.op_type == "Add"]
    # Only the skip branch, which the exporter writes first: the other comes from a product.
    assert sum(residual.restored(n) == [True, False] for n in sums) == 8
    assert not any(residual.restored(n)[1] for n in sums)
    assert len(residual.quantized()) == 19
    # A bias is a sum with a constant and stays as it is; so do the additions of shapes.
    assert sum(not any(residual.restored(n)) for n in sums) == len(sums) - 8


@pytest.mark.parametrize(
    ("network", "kind", "parts", "fidelity"),
    [
        ("vit", "int8", ["linear"], 0.999),
        ("vit", "int8", ["linear", "attention"], 0.999),
        ("vit", "int8", ["linear", "residual"], 0.999),
        ("vit", "fp8", ["linear", "attention"], 0.995),
        ("cnn", "int8", ["linear"], 0.999),
        ("cnn", "int8", ["linear", "residual"], 0.999),
        ("cnn", "fp8", ["linear"], 0.99),
    ],
)
def test_quantised_graph_is_valid_and_close(
    network: str,
    kind: str,
    parts: list[str],
    fidelity: float,
    graphs: dict[str, Path],
    tmp_path: Path,
):
    path = tmp_path / "q.onnx"
    quantize(graphs[network], path, kind, parts)
    check_onnx(path)
    x = digit_inputs(45)
    plain, logits = (
        torch.from_numpy(onnx_session(file, 1, optimize=False)(x))
        for file in (graphs[network], path)
    )
    assert fidelity < centred_cosine(logits, plain) < 1 - 1e-7
    largest = max(np.abs(numpy_helper.to_array(t)).max() for t in _zeros(path))
    assert float(largest) == 0


def _zeros(path: Path) -> list[Any]:
    found = [t for t in onnx.load(path).graph.initializer if t.name.endswith("_zero")]
    assert found
    return found


def test_fp8_graph_holds_e4m3(graphs: dict[str, Path], tmp_path: Path):
    quantize(graphs["vit"], tmp_path / "q.onnx", "fp8", ["linear"])
    kinds = {t.data_type for t in _zeros(tmp_path / "q.onnx")}
    assert kinds == {onnx.TensorProto.FLOAT8E4M3FN}


def test_network_without_attention_says_so(graphs: dict[str, Path], tmp_path: Path):
    with pytest.raises(quantization.NothingToQuantizeError, match="no attention operators"):
        quantize(graphs["cnn"], tmp_path / "q.onnx", "int8", ["linear", "attention"])
    assert not (tmp_path / "q.onnx").exists()


def test_nodes_are_chosen_by_identity_not_by_prefix(graphs: dict[str, Path], tmp_path: Path):
    model = onnx.load(graphs["vit"])
    products = [n for n in model.graph.node if n.op_type == "MatMul"]
    attention = [n for n in products if n.input[1] not in {t.name for t in model.graph.initializer}]
    for node in products:
        node.name = f"other_{node.name}"
    attention[0].name = "product_1"
    weighted = [n for n in products if n not in attention]
    for i, node in enumerate(weighted):
        node.name = f"product_1{i}"
    sites = quantization.find_sites(model, ["linear"], "int8")
    assert "product_1" not in {site.node for site in sites}
    assert {f"product_1{i}" for i in range(16)} <= {site.node for site in sites}


def make_graph(nodes: Sequence[Any], weights: dict[str, tuple[int, ...]]) -> Any:
    """A graph from `images`; all tensors but the weights are float32 of any shape."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    names = [name for node in nodes for name in node.output]
    values = [helper.make_tensor_value_info(name, kind, None) for name in ("images", *names)]
    constants = [
        numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in weights.items()
    ]
    graph = helper.make_graph(
        nodes, "g", values[:1], values[-1:], constants, value_info=values[1:-1]
    )
    opset = helper.make_opsetid("", 20)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10)


def make_node(operator: str, inputs: str, output: str) -> Any:
    return onnx.helper.make_node(operator, inputs.split(), [output], name=output)


@pytest.mark.parametrize(
    ("inputs", "skip"),
    [
        ("plain conv", "plain"),
        ("conv plain", "plain"),
        ("biased plain", "plain"),
        ("product plain", "plain"),
        ("plain other", "plain"),
        ("other plain", "other"),
        ("conv biased", "conv"),
    ],
)
def test_of_a_sum_the_branch_without_a_product_is_quantised(inputs: str, skip: str):
    nodes = [
        make_node("Relu", "images", "plain"),
        make_node("Sigmoid", "images", "other"),
        make_node("Conv", "images kernel", "conv"),
        make_node("MatMul", "images matrix", "product"),
        make_node("Add", "bias product", "biased"),
        make_node("Add", inputs, "sum"),
    ]
    model = make_graph(nodes, {"kernel": (32, 32, 1, 1), "matrix": (32, 32), "bias": (32,)})
    (site,) = quantization.find_sites(model, ["residual"], "int8")
    assert (site.node, site.tensor, site.axis) == ("sum", skip, None)
    assert inputs.split()[site.position] == skip


@pytest.mark.parametrize(
    ("shape", "kinds"),
    [
        ((32, 32, 3, 3), ["int8", "fp8"]),
        ((32, 16, 3, 3), ["int8"]),
        ((16, 32, 1, 1), ["int8"]),
        ((32, 32, 6, 6), ["int8"]),
        ((32, 8, 3, 3), []),
    ],
)
def test_fp8_convolutions_are_wide_and_small(shape: tuple[int, ...], kinds: list[str]):
    nodes = [make_node("Conv", "images kernel", "conv"), make_node("MatMul", "conv matrix", "out")]
    model = make_graph(nodes, {"kernel": shape, "matrix": (32, 32)})
    found = [kind for kind in ("int8", "fp8") if quantization.find_sites(model, ["linear"], kind)]
    assert found == kinds


def test_range_counts_every_channel(tmp_path: Path):
    """1.2 million values, 384 channels: every 24th value would always be of the same 16."""
    values = np.random.default_rng(0).normal(size=(3200, 384)).astype(np.float32)
    values[:, 5] = 20
    nodes = [make_node("Relu", "images", "inner"), make_node("Relu", "inner", "out")]
    onnx.save(make_graph(nodes, {}), tmp_path / "g.onnx")
    ranges = quantization.calibrate(tmp_path / "g.onnx", ["inner"], values, 3200, 1, clip=True)
    assert ranges["inner"] == pytest.approx(20, rel=0.05)


def test_calibration_sees_every_batch(graphs: dict[str, Path]):
    images = digit_inputs(20, "train").numpy()
    images[19] *= 3  # in the last, incomplete batch
    name = next(n.input[0] for n in onnx.load(graphs["vit"]).graph.node if n.op_type == "Conv")
    ranges = quantization.calibrate(graphs["vit"], [name], images, 8, 1, clip=False)
    assert ranges[name] == pytest.approx(np.abs(images[19]).max(), rel=1e-3)
    assert not list(graphs["vit"].parent.glob(".*"))


def test_clipping_gives_up_an_outlier_for_precision():
    values = np.abs(np.random.default_rng(0).normal(size=100_000)).astype(np.float32)
    values[0] = 20
    assert quantization._best_range(values, 20.0) < 15
    uniform = np.linspace(0, 1, 10_000, dtype=np.float32)
    assert quantization._best_range(uniform, 1.0) == pytest.approx(1, abs=0.03)


def test_nan_in_an_activation_stops_the_calibration(graphs: dict[str, Path], tmp_path: Path):
    model = onnx.load(graphs["cnn"])
    (weight,) = (t for t in model.graph.initializer if t.name.endswith("0.weight"))
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "nan.onnx")
    with pytest.raises(FloatingPointError, match="NaN"):
        quantize(tmp_path / "nan.onnx", tmp_path / "q.onnx", "int8", ["linear"])
    assert not (tmp_path / "q.onnx").exists()


def test_channel_of_zeros_keeps_a_scale(tmp_path: Path):
    module = small_cnn()
    module.get_parameter("1.conv.weight")[3] = 0
    source, target = tmp_path / "half.onnx", tmp_path / "q.onnx"
    write_onnx(HalfPrecision(module), torch.zeros(1, 3, 32, 32), source)
    quantize(source, target, "int8", ["linear"])
    scales = [t for t in onnx.load(target).graph.initializer if t.name.endswith("_scale")]
    assert min(float(numpy_helper.to_array(t).min()) for t in scales) > 0
    assert np.isfinite(onnx_session(target, 1, optimize=False)(digit_inputs(3))).all()
