"""Part 1: quantise a vision model dynamically; compare latency, size, memory and accuracy.

Every candidate turns the same float32 model into something callable and then serves, in a process
of its own, two questions: what are your logits, and how long do k calls take. Speed is measured on
the data set's test images, accuracy on its labelled held-out images, all candidates in one run.

    python utils/download_tiny_imagenet.py          # the data, once
    python part1_quantize.py                        # DINOv2 ViT-S/14 on Tiny-ImageNet
    python part1_quantize.py --quick                # under a minute, offline: a small ViT on digits
    python part1_quantize.py --list                 # the candidates
"""

from utils import cli  # isort: skip  # first: it says in one line if this Python is too old

import argparse
import contextlib
import functools
import io
import itertools
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from utils import benchmark, data, evaluation, onnx_tools, timing
from utils.benchmark import Job, Variant, state_bytes
from utils.onnx_tools import onnx_bytes, onnx_int8_shapes, onnx_session
from utils.training import capture
from utils.workers import Outcome, UnavailableError, Worker, attempt

COLUMNS: tuple[str, ...] = ("model", "dataset", "candidate", "device", "threads", "batch_size")
COLUMNS += ("status", "reason")
COLUMNS += (*timing.LATENCY_COLUMNS, *evaluation.ACCURACY_COLUMNS, "accuracy_batch_size", "size_mb")
COLUMNS += (*benchmark.MEMORY_COLUMNS, "build_seconds", *benchmark.SHARE_COLUMNS)
COLUMNS += ("calibration_images", *benchmark.LOAD_COLUMNS)
SHOWN = {
    "candidate": ("candidate", "s"),
    "batch_size": ("batch", "d"),
    "threads": ("threads", "d"),
    "latency_ms_median": ("ms", ".2f"),
    "speedup": ("speedup", "ratio"),
    "top1_percent": ("top-1", ".2f"),
    "top1_difference_points": ("change", "+.2f"),
    "logit_cosine": ("cosine", ".4f"),
    "quantized_macs_percent": ("8-bit %", ".0f"),
    "size_mb": ("MB", ".1f"),
    "peak_memory_mb": ("peak MB", ".0f"),
}
QUICK = {
    "model": "vit_digits",
    "dataset": "digits",
    "device": "cpu",
    "candidates": ["fp32", "int8-eager", "onnx-int8"],
    "batch_sizes": [16],
    "rounds": 7,
    "block_seconds": 0.1,
}
CALIBRATION_IMAGES = 256  # training images that set the ranges of openvino-int8-static
PROFILED_CALLS = 5
TABLE = "quantization.csv"


# --- the candidates: each takes (module, example batch, job) and returns a Variant ----------------


def build_fp32(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Float32, TF32 off, eager: the baseline."""
    return Variant(module, state_bytes(module))


def build_fp32_compile(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Float32 by torch.compile."""
    return compiled(build_fp32(module, example, job), example)


def build_tf32(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Float32 with TF32 matrix products, eager (GPU)."""
    benchmark.allow_tf32()
    return build_fp32(module, example, job)


def build_tf32_compile(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Float32 with TF32 matrix products, by torch.compile (GPU)."""
    return compiled(build_tf32(module, example, job), example)


def build_bf16(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """bfloat16 weights and activations, eager."""
    module = module.bfloat16()
    return Variant(lambda x: module(x.bfloat16()), state_bytes(module))


def build_bf16_compile(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """bfloat16 by torch.compile."""
    return compiled(build_bf16(module, example, job), example)


def build_int8_eager(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Dynamic int8 by PyTorch's eager-mode quantize_dynamic, weights per channel."""
    from torch.ao.nn.quantized.dynamic import Linear as QuantizedLinear
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    # Before quantising: weights are packed for an engine.
    torch.backends.quantized.engine = pick_engine(torch.backends.quantized.supported_engines)
    layers = linear_layers(module, example)
    make_plain(module, layers)
    quantized = quantize_dynamic(module, dict.fromkeys(layers, per_channel_dynamic_qconfig))
    found = [m for m in quantized.modules() if isinstance(m, QuantizedLinear)]
    shapes = [(m.out_features, m.in_features) for m in found]
    return Variant(quantized, state_bytes(quantized), shapes)


def build_int8_torchao(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Dynamic int8 by torchao's quantize_, per token, compiled."""
    return quantize_torchao(module, example, int8_torchao_config(example), torch.float32)


def build_int8_torchao_bf16(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Dynamic int8 by torchao over a bfloat16 model, compiled."""
    return quantize_torchao(module, example, int8_torchao_config(example), torch.bfloat16)


def build_fp8_torchao_bf16(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Dynamic fp8 by torchao over a bfloat16 model, per row, compiled (GPU)."""
    from torchao import quantization

    benchmark.check_capability("fp8")
    config = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(), set_inductor_config=False
    )
    return quantize_torchao(module, example, config, torch.bfloat16)


def build_int8_pt2e(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Dynamic int8 of linear layers by torchao's PT2E, x86 Inductor quantizer, compiled."""
    return quantize_pt2e(module, example, bf16=False)


def build_int8_pt2e_bf16(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Dynamic int8 by PT2E, everything else in bfloat16 (autocast), compiled."""
    if not torch.cpu._is_avx512_supported():
        reason = "without AVX512 oneDNN falls back to a reference kernel: minutes a call"
        raise UnavailableError(reason)
    return quantize_pt2e(module, example, bf16=True)


def build_onnx_fp32(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """ONNX Runtime, float32."""
    path, seconds = export_once(module, example, job.folder)
    return Variant(onnx_session(path, job.threads), onnx_bytes(path), None, seconds)


def build_onnx_int8(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """ONNX Runtime, dynamic int8 of MatMul and Gemm, per channel."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path, seconds = export_once(module, example, job.folder)
    model = onnx.load(path)
    del model.graph.value_info[:]  # shapes that quantising contradicts, as it turns Gemm to MatMul
    quantized = job.folder / f"int8-{os.getpid()}.onnx"
    quantize_dynamic(
        model,
        quantized,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        reduce_range=needs_7_bits(),
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )
    call = onnx_session(quantized, job.threads)
    return Variant(call, onnx_bytes(quantized), onnx_int8_shapes(quantized), seconds)


def build_openvino_fp32(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """OpenVINO, float32."""
    return run_openvino(module, example, job)


def build_openvino_bf16(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """OpenVINO, bfloat16 where it has kernels for it."""
    return run_openvino(module, example, job, precision="bf16")


def build_openvino_int8(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """OpenVINO, dynamic int8 of linear layers, in groups of 64 channels; weights by NNCF."""

    def compress(model: Any) -> Any:
        import nncf

        convolutions = nncf.IgnoredScope(types=["Convolution", "GroupConvolution"], validate=False)
        mode = nncf.CompressWeightsMode.INT8_ASYM
        return nncf.compress_weights(model, mode=mode, ignored_scope=convolutions)

    return run_openvino(module, example, job, quantize=compress, group_size=64)


def build_openvino_int8_static(
    module: nn.Module,
    example: Tensor,
    job: Job,
    images: np.ndarray,
    preprocessing: data.Preprocessing,
) -> Variant:
    """OpenVINO, static int8 by NNCF, calibrated: what dynamic quantisation leaves on the table."""

    def quantize(model: Any) -> Any:
        import nncf

        batches = torch.from_numpy(images).split(1)
        calibration = nncf.Dataset(batches, lambda x: data.preprocess(x, preprocessing).numpy())
        kind = nncf.ModelType.TRANSFORMER
        return nncf.quantize(model, calibration, model_type=kind, subset_size=len(images))

    variant = run_openvino(module, example, job, quantize=quantize)
    return replace(variant, columns={"calibration_images": len(images)})


# Name: how to build it, and where it runs.
CANDIDATES: dict[str, tuple[Callable[..., Variant], str]] = {
    "fp32": (build_fp32, "cpu cuda"),
    "fp32-compile": (build_fp32_compile, "cpu cuda"),
    "tf32": (build_tf32, "cuda"),
    "tf32-compile": (build_tf32_compile, "cuda"),
    "bf16": (build_bf16, "cpu cuda"),
    "bf16-compile": (build_bf16_compile, "cpu cuda"),
    "int8-eager": (build_int8_eager, "cpu"),
    "int8-torchao": (build_int8_torchao, "cpu cuda"),
    "int8-torchao-bf16": (build_int8_torchao_bf16, "cpu cuda"),
    "int8-pt2e": (build_int8_pt2e, "cpu"),
    "int8-pt2e-bf16": (build_int8_pt2e_bf16, "cpu"),
    "fp8-torchao-bf16": (build_fp8_torchao_bf16, "cuda"),
    "onnx-fp32": (build_onnx_fp32, "cpu"),
    "onnx-int8": (build_onnx_int8, "cpu"),
    "openvino-fp32": (build_openvino_fp32, "cpu"),
    "openvino-bf16": (build_openvino_bf16, "cpu"),
    "openvino-int8": (build_openvino_int8, "cpu"),
    "openvino-int8-static": (build_openvino_int8_static, "cpu"),
}
BASELINE = "fp32"
INT8_ROWS_ON_GPU = 16  # torch._int_mm wants more


# --- how the routes work --------------------------------------------------------------------------


def linear_layers(module: nn.Module, example: Tensor) -> set[str]:
    """Names of the linear layers that run as modules.

    Of others the model takes the weight itself, for a function; a quantised layer has none to take.
    """
    called: set[nn.Module] = set()
    with register_module_forward_hook(lambda layer, *_: called.add(layer)):
        module(example)
    linear = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    return {name for name, layer in linear if layer in called}


def make_plain(module: nn.Module, layers: Iterable[str]) -> None:
    """Put an nn.Linear in the place of each subclass, which eager mode does not quantise."""
    for name in layers:
        layer: Any = module.get_submodule(name)
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight, plain.bias = layer.weight, layer.bias
        module.set_submodule(name, plain)


def pick_engine(supported: Sequence[str]) -> str:
    """PyTorch's engine for quantised layers: of x86, else of ARM."""
    for engine in ("x86", "qnnpack"):
        if engine in supported:
            return engine
    raise UnavailableError("this PyTorch has no engine for quantised layers on this CPU")


def needs_7_bits() -> bool:
    """Whether kernels add pairs of products in 16 bits: on x86 without VNNI.

    There 8-bit activations would overflow.
    """
    x86 = platform.machine() in ("x86_64", "AMD64")
    return x86 and not torch.cpu._is_vnni_supported()


def compiled(variant: Variant, example: Tensor) -> Variant:
    """By torch.compile for one input shape, weights folded into it; a CUDA graph on a GPU.

    mode="reduce-overhead" runs Python around each replay: longer than a small model in 8 bits.
    """
    import torch._inductor.config as inductor

    benchmark.require_compiler(example.device.type)
    inductor.freezing = not example.is_cuda  # as an option of torch.compile it is ignored
    call: Any = torch.compile(variant.call)
    if example.is_cuda:
        call = capture(call, example)
    else:
        call(example)
    return replace(variant, call=call)


def int8_torchao_config(example: Tensor) -> Any:
    """Per-token int8 activations, per-channel int8 weights."""
    from torchao import quantization

    if example.is_cuda and len(example) <= INT8_ROWS_ON_GPU:
        raise UnavailableError(
            f"on a GPU int8 products need more than {INT8_ROWS_ON_GPU} rows, and the classifier "
            f"has one per image: use larger --batch-sizes"
        )
    return quantization.Int8DynamicActivationInt8WeightConfig(
        set_inductor_config=False, reduce_range=not example.is_cuda and needs_7_bits()
    )


def quantize_torchao(
    module: nn.Module, example: Tensor, config: Any, dtype: torch.dtype
) -> Variant:
    """Quantise the linear layers of the module in `dtype`, then compile it."""
    from torchao.quantization import quantize_

    layers = linear_layers(module, example)
    module = module.to(dtype)
    quantize_(module, config, filter_fn=lambda _, name: name in layers)
    weights = [layer.weight for name, layer in module.named_modules() if name in layers]
    shapes = [tuple(weight.shape) for weight in weights if type(weight) is not nn.Parameter]
    eager = Variant(lambda x: module(x.to(dtype)), state_bytes(module), shapes)
    return compiled(eager, example)


def quantize_pt2e(module: nn.Module, example: Tensor, bf16: bool) -> Variant:
    """Convert and compile: one graph per batch size."""
    converted = convert_pt2e(module, example)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return converted(x)

    eager = Variant(call, state_bytes(converted), pt2e_int8_shapes(converted))
    return compiled(eager, example)


def convert_pt2e(module: nn.Module, example: Tensor) -> Any:
    """Export, and put dynamic quantisers before the linear layers, however they are called."""
    from torchao.quantization.pt2e import quantize_pt2e as pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config(
        is_dynamic=True, reduce_range=needs_7_bits()
    )
    quantizer = x86.X86InductorQuantizer().set_function_type_qconfig(F.linear, config)
    with exporting("torch.export"):
        exported = torch.export.export(module, (example,)).module()
    for node in exported.graph.nodes:
        # The quantizer goes by the module that a node comes from: it misses what was called by a
        # function, and fails on a module that is called twice.
        is_linear = node.target is torch.ops.aten.linear.default
        if node.op == "call_function":
            node.meta["source_fn_stack"] = [(node.name, F.linear if is_linear else node.target)]
    keep_apart(exported.graph)
    prepared = pt2e.prepare_pt2e(exported, quantizer)
    prepared(example)
    converted = pt2e.convert_pt2e(prepared)
    # A new module takes only what the graph reads: not the weights that were quantised.
    return torch.fx.GraphModule(converted, converted.graph)


def keep_apart(graph: torch.fx.Graph) -> None:
    """Put a copy between a convolution and its BatchNorm where others use the convolution, too.

    prepare_pt2e folds the two without a look at the others, which would get the normalised output.
    """
    for node in graph.nodes:
        if node.target is torch.ops.aten.batch_norm.default and len(node.args[0].users) > 1:
            with graph.inserting_before(node):
                copy = graph.call_function(torch.ops.aten.clone.default, (node.args[0],))
            copy.meta = {"val": node.args[0].meta["val"]}
            node.replace_input_with(node.args[0], copy)


def pt2e_int8_shapes(converted: Any) -> list[tuple[int, ...]]:
    """Shapes of the int8 weights that a converted graph dequantises."""
    constants = dict(converted.named_buffers()) | dict(converted.named_parameters())
    return [tuple(t.shape) for t in constants.values() if t.dtype == torch.int8 and t.ndim > 1]


@contextlib.contextmanager
def exporting(exporter: str) -> Iterator[None]:
    """A model that an exporter does not take is unavailable, for the error that came first."""
    try:
        yield
    except Exception as error:
        first = error
        while isinstance(cause := first.__cause__ or first.__context__, Exception):
            first = cause
        reason = f"{exporter} does not take this model: {cli.first_line(first)}"
        raise UnavailableError(reason) from error


def export_once(module: nn.Module, example: Tensor, folder: Path) -> tuple[Path, float]:
    """Export to ONNX, once per run; return the file and the seconds it took."""
    path = folder / "model.onnx"
    seconds = path.with_suffix(".seconds")
    if seconds.exists():
        return path, float(seconds.read_text())
    start = time.perf_counter()
    with exporting("torch.onnx.export"), contextlib.redirect_stdout(io.StringIO()):
        onnx_tools.export_onnx(module, example[:1].expand(2, -1, -1, -1), path)
    seconds.write_text(f"{time.perf_counter() - start}")
    return path, 0.0


def run_openvino(
    module: nn.Module,
    example: Tensor,
    job: Job,
    precision: str = "f32",
    quantize: Callable[[Any], Any] | None = None,
    group_size: int = 0,
) -> Variant:
    """Compile for the CPU; nothing is left to OpenVINO's choice, which is bf16 and groups of 32.

    Args:
        precision: of what is not quantised, f32 or bf16.
        quantize: takes a model of OpenVINO's and returns it with weights in 8 bits.
        group_size: channels that share a scale of dynamically quantised activations; 0: none are.
    """
    # Its import alone reports to its makers, unless they find the package for that missing.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    exported, seconds = export_once(module, example, job.folder)
    model, shapes = openvino.Core().read_model(exported), None
    if quantize:
        with contextlib.redirect_stdout(io.StringIO()):  # NNCF's bars
            model = quantize(model)
        shapes = openvino_int8_shapes(model)
    path = job.folder / f"{job.candidate}-{os.getpid()}.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group_size),
        "INFERENCE_NUM_THREADS": job.threads,
        "NUM_STREAMS": 1,
    }
    model.reshape(list(example.shape))
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    return Variant(lambda x: request.infer([x.numpy()])[0], size, shapes, seconds)


def openvino_int8_shapes(model: Any) -> list[tuple[int, ...]]:
    """Shapes of the 8-bit weights, as PyTorch has them: grouped convolutions in four dimensions."""
    constants = [op for op in model.get_ordered_ops() if op.get_type_name() == "Constant"]
    held = [op for op in constants if op.get_element_type().get_type_name() in ("i8", "u8")]
    shapes = [tuple(op.shape) for op in held if math.prod(op.shape) > max(op.shape, default=0)]
    return [s if len(s) < 5 else (s[0] * s[1], *s[2:]) for s in shapes]


# --- the run --------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `--quick` changes the defaults, and explicit flags still win."""
    parser = cli.Parser(__doc__)
    benchmark.add_arguments(parser, Path("results/part1"), [1, 32])
    what = "write torch.profiler's table and a Chrome trace of each candidate"
    parser.add_argument("--profile", action="store_true", help=what)
    parser.set_defaults(model="dinov2_vits14_lc", dataset="tiny-imagenet")
    return cli.parse_quick(parser, argv, QUICK)


def list_candidates() -> None:
    """Print each candidate with its devices and one line on what it is."""
    for name, (build, devices) in CANDIDATES.items():
        print(f"{name:22}{devices:10}{build.__doc__}")


def choose_candidates(wanted: Sequence[str] | None, device: str) -> list[str]:
    """The candidates of this run, the baseline first; UserError for an unknown name."""
    for name in wanted or ():
        cli.check_name(name, CANDIDATES, "candidate")
    here = [name for name, (_, devices) in CANDIDATES.items() if device in devices.split()]
    return list(dict.fromkeys([BASELINE, *(wanted or here)]))


def make_job(run: benchmark.Run, name: str) -> Job:
    """The job of one candidate, with the reason if it cannot start."""
    build, devices = CANDIDATES[name]
    missing = None
    if run.device not in devices.split():
        missing = Outcome("unavailable", f"it does not run on {run.device}")
    elif build is build_openvino_int8_static:
        images = attempt(benchmark.load_calibration, run, CALIBRATION_IMAGES)
        missing = None if images.ok else images
        how = run.model.preprocessing
        build = functools.partial(build, images=images.value, preprocessing=how)
    return Job(candidate=name, build=build, source=run.source, device=run.device, missing=missing)


def part2_network(**architecture: Any) -> nn.Module:
    """Part 2's network, for its checkpoints."""
    import part2_tune

    return part2_tune.SmallCNN(**architecture)


def profile_candidates(
    run: benchmark.Run, jobs: Sequence[Job], rows: Sequence[dict[str, Any]]
) -> None:
    """Write torch.profiler's table and a Chrome trace of each row that is ok."""
    images = run.speed.images.numpy()
    for job, row in zip(itertools.cycle(jobs), rows, strict=False):
        if row["status"] != "ok":
            continue
        threads, batch = row["threads"], row["batch_size"]
        path = run.folder / f"profile-{job.candidate}-batch{batch}-threads{threads}.json"
        with Worker() as worker, tempfile.TemporaryDirectory() as folder:
            alone = replace(job, threads=threads, batch_size=batch, folder=Path(folder))
            outcome = attempt(worker.run, profile_calls, alone, images[:batch], path)
        print(path if outcome.ok else f"note: no profile of {job.candidate}: {outcome.reason}")


def profile_calls(job: Job, images: np.ndarray, path: Path) -> None:
    """In a worker: profile PROFILED_CALLS calls; the trace goes to `path`, the table beside it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it complains where there is no GPU
    benchmark.serve(job)
    benchmark.load_inputs(images)
    benchmark.time_calls(PROFILED_CALLS)
    with torch.profiler.profile(record_shapes=True) as profiler:
        benchmark.time_calls(PROFILED_CALLS)
    profiler.export_chrome_trace(str(path))
    table = profiler.key_averages().table(sort_by=f"self_{job.device}_time_total", row_limit=40)
    path.with_suffix(".txt").write_text(table)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Run every candidate at every batch size and thread count; write the CSV after each."""
    args = parse_args(argv)
    if args.list:
        list_candidates()
        return 0
    device = cli.pick_device(args.device).type
    names = choose_candidates(args.candidates, device)
    with benchmark.open_run(args, part2_network) as run:
        jobs = [make_job(run, name) for name in names]
        rows = benchmark.measure(run, jobs, TABLE, COLUMNS)
        if args.profile:
            profile_candidates(run, jobs, rows)
        return benchmark.finish(run, TABLE, rows, SHOWN)


if __name__ == "__main__":
    sys.exit(main())
