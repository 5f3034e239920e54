"""ONNX files: writing and checking them, sessions on CPU and GPU, explicit 8-bit quantisation.

A QuantizeLinear/DequantizeLinear pair in front of a product tells TensorRT to fuse it and to
compute the product in 8 bits; the rest of the file keeps its own precision. Weights keep their
floats, with a pair each: TensorRT folds them when it builds. Scales are symmetric, as it demands.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from utils.workers import UnavailableError

EXTERNAL_DATA_BYTES = 1_800_000_000  # larger weights lie in a file beside: a protobuf ends at 2 GB
ANY_SIZE = 1 << 40  # of a constant that is folded

LARGEST = {"int8": 127.0, "fp8": 448.0}  # of the 8-bit type
TYPES = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
FEWEST_CHANNELS = 16  # a narrower product does not fill an 8-bit matrix instruction
LEAST_WORK = 10.0  # percent of the multiply-adds: with fewer in 8 bits a network is not quantised
CLIPPING = np.linspace(0.3, 1.0, 36)  # of the largest magnitude seen: candidates for an int8 range
SAMPLED = 2000  # random values of a tensor kept from each calibration image
SMALLEST_SCALE = 2.0**-20  # float16 still holds it, to 6 %: a channel of zeros needs some scale
PRODUCTS = ("Conv", "Gemm", "MatMul")


# --- files ----------------------------------------------------------------------------------------


def plain_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """scaled_dot_product_attention in ONNX as Transpose, MatMul, Softmax, MatMul.

    TensorRT fuses this. The exporter's own translation moves the key's axes by a Reshape to a shape
    that is computed, which costs time in fp16 and, in TensorRT 10.6, every 8-bit engine.
    """
    from onnxscript import opset20 as op

    if is_causal or enable_gqa:
        raise NotImplementedError("causal or grouped-query attention has no export here")
    *batch, rows, columns = range(len(key.shape))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scaled = op.Mul(query, op.CastLike(op.Constant(value_float=factor), query))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[*batch, columns, rows]))
    if attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL:
        least = op.CastLike(op.Constant(value_float=-math.inf), query)
        scores = op.Where(attn_mask, scores, least)
    elif attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def export_onnx(
    module: nn.Module,
    example: Tensor,
    path: Path,
    opset: int = 20,  # LayerNormalization and Gelu are single operators from it on
    translations: Mapping[Any, Callable[..., Any]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Export images `[B, 3, H, W]` -> logits `[B, C]`, for any B, with the constants folded.

    The same module gives the same bytes wherever it is exported: what the exporter notes about
    source files is dropped.

    Args:
        example: of two images.
        translations: of operators of PyTorch, beside that of attention.
        metadata: kept in the file's `metadata_props`.
    """
    import onnxscript.optimizer
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    attention: Any = torch.ops.aten.scaled_dot_product_attention.default
    program: Any = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        opset_version=opset,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        custom_translation_table={attention: plain_attention, **(translations or {})},
        verbose=False,
    )
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
    """An ONNX file and those beside it that hold its weights."""
    weights = [value.const_value for value in ir.load(path).graph.initializers.values()]
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


def check_onnx(path: Path, size: int, outputs: int) -> dict[str, Any]:
    """Run ONNX's checker and its strict shape inference; say what the file holds.

    Raises:
        ValueError: not float32 `[N, 3, size, size]` in and `[N, outputs]` out, for any N; a symbol
            stands for any number.
        Exception: what the checker found.
    """
    import onnx

    onnx.checker.check_model(str(path), full_check=True)  # by path: also above 2 GB
    model = ir.load(path)
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    values = [*inputs, *model.graph.outputs]

    def fits(value: ir.Value, wanted: Sequence[int | None]) -> bool:
        shape = tuple(value.shape or ())
        agree = len(shape) == len(wanted) and all(
            axis == w for axis, w in zip(shape, wanted, strict=True) if isinstance(axis, int)
        )
        return agree and value.dtype == ir.DataType.FLOAT

    wanted = [(None, 3, size, size), (None, outputs)]
    if len(values) != 2 or not all(map(fits, values, wanted)):
        found = " and ".join(f"{value.name} {value.dtype} {value.shape}" for value in values)
        raise ValueError(
            f"{found}: expected float32 [N, 3, {size}, {size}] in, [N, {outputs}] out, for any N"
        )
    opset = model.opset_imports.get("") or model.opset_imports["ai.onnx"]  # one domain
    return {"onnx_opset": opset, "nodes": len(model.graph), "size_mb": onnx_bytes(path) / 1e6}


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


def open_session(model: Path | bytes, folder: Path, threads: int, level: str) -> Any:
    """A session on the CPU, whose threads spin within a call and sleep between calls.

    Args:
        folder: of the weights that are not in `model` itself.
        level: of ONNX Runtime's GraphOptimizationLevel.
    """
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, level)
    options.add_session_config_entry("session.force_spinning_stop", "1")
    external = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(external, str(folder))
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnx_session(path: Path, threads: int, optimize: bool = True) -> Callable[[Tensor], Any]:
    """Run an ONNX file on the CPU.

    Args:
        optimize: False runs the operators as they are written, which is what a check wants: fused
            8-bit kernels differ between versions and CPUs, and some do not load fp8 files.
    """
    level = "ORT_ENABLE_ALL" if optimize else "ORT_DISABLE_ALL"
    session = open_session(path, path.parent, threads, level)
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


def find_products(graph: ir.Graph, kind: str) -> list[ir.Node]:
    """The products to compute in 8 bits, in the file's order: both inputs of each get a pair.

    Those with a weight, but for those that make the logits and for narrow ones (a grouped
    convolution is narrow); in int8 also attention's own, of two activations, which in fp8 TensorRT
    10.6 does not fuse. Convolutions stay as they are in fp8, which few of TensorRT's know, and
    where they do less than the linear layers: 10.6 fails on the quantised patch embedding of a ViT.
    """
    weighted = [node for node in graph if weight_axis(node) is not None]
    work = [count_work(node) * (-1 if node.op_type == "Conv" else 1) for node in weighted]
    linear_only = kind == "fp8" or sum(work) > 0
    wide = {node for node in weighted if min(node.inputs[1].shape[:2]) >= FEWEST_CHANNELS}
    convolutions = {node for node in weighted if linear_only and node.op_type == "Conv"}
    chosen = wide - convolutions - find_classifiers(graph)
    return [node for node in graph if node in chosen or (kind == "int8" and is_attention(node))]


def is_attention(node: ir.Node) -> bool:
    """Whether it is a product of two activations."""
    return node.op_type == "MatMul" and all(value.const_value is None for value in node.inputs)


def find_activations(products: Iterable[ir.Node]) -> list[ir.Value]:
    """The computed tensors among the inputs of products, each once."""
    values = dict.fromkeys(value for node in products for value in node.inputs[:2])
    return [value for value in values if value.const_value is None]


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
    """The products that no other product follows: they make the logits."""
    products = {node for node in graph if node.op_type in PRODUCTS}
    followed: set[ir.Node] = set()
    waiting = list(products)
    while waiting:
        new = set(waiting.pop().predecessors()) - followed
        followed |= new
        waiting += new
    return products - followed


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
    if not tensors:  # ONNX Runtime wants an output
        return {}
    generator = np.random.default_rng(0)
    largest = dict.fromkeys(tensors, 0.0)
    samples: dict[str, list[np.ndarray]] = {name: [] for name in tensors}
    model = ir.load(path)
    values = ir.convenience.create_value_mapping(model.graph)
    model.graph.outputs[:] = [values[name] for name in tensors]
    content = ir.to_proto(model).SerializeToString()
    session = open_session(content, path.parent, threads, "ORT_ENABLE_BASIC")
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
    return {
        name: (limit, _best_range(np.concatenate(samples[name]), limit))
        for name, limit in largest.items()
    }


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
    ranges: Mapping[str, Range],
    per_channel: bool = True,
) -> dict[str, float]:
    """Write `source` with pairs before the products of `find_products`; return what is quantised.

    Args:
        kind: `int8` or `fp8` (e4m3).
        ranges: of `find_activations`, by `calibrate`.
        per_channel: a scale for each output channel of a weight, else one for all.

    Raises:
        UnavailableError: the network has nothing, or next to nothing, to quantise.
    """
    model = ir.load(source)
    products = find_products(model.graph, kind)
    counts = count_quantized(model.graph, products)
    if counts["quantized_work_percent"] < LEAST_WORK:
        raise UnavailableError(
            f"next to nothing to quantise: {counts['quantized_weights']} of {counts['weights']} "
            f"weights, {counts['quantized_work_percent']:.0f} % of the multiply-adds"
        )
    restored: dict[ir.Value, ir.Value] = {}  # products that read the same tensor share a pair
    for node in products:
        for position, value in enumerate(node.inputs[:2]):
            if value not in restored:
                restored[value] = insert_pair(node, value, kind, ranges, per_channel)
            node.replace_input_with(position, restored[value])
    save_onnx(model, target)
    return counts


def count_quantized(graph: ir.Graph, products: Sequence[ir.Node]) -> dict[str, float]:
    """How many weights and activations are quantised, and their share of all multiply-adds."""
    work = {node: count_work(node) for node in graph if node.op_type in PRODUCTS}
    quantized = sum(work[node] for node in products)
    weights = {node.inputs[1] for node in work if weight_axis(node) is not None}
    return {
        "quantized_weights": len(weights.intersection(node.inputs[1] for node in products)),
        "weights": len(weights),
        "quantized_activations": len(find_activations(products)),
        "quantized_work_percent": 100 * quantized / max(1, sum(work.values())),
    }


def insert_pair(
    node: ir.Node, value: ir.Value, kind: str, ranges: Mapping[str, Range], per_channel: bool
) -> ir.Value:
    """Put QuantizeLinear and DequantizeLinear between a tensor and a node; the restored tensor."""
    if value.const_value is None:
        largest, best = ranges[value.name]
        limits = np.array(best if kind == "int8" else largest)
    else:
        weight = np.abs(value.const_value.numpy().astype(np.float32))
        others = tuple(i for i in range(weight.ndim) if i != weight_axis(node))
        limits = weight.max(axis=others if per_channel else None)
    scale = np.maximum(limits / LARGEST[kind], SMALLEST_SCALE).astype(value.dtype.numpy())
    zero = np.zeros(scale.shape, TYPES[kind].numpy())
    constants = []
    for name, array in {f"{value.name}_scale": scale, f"{value.name}_zero": zero}.items():
        constants.append(ir.val(name, const_value=ir.tensor(array, name=name)))
        node.graph.register_initializer(constants[-1])
    axis = {"axis": weight_axis(node)} if scale.ndim else {}
    quantized = ir.val(f"{value.name}_quantized", TYPES[kind], value.shape)
    restored = ir.val(f"{value.name}_restored", value.dtype, value.shape)
    steps = {"QuantizeLinear": (value, quantized), "DequantizeLinear": (quantized, restored)}
    for operator, (source, target) in steps.items():
        name = f"{value.name}_{operator}"
        step = ir.node(operator, [source, *constants], axis, outputs=[target], name=name)
        node.graph.insert_before(node, step)
    return restored
