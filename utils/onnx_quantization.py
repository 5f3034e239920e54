"""Explicit quantisation of an ONNX graph: QuantizeLinear/DequantizeLinear pairs, calibrated.

A pair in front of a product tells TensorRT to fuse it and to compute the product in 8 bits; the
rest of the graph keeps its own precision. Weights keep their floats in the file, with a pair per
output channel: TensorRT folds them when it builds. Symmetric scales only, as TensorRT demands.
NumPy, onnx and ONNX Runtime serve; NVIDIA's ModelOpt is not needed.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.onnx_tools import save_onnx

LARGEST = {"int8": 127.0, "fp8": 448.0}  # of the 8-bit type; fp8 is e4m3
FEWEST_CHANNELS = 16  # a narrower product does not fill an 8-bit matrix instruction
MOST_FP8_TAPS = 32  # TensorRT has fp8 convolutions only for smaller kernels, and more channels
CLIPPING = np.linspace(0.3, 1.0, 36)  # of the largest magnitude seen: candidates for an int8 range
SAMPLED = 50_000  # random values of a tensor kept from each calibration batch
SMALLEST_SCALE = 2.0**-20  # float16 still holds it, to 6 %: a channel of zeros needs some scale


class NothingToQuantizeError(ValueError):
    """The graph has no operator of the wanted kind."""


@dataclass(frozen=True)
class Site:
    """One input of one node that gets a pair: a weight per channel, else per tensor."""

    node: str
    position: int  # of the input
    tensor: str
    axis: int | None  # of the output channels of a weight; None for an activation


# --- where the pairs go ---------------------------------------------------------------------------


def find_sites(model: Any, parts: Sequence[str], kind: str) -> list[Site]:
    """The inputs to quantise, in the graph's order.

    `linear`: convolutions and products with a constant, both inputs, but for the narrow ones and
    for the last, which makes the logits. `attention`: products of two activations. `residual`:
    the skip branch of sums of two activations.
    """
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    floats = _float_tensors(model)
    linear = [node for node in model.graph.node if _weight_axis(node, shapes) is not None][:-1]
    names = {node.name for node in linear if _is_wide(node, shapes, kind)}
    sites = []
    for node in model.graph.node:
        first, second = (*node.input, "", "")[:2]
        axis = _weight_axis(node, shapes) if node.name in names else None
        both_computed = {first, second} <= floats and first not in shapes and second not in shapes
        if "linear" in parts and axis is not None:
            sites += [Site(node.name, 0, first, None), Site(node.name, 1, second, axis)]
        elif "attention" in parts and both_computed and node.op_type == "MatMul":
            sites += [Site(node.name, 0, first, None), Site(node.name, 1, second, None)]
        elif "residual" in parts and both_computed and node.op_type == "Add":
            weighted = [_is_weighted(makers.get(name), makers, shapes) for name in node.input]
            skip = 1 if weighted == [True, False] else 0
            sites.append(Site(node.name, skip, node.input[skip], None))
    return sites


def _is_weighted(node: Any, makers: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether a node is a product with a weight, its bias included: a sum is fused into that."""
    if node is None or _weight_axis(node, shapes) is not None:
        return node is not None
    if node.op_type != "Add" or not any(name in shapes for name in node.input):
        return False
    inner = (makers.get(name) for name in node.input)
    return any(n is not None and _weight_axis(n, shapes) is not None for n in inner)


def _float_tensors(model: Any) -> set[str]:
    """Names of the float16 and float32 tensors: sums of shapes are no residual additions."""
    import onnx

    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    return {value.name for value in values if value.type.tensor_type.elem_type in kinds}


def _weight_axis(node: Any, shapes: dict[str, tuple[int, ...]]) -> int | None:
    """The axis of the output channels in a node's constant weight; None if it has none."""
    attributes = {entry.name: entry.i for entry in node.attribute}
    if len(node.input) < 2 or node.input[1] not in shapes:
        return None
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attributes.get("transB") else 1
    return 1 if node.op_type == "MatMul" and len(shapes[node.input[1]]) == 2 else None


def _is_wide(node: Any, shapes: dict[str, tuple[int, ...]], kind: str) -> bool:
    """Whether the weight has enough input and output channels (a grouped convolution has not)."""
    channels, taps = shapes[node.input[1]][:2], math.prod(shapes[node.input[1]][2:])
    if kind == "fp8" and node.op_type == "Conv":
        return min(channels) > FEWEST_CHANNELS and taps <= MOST_FP8_TAPS
    return min(channels) >= FEWEST_CHANNELS


# --- how wide their ranges are --------------------------------------------------------------------


def calibrate(
    path: Path,
    tensors: Sequence[str],
    images: np.ndarray,
    batch_size: int,
    threads: int,
    clip: bool,
) -> dict[str, float]:
    """The range of each activation over preprocessed images `[N, 3, S, S]`.

    Args:
        clip: choose the range with the least squared error of int8 rounding and clipping; else
            the range is the largest magnitude.
    """
    generator = np.random.default_rng(0)
    largest = dict.fromkeys(tensors, 0.0)
    samples: dict[str, list[np.ndarray]] = {name: [] for name in tensors}
    with _watching(path, tensors, threads) as run:
        for start in range(0, len(images), batch_size):
            for name, values in run(images[start : start + batch_size]).items():
                magnitudes = np.abs(values.astype(np.float32)).ravel()
                largest[name] = float(np.maximum(largest[name], magnitudes.max()))  # keeps a NaN
                samples[name].append(_sample(magnitudes, generator))
    if not all(np.isfinite(value) for value in largest.values()):
        raise FloatingPointError(f"{path.name}: an activation holds NaN or infinity")
    if not clip:
        return largest
    return {name: _best_range(np.concatenate(samples[name]), largest[name]) for name in tensors}


def _sample(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """SAMPLED of them, or all. At random: every n-th value may always be of the same channels."""
    if len(values) <= SAMPLED:
        return values
    return values[generator.integers(len(values), size=SAMPLED)]


@contextlib.contextmanager
def _watching(path: Path, tensors: Sequence[str], threads: int) -> Iterator[Any]:
    """A function from images to the named inner tensors of the graph at `path`."""
    import onnx
    import onnxruntime

    model = onnx.load(path, load_external_data=False)
    values = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    del model.graph.output[:]
    model.graph.output.extend(values[name] for name in tensors)
    watched = path.with_name(f".{path.name}.watched")  # beside it, for the external data
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        onnx.save_model(model, watched)
        session = onnxruntime.InferenceSession(watched, options, ["CPUExecutionProvider"])
        yield lambda x: dict(zip(tensors, session.run(list(tensors), {"images": x}), strict=True))
    finally:
        watched.unlink(missing_ok=True)


def _best_range(magnitudes: np.ndarray, largest: float) -> float:
    """The range whose int8 rounding and clipping errors have the least sum of squares."""

    def error(limit: float) -> float:
        scale = max(limit, SMALLEST_SCALE) / LARGEST["int8"]
        rounded = np.clip(np.rint(magnitudes / scale), 0, LARGEST["int8"]) * scale
        return float(np.square(rounded - magnitudes).sum())

    return float(min((largest * CLIPPING).tolist(), key=error))


# --- writing the quantised graph ------------------------------------------------------------------


def quantize_graph(
    source: Path,
    target: Path,
    kind: str,
    parts: Sequence[str],
    images: np.ndarray,
    batch_size: int,
    threads: int,
) -> dict[str, int]:
    """Write `source` with pairs at the chosen parts; return how many weights and activations.

    Args:
        kind: `int8` or `fp8`.
        parts: what is quantised, of `linear`, `attention` and `residual`.
        images: float32 `[N, 3, S, S]`, preprocessed training images.

    Raises:
        NothingToQuantizeError: the graph has nothing to quantise for one of the parts.
    """
    import onnx

    model = onnx.load(source)
    sites = find_sites(model, parts, kind)
    for part in parts:
        if not find_sites(model, [part], kind):
            raise NothingToQuantizeError(
                f"this network has no {part} operators that {kind} could serve"
            )
    activations = list(dict.fromkeys(site.tensor for site in sites if site.axis is None))
    ranges = calibrate(source, activations, images, batch_size, threads, clip=kind == "int8")
    insert_pairs(model, sites, ranges, kind)
    save_onnx(model, target)
    weights = {site.tensor for site in sites if site.axis is not None}
    return {"quantized_weights": len(weights), "quantized_activations": len(activations)}


def insert_pairs(model: Any, sites: Sequence[Site], ranges: dict[str, float], kind: str) -> None:
    """Put a pair on every site, in place; sites that read the same tensor share one."""
    from onnx import numpy_helper

    constants = {t.name: t for t in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    before: dict[str, list[Any]] = {}  # the pairs to insert, by the node that needs them first
    done: dict[str, str] = {}
    for site in sites:
        if site.tensor not in done:
            if site.axis is None:
                limits = np.array(ranges[site.tensor])
            else:
                weight = numpy_helper.to_array(constants[site.tensor])
                others = tuple(i for i in range(weight.ndim) if i != site.axis)
                limits = np.abs(weight.astype(np.float32)).max(axis=others)
            pair = _make_pair(model, site, limits, kind)
            before.setdefault(site.node, []).extend(pair)
            done[site.tensor] = pair[1].output[0]
        nodes[site.node].input[site.position] = done[site.tensor]
    ordered = [new for node in model.graph.node for new in (*before.get(node.name, ()), node)]
    del model.graph.node[:]
    model.graph.node.extend(ordered)


def _make_pair(model: Any, site: Site, limits: np.ndarray, kind: str) -> tuple[Any, Any]:
    """A QuantizeLinear and a DequantizeLinear node; their constants go into the model."""
    from onnx import TensorProto, helper, numpy_helper

    scale = np.maximum(limits / LARGEST[kind], SMALLEST_SCALE).astype(_dtype_of(model, site.tensor))
    zero = TensorProto.INT8 if kind == "int8" else TensorProto.FLOAT8E4M3FN
    name = site.tensor
    model.graph.initializer.extend(
        [
            numpy_helper.from_array(scale, f"{name}_scale"),
            helper.make_tensor(f"{name}_zero", zero, scale.shape, bytes(scale.size), raw=True),
        ]
    )
    constants = [f"{name}_scale", f"{name}_zero"]
    axis: dict[str, Any] = {} if site.axis is None else {"axis": site.axis}

    def node(operator: str, source: str, target: str) -> Any:
        return helper.make_node(
            operator, [source, *constants], [target], f"{name}_{operator}", **axis
        )

    quantized, restored = f"{name}_quantized", f"{name}_restored"
    return (
        node("QuantizeLinear", name, quantized),
        node("DequantizeLinear", quantized, restored),
    )


def _dtype_of(model: Any, tensor: str) -> np.dtype:
    """The scales' type is the tensor's: DequantizeLinear restores to it."""
    import onnx

    graph = model.graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    values = (*graph.value_info, *graph.input, *graph.output)
    kinds |= {value.name: value.type.tensor_type.elem_type for value in values}
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kinds[tensor]))
