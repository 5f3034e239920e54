"""ONNX files: writing and checking them, sessions on CPU and GPU, explicit 8-bit quantisation.

A QuantizeLinear/DequantizeLinear pair in front of a product tells TensorRT to fuse it and to
compute the product in 8 bits; the rest of the file keeps its own precision. Weights keep their
floats, with a pair each: TensorRT folds them when it builds. Scales are symmetric, as it demands.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from utils.workers import UnavailableError

EXPORT: dict[str, Any] = {  # settings of torch.onnx.export
    "dynamo": True,
    "opset_version": 20,  # LayerNormalization and Gelu stay single operators
    "input_names": ["images"],
    "output_names": ["logits"],
    "dynamic_shapes": ({0: torch.export.Dim("batch")},),
    "verbose": False,
}
EXTERNAL_DATA_BYTES = 1_800_000_000  # larger weights lie in a file beside: a protobuf ends at 2 GB
ANY_SIZE = 1 << 40  # of a constant that is folded

LARGEST = {"int8": 127.0, "fp8": 448.0}  # of the 8-bit type
TYPES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FEWEST_CHANNELS = 16  # a narrower product does not fill an 8-bit matrix instruction
LEAST_WORK = 10.0  # percent of the multiply-adds: with fewer in 8 bits a network is not quantised
CLIPPING = np.linspace(0.3, 1.0, 36)  # of the largest magnitude seen: candidates for an int8 range
SAMPLED = 2000  # random values of a tensor kept from each calibration image
SMALLEST_SCALE = 2.0**-20  # float16 still holds it, to 6 %: a channel of zeros needs some scale
PRODUCTS = ("Conv", "Gemm", "MatMul")
# What a classifier's output may pass on its way out: averages of several heads, biases, shapes.
AFTER_CLASSIFIER = {"Add", "Cast", "Concat", "Div", "Flatten", "Gather", "GlobalAveragePool"}
AFTER_CLASSIFIER |= {"Identity", "Mean", "Mul", "ReduceMax", "ReduceMean", "Reshape", "Slice"}
AFTER_CLASSIFIER |= {"Softmax", "Squeeze", "Sub", "TopK", "Transpose", "Unsqueeze"}


# --- files ----------------------------------------------------------------------------------------


def save_program(program: Any, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Save what `torch.onnx.export` returned, with its constants folded.

    The same module gives the same bytes wherever it is exported: what the exporter notes about
    source files is dropped.

    Args:
        metadata: kept in the file's `metadata_props`.
    """
    import onnxscript.optimizer
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    # The exporter leaves large constants, such as the standardised weights of an NFNet.
    onnxscript.optimizer.fold_constants(
        program.model, input_size_limit=ANY_SIZE, output_size_limit=ANY_SIZE
    )
    onnxscript.optimizer.remove_unused_nodes(program.model)
    for node in program.model.graph:  # fusing BatchNorm leaves float32 weights in a bf16 network
        if node.op_type == "Conv" and node.inputs[0].dtype == ir.DataType.BFLOAT16:
            for value in node.inputs[1:]:
                weight = value.const_value.numpy().astype(ir.DataType.BFLOAT16.numpy())
                value.const_value = ir.tensor(weight, name=value.name)
                value.dtype = ir.DataType.BFLOAT16
    ClearMetadataAndDocStringPass()(program.model)
    program.model.metadata_props.update(metadata or {})
    save_onnx(program.model, path)


def save_onnx(model: ir.Model, path: Path) -> None:
    """Save a model; weights that are too large lie beside it."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    beside = f"{path.name}.data" if size > EXTERNAL_DATA_BYTES else None
    ir.save(model, path, external_data=beside)


def onnx_files(path: Path) -> list[Path]:
    """An ONNX file and those beside it that hold its weights.

    Raises:
        ValueError: it is not an ONNX file.
    """
    try:
        model = ir.load(path)
    except OSError:
        raise
    except Exception as error:  # protobuf's own, of several versions
        raise ValueError(f"{path} is no ONNX file, or not a whole one") from error
    weights = [value.const_value for value in model.graph.initializers.values()]
    return [path, *sorted({Path(w.path) for w in weights if isinstance(w, ir.ExternalTensor)})]


def onnx_bytes(path: Path) -> int:
    """Size of an ONNX file, with its external data."""
    return sum(file.stat().st_size for file in onnx_files(path))


def hash_onnx(path: Path) -> str:
    """SHA-256 of an ONNX file and of the weights that it keeps in other files."""
    digest = hashlib.sha256()
    for name in onnx_files(path):
        with name.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_onnx(path: Path) -> dict[str, Any]:
    """Run ONNX's checker and its strict shape inference; say what the file holds.

    Raises:
        ValueError: not one float32 `[N, 3, H, W]` in and one float32 `[N, C]` out, for any N.
        Exception: what the checker found.
    """
    import onnx

    onnx.checker.check_model(str(path), full_check=True)  # by path: also above 2 GB
    model = ir.load(path)
    values = [*model.graph.inputs, *model.graph.outputs]
    described = " and ".join(f"{value.name} {value.dtype} {value.shape}" for value in values)
    shapes = [tuple(value.shape or ()) for value in values]
    if [len(shape) for shape in shapes] != [4, 2] or shapes[0][1] != 3:
        raise ValueError(f"{path.name} has {described}: expected [N, 3, H, W] in, [N, C] out")
    if any(value.dtype != ir.DataType.FLOAT for value in values):
        raise ValueError(f"{path.name} has {described}: expected float32")
    if any(isinstance(shape[0], int) for shape in shapes):
        raise ValueError(f"{path.name} has {described}: the batch axis is not dynamic")
    size_mb = onnx_bytes(path) / 1e6
    return {"onnx_opset": model.opset_imports[""], "nodes": len(model.graph), "size_mb": size_mb}


def onnx_int8_shapes(path: Path) -> list[tuple[int, int]]:
    """Shapes of the 8-bit weight matrices in an ONNX file, outputs by inputs."""
    weights = [value.const_value for value in ir.load(path).graph.initializers.values()]
    kinds = (ir.DataType.INT8, ir.DataType.UINT8)
    shapes = [tuple(weight.shape) for weight in weights if weight.dtype in kinds]
    return [(shape[1], shape[0]) for shape in shapes if len(shape) == 2]


# --- ONNX Runtime ---------------------------------------------------------------------------------


def import_onnxruntime() -> Any:
    """ONNX Runtime, which sends nothing and prints errors only."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime


def onnx_session_options(threads: int) -> Any:
    """Options of a session on the CPU; its threads spin within a call and sleep between calls."""
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def onnx_session(path: Path, threads: int, optimize: bool = True) -> Callable[[Tensor], Any]:
    """Run an ONNX file on the CPU.

    Args:
        optimize: False runs the operators as they are written, which is what a check wants: fused
            8-bit kernels differ between versions and CPUs, and some do not load fp8 files.
    """
    runtime, options = import_onnxruntime(), onnx_session_options(threads)
    if not optimize:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    return lambda x: session.run(None, {images.name: x.numpy()})[0]


def onnx_cuda_session(path: Path) -> Callable[[Tensor], Tensor]:
    """Run an ONNX file on PyTorch's current CUDA stream; images and logits stay on the device.

    Raises:
        ImportError: ONNX Runtime has no CUDA provider, or fell back to the CPU, which it does
            silently when it does not find CUDA's libraries.
    """
    runtime, wanted = import_onnxruntime(), "CUDAExecutionProvider"
    if wanted not in runtime.get_available_providers():
        raise ImportError("this ONNX Runtime has no CUDA provider: install onnxruntime-gpu")
    stream = torch.cuda.current_stream().cuda_stream
    settings = {"use_tf32": "0", "user_compute_stream": str(stream)}
    session = runtime.InferenceSession(path, providers=[(wanted, settings)])
    if wanted not in session.get_providers():
        raise ImportError("ONNX Runtime fell back to the CPU: it found no usable CUDA libraries")
    unsynchronized = runtime.RunOptions()
    unsynchronized.add_run_config_entry("disable_synchronize_execution_providers", "1")
    binding = session.io_binding()
    (images,), (output,) = session.get_inputs(), session.get_outputs()
    logits = torch.empty(0)

    def call(x: Tensor) -> Tensor:
        nonlocal logits
        if len(logits) != len(x):
            logits = torch.empty(len(x), output.shape[1], device=x.device)
            shape = tuple(logits.shape)
            binding.bind_output(output.name, "cuda", 0, np.float32, shape, logits.data_ptr())
        binding.bind_input(images.name, "cuda", 0, np.float32, tuple(x.shape), x.data_ptr())
        session.run_with_iobinding(binding, unsynchronized)
        return logits

    return call


# --- where the 8-bit pairs go ---------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """One input of one node that gets a pair."""

    node: ir.Node
    position: int  # of the input
    axis: int | None = None  # of a weight's output channels; None for an activation

    @property
    def value(self) -> Any:
        """The tensor, an ir.Value."""
        return self.node.inputs[self.position]


def find_sites(graph: ir.Graph, parts: Sequence[str], kind: str) -> list[Site]:
    """The inputs to quantise, in the file's order.

    `linear`: convolutions and products with a constant, both inputs; see `choose_weighted`.
    `attention`: products of two activations. `residual`: the skip of a sum, which is computed on
    the way to the sum's other input.
    """
    weighted, sources = choose_weighted(graph, kind), find_sources(graph)
    sites = []
    for node in graph:
        skip = find_skip(node, sources)
        if "linear" in parts and node in weighted:
            sites += [Site(node, 0), Site(node, 1, weight_axis(node))]
        elif "attention" in parts and node.op_type == "MatMul" and sources.keys() >= {*node.inputs}:
            sites += [Site(node, 0), Site(node, 1)]
        elif "residual" in parts and skip is not None:
            sites.append(Site(node, skip))
    return sites


def find_activations(path: Path, parts: Sequence[str], kind: str) -> list[str]:
    """Names of the activations that `find_sites` finds in a file."""
    sites = find_sites(ir.load(path).graph, parts, kind)
    return [site.value.name for site in sites if site.axis is None]


def choose_weighted(graph: ir.Graph, kind: str) -> set[ir.Node]:
    """The products with a weight that are computed in 8 bits.

    Not those that make the logits, nor narrow ones (a grouped convolution is narrow). Convolutions
    stay as they are in fp8, which few of TensorRT's convolutions know, and where they do less than
    the linear layers: TensorRT 10.6 fails on the quantised patch embedding of a ViT.
    """
    weighted = [node for node in graph if weight_axis(node) is not None]
    work = [count_work(node) * (-1 if node.op_type == "Conv" else 1) for node in weighted]
    linear_only = kind == "fp8" or sum(work) > 0
    classifiers = find_classifiers(graph)
    return {
        node
        for node in weighted
        if node not in classifiers
        and min(node.inputs[1].shape[:2]) >= FEWEST_CHANNELS
        and not (linear_only and node.op_type == "Conv")
    }


def weight_axis(node: ir.Node) -> int | None:
    """The axis of the output channels in a product's constant weight; None if it has none."""
    weight = node.inputs[1] if node.op_type in PRODUCTS else None
    if weight is None or weight.const_value is None:
        return None
    if node.op_type == "MatMul":
        return 1 if weight.shape.rank() == 2 else None
    return 0 if node.op_type == "Conv" or node.attributes.get_int("transB", 0) else 1


def count_work(node: ir.Node) -> int:
    """Multiply-adds of a product for one image."""
    axis, (first, second) = weight_axis(node), node.inputs[:2]
    outputs = node.outputs[0].shape.evaluate({"batch": 1})
    inner = first.shape[-1] if axis is None else math.prod(second.shape) // second.shape[axis]
    return inner * math.prod(outputs)


def find_classifiers(graph: ir.Graph) -> set[ir.Node]:
    """The products that reach the output by nothing but AFTER_CLASSIFIER."""
    sources, found, waiting = find_sources(graph), set(), list(graph.outputs)
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node.op_type in PRODUCTS:
            found.add(node)
        elif node and node.op_type in AFTER_CLASSIFIER and find_skip(node, sources) is None:
            waiting += node.inputs
    return found


def find_sources(graph: ir.Graph) -> dict[Any, int]:
    """For each computed tensor the set of tensors that it is computed from, itself included.

    A set is a whole number whose bit i stands for the i-th computed tensor.
    """
    sources: dict[Any, int] = {value: 1 << i for i, value in enumerate(graph.inputs)}
    for node in graph:
        inputs = 0
        for value in node.inputs:
            inputs |= sources.get(value, 0)
        for value in node.outputs if inputs else ():
            sources[value] = inputs | 1 << len(sources)
    return sources


def find_skip(node: ir.Node, sources: Mapping[Any, int]) -> int | None:
    """Which input of a residual sum the other one is computed from; None if it is no such sum."""
    if node.op_type != "Add" or node.outputs[0].dtype not in FLOATS:
        return None
    first, second = (sources.get(value, 0) for value in node.inputs)
    if first and second and first | second in (first, second):
        return 0 if first | second == second else 1
    return None


# --- how wide their ranges are --------------------------------------------------------------------


Range = tuple[float, float]  # of a tensor: the largest magnitude, and the best one for int8


def calibrate(
    path: Path, tensors: Sequence[str], images: Iterable[np.ndarray], threads: int
) -> dict[str, Range]:
    """The range of each of a file's tensors over preprocessed batches, float32 `[N, 3, H, W]`.

    Memory holds all these tensors of one batch, and SAMPLED values of each of the others.

    Raises:
        FloatingPointError: a tensor holds NaN or infinity.
    """
    generator = np.random.default_rng(0)
    largest = dict.fromkeys(tensors, 0.0)
    samples: dict[str, list[np.ndarray]] = {name: [] for name in tensors}
    session = _session_with_outputs(path, tensors, threads)
    for batch in images:
        found = session.run(list(tensors), {"images": batch})
        for name, values in zip(tensors, found, strict=True):
            magnitudes = np.abs(values.ravel())
            largest[name] = float(np.maximum(largest[name], magnitudes.max()))  # keeps a NaN
            # At random: every n-th value may always be of the same channels.
            chosen = generator.integers(len(magnitudes), size=SAMPLED * len(batch))
            samples[name].append(magnitudes[chosen].astype(np.float32))
    if not all(np.isfinite(value) for value in largest.values()):
        raise FloatingPointError(f"{path.name}: an activation holds NaN or infinity")
    best = {name: _best_range(np.concatenate(samples[name]), largest[name]) for name in tensors}
    return {name: (largest[name], best[name]) for name in tensors}


def _session_with_outputs(path: Path, tensors: Sequence[str], threads: int) -> Any:
    """A session whose outputs are inner tensors of the file."""
    runtime, model = import_onnxruntime(), ir.load(path)
    values = ir.convenience.create_value_mapping(model.graph)
    model.graph.outputs[:] = [values[name] for name in tensors]
    options = onnx_session_options(threads)
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    content = ir.to_proto(model).SerializeToString()
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _best_range(magnitudes: np.ndarray, largest: float) -> float:
    """The magnitude at which int8's rounding and clipping errors have the least sum of squares."""

    def error(limit: float) -> float:
        scale = max(limit, SMALLEST_SCALE) / LARGEST["int8"]
        rounded = np.clip(np.rint(magnitudes / scale), 0, LARGEST["int8"]) * scale
        return float(np.square(rounded - magnitudes).sum())

    return float(min((largest * CLIPPING).tolist(), key=error))


# --- writing the quantised file -------------------------------------------------------------------


def quantize_onnx(
    source: Path,
    target: Path,
    kind: str,
    parts: Sequence[str],
    ranges: Mapping[str, Range],
    per_channel: bool = True,
) -> dict[str, float]:
    """Write `source` with pairs at the chosen parts; return what is quantised.

    Args:
        kind: `int8` or `fp8` (e4m3).
        parts: what is quantised, of `linear`, `attention` and `residual`.
        ranges: of `find_activations`, by `calibrate`.
        per_channel: a scale for each output channel of a weight, else one for all.

    Raises:
        UnavailableError: the network has nothing, or next to nothing, to quantise.
    """
    model = ir.load(source)
    for part in parts:
        if not find_sites(model.graph, [part], kind):
            raise UnavailableError(f"nothing to quantise: {kind} could serve no {part} operators")
    sites = find_sites(model.graph, parts, kind)
    counts = count_quantized(model.graph, sites)
    if counts["quantized_work_percent"] < LEAST_WORK:
        raise UnavailableError(
            f"next to nothing to quantise: {counts['quantized_weights']} of {counts['weights']} "
            f"weights, {counts['quantized_work_percent']:.0f} % of the multiply-adds"
        )
    insert_pairs(model.graph, sites, ranges, kind, per_channel)
    save_onnx(model, target)
    return counts


def count_quantized(graph: ir.Graph, sites: Sequence[Site]) -> dict[str, float]:
    """How many weights and activations are quantised, and their share of all multiply-adds."""
    chosen = {site.node for site in sites}
    work = {node: count_work(node) for node in graph if node.op_type in PRODUCTS}
    quantized = sum(work[node] for node in work if node in chosen)
    return {
        "quantized_weights": len({site.value for site in sites if site.axis is not None}),
        "weights": len({node.inputs[1] for node in work if weight_axis(node) is not None}),
        "quantized_activations": len({site.value for site in sites if site.axis is None}),
        "quantized_work_percent": 100 * quantized / max(1, sum(work.values())),
    }


def insert_pairs(
    graph: ir.Graph,
    sites: Sequence[Site],
    ranges: Mapping[str, Range],
    kind: str,
    per_channel: bool,
) -> None:
    """Put a pair on every site, in place; sites that read the same tensor share one."""
    restored: dict[Any, Any] = {}
    for site in sites:
        value = site.value
        if value not in restored:
            if site.axis is None:
                limits = np.array(ranges[value.name][kind == "int8"])
            else:
                weight = np.abs(value.const_value.numpy().astype(np.float32))
                others = tuple(i for i in range(weight.ndim) if i != site.axis)
                limits = weight.max(axis=others if per_channel else None)
            restored[value] = _insert_pair(graph, site, limits, kind)
        site.node.replace_input_with(site.position, restored[value])


def _insert_pair(graph: ir.Graph, site: Site, limits: np.ndarray, kind: str) -> ir.Value:
    """Put QuantizeLinear and DequantizeLinear before a site's node; returns the restored tensor."""
    value = site.value
    scale = np.maximum(limits / LARGEST[kind], SMALLEST_SCALE).astype(value.dtype.numpy())
    zero = np.zeros(scale.shape, TYPES[kind].numpy())
    constants = []
    for name, array in {f"{value.name}_scale": scale, f"{value.name}_zero": zero}.items():
        tensor = ir.tensor(array, name=name)
        constants.append(ir.val(name, const_value=tensor))
        graph.register_initializer(constants[-1])
    axis = {"axis": site.axis} if scale.ndim else {}
    quantized = ir.val(f"{value.name}_quantized", TYPES[kind], value.shape)
    restored = ir.val(f"{value.name}_restored", value.dtype, value.shape)
    for operator, source, target in (
        ("QuantizeLinear", value, quantized),
        ("DequantizeLinear", quantized, restored),
    ):
        name = f"{value.name}_{operator}"
        node = ir.node(operator, [source, *constants], axis, outputs=[target], name=name)
        graph.insert_before(site.node, node)
    return restored
