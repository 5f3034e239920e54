"""Where the time of a call on a CPU goes: milliseconds by group of operators.

PyTorch's profiler and ONNX Runtime's own both give the time that each operator took on the calling
thread, which waits for the others. What they cannot take apart stays together: an int8 linear layer
of eager mode or ONNX Runtime quantises its input itself, oneDNN's bfloat16 layers apply the GELU
that follows, a normalisation copies a strided input first, and a kernel that Inductor fused does
all that its name says. Time outside of all known operators, the interpreter's and the profiler's
included, is `other`; so the groups add up to the call.
"""

import functools
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils import timing
from utils.benchmark import Job, build_variant, prepare_process, split_inputs
from utils.isolation import Worker, recorded
from utils.onnx_tools import onnx_session_options

BREAKDOWN_COLUMNS = (
    *("model", "candidate", "threads", "batch_size", "status", "reason"),
    *("group", "ms", "share_percent", "profiled_ms", "latency_ms"),
)
ROUNDS = 5  # of calls without and calls with the profiler
ROUND_SECONDS = 1.0
MOST_CALLS = 100  # a call of a large model is thousands of events
CALL = "call"  # the name under which calls stand in PyTorch's profile

COPIES = "elementwise and copies"  # residuals, layer scales, changes of layout and type, pooling
TORCH_OPERATORS = {
    "linear": "aten::linear aten::addmm aten::mm aten::_int_mm quantized::linear_dynamic "
    "mkl::_mkl_linear mkldnn::_linear_pointwise onednn::qlinear_pointwise",
    # Outside of a linear layer, the factors of a matrix product are both activations.
    "attention": "aten::scaled_dot_product_attention aten::matmul aten::bmm aten::softmax "
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "convolution": "aten::conv2d aten::convolution aten::mkldnn_convolution "
    "mkldnn::_convolution_pointwise",
    "normalization": "aten::layer_norm aten::batch_norm aten::group_norm",
    "activation": "aten::gelu aten::relu aten::relu_ aten::silu aten::silu_ aten::sigmoid",
    "quantization": "aten::quantize_per_tensor aten::quantize_per_tensor_dynamic aten::dequantize",
    COPIES: "aten::add aten::add_ aten::mul aten::mul_ aten::copy_ aten::clone aten::contiguous "
    "aten::reshape aten::flatten aten::to aten::cat aten::mean",
}
ONNX_OPERATORS = {
    "linear": "Gemm FusedGemm MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul",
    "attention": "Softmax Attention MultiHeadAttention",
    "convolution": "Conv FusedConv ConvInteger ReorderInput ReorderOutput",
    "normalization": "LayerNormalization SkipLayerNormalization BatchNormalization",
    "activation": "Gelu BiasGelu FastGelu QuickGelu Relu Sigmoid Erf",
    "quantization": "DynamicQuantizeLinear QuantizeLinear DequantizeLinear",
    COPIES: "Add Sub Mul Div Transpose Reshape Slice Split Squeeze Unsqueeze Concat Gather Shape "
    "Expand Cast ReduceMean",
}
GROUPS = (*TORCH_OPERATORS, "fused", "fused with quantization", "other")
TORCH_GROUP = {name: group for group, names in TORCH_OPERATORS.items() for name in names.split()}
ONNX_GROUP = {name: group for group, names in ONNX_OPERATORS.items() for name in names.split()}

Profile = Callable[[Sequence[Tensor], int], tuple[timing.Block, Mapping[str, float]]]


def torch_group(names: Iterable[str]) -> str:
    """Group of an operator of PyTorch, given as names from the outermost caller to itself.

    The outermost known one decides: the copy of a bias within a linear layer is linear.
    """
    for name in names:
        if "_cpp_fused_" in name:  # PT2E's operators, or torchao's arithmetic for the same
            quantizes = "quantize_" in name or "_clamp_div_" in name
            return "fused with quantization" if quantizes else "fused"
        if name in TORCH_GROUP:
            return TORCH_GROUP[name]
    return "other"


def onnx_group(operator: str, ranks: Sequence[int]) -> str:
    """Group of a node of ONNX Runtime, by its type and the dimensions of its inputs.

    A product of two activations has two inputs of more than two dimensions. A linear layer's weight
    has two, or is missing from the profile because it was repacked; its bias has one.
    """
    if operator in ("MatMul", "FusedMatMul"):
        return "attention" if len(ranks) == 2 and min(ranks) > 2 else "linear"
    if operator == "Add" and 1 in ranks:
        return "linear"
    return ONNX_GROUP.get(operator, "other")


def profile_torch(
    call: Callable[[Tensor], Any], inputs: Sequence[Tensor], calls: int
) -> tuple[timing.Block, Counter[str]]:
    """Profile calls of PyTorch; return their block and the microseconds of each group, summed."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it complains where there is no GPU

    def marked_call(x: Tensor) -> Any:
        with torch.profiler.record_function(CALL):
            return call(x)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        block = timing.time_block(marked_call, inputs, calls)
    microseconds: Counter[str] = Counter()
    for event in profiler.events() or ():
        names, caller = [event.name], event.cpu_parent
        while caller is not None:
            names.append(caller.name)
            caller = caller.cpu_parent
        if names[-1] == CALL:  # not the check of the output that follows
            microseconds[torch_group(reversed(names))] += event.self_cpu_time_total
    return block, microseconds


def profile_onnx(
    path: Path, job: Job, inputs: Sequence[Tensor], calls: int
) -> tuple[timing.Block, Counter[str]]:
    """Like `profile_torch`, in a session of its own: only a new one can be told to profile."""
    import onnxruntime

    options = onnx_session_options(job.threads)
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(job.folder) / "profile")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def call(x: Tensor) -> Any:
        return session.run(None, {"images": x.numpy()})[0]

    timing.warm_up(functools.partial(timing.time_block, call, inputs))
    block = timing.time_block(call, inputs, calls)
    events = json.loads(Path(session.end_profiling()).read_text())
    start = sorted(event["ts"] for event in events if event["name"] == "model_run")[-calls]
    microseconds: Counter[str] = Counter()
    for event in events:
        if event["name"].endswith("_kernel_time") and event["ts"] >= start:
            ranks = [len(*shape.values()) for shape in event["args"]["input_type_shape"]]
            microseconds[onnx_group(event["args"]["op_name"], ranks)] += event["dur"]
    return block, microseconds


def measure_breakdown(job: Job, images: np.ndarray) -> list[dict[str, Any]]:
    """In a fresh process: build the candidate, profile it, return a row per group that occurs.

    `latency_ms` is the mean call without profiler, `profiled_ms` that with it, each in its median
    round; the groups are those of the latter.
    """
    import torch._inductor.config as inductor

    inductor.cpp.enable_kernel_profile = True  # fused kernels report to the profiler
    prepare_process(job)
    model = job.load(job.model, job.untrained)
    variant, _ = build_variant(model, job)
    inputs = split_inputs(images, model.preprocessing, job)
    time_calls = functools.partial(timing.time_block, variant.call, inputs)
    calls = timing.calls_per_block(timing.warm_up(time_calls), ROUND_SECONDS, MOST_CALLS)
    profile: Profile = functools.partial(profile_torch, variant.call)
    if variant.onnx_path is not None:
        profile = functools.partial(profile_onnx, variant.onnx_path, job)
    profile(inputs, 1)  # its own start takes time
    latencies, profiles = [], []
    for _ in range(ROUNDS):
        latencies.append(float(np.mean(time_calls(calls).latencies_ms)))
        block, microseconds = profile(inputs, calls)
        profiles.append((float(np.sum(block.latencies_ms)), microseconds))
    total_ms, microseconds = sorted(profiles, key=lambda one: one[0])[ROUNDS // 2]
    return group_rows(microseconds, total_ms, calls, float(np.median(latencies)))


def group_rows(
    microseconds: Mapping[str, float], total_ms: float, calls: int, latency_ms: float
) -> list[dict[str, Any]]:
    """Rows per call from sums over `calls` calls that took `total_ms`; `other` takes the rest."""
    known = {group: us / 1e3 for group, us in microseconds.items() if group != "other"}
    sums = known | {"other": total_ms - sum(known.values())}
    call = {"profiled_ms": total_ms / calls, "latency_ms": latency_ms}
    return [
        {"group": group, "ms": sums[group] / calls, "share_percent": 100 * sums[group] / total_ms}
        | call
        for group in GROUPS
        if sums.get(group)
    ]


def break_down(
    rows: Sequence[Mapping[str, Any]], jobs: Sequence[Job], images: Tensor
) -> list[dict[str, Any]]:
    """BREAKDOWN_COLUMNS of each measured candidate, one row with the reason where it has none.

    Args:
        rows: what timing said of the candidates, in the order of `jobs`.
        images: uint8 `[K * B, 3, H, W]`, the K batches that take turns.
    """
    found: list[dict[str, Any]] = []
    for row, job in zip(tqdm(rows, desc="breakdown", disable=None, leave=False), jobs, strict=True):
        names = ("model", "candidate", "threads", "batch_size", "status")
        setting: dict[str, Any] = {name: row[name] for name in names}
        groups: list[dict[str, Any]] = [{}]
        if row["status"] != "ok":
            setting["reason"] = row["reason"]
        else:
            with recorded(setting), Worker() as worker, tempfile.TemporaryDirectory() as folder:
                inside = replace(job, folder=folder)
                groups = worker.run(measure_breakdown, inside, images.numpy())
        found += [setting | group for group in groups]
    return found
