"""Part 1: quantise a vision model dynamically; compare latency, size, memory and accuracy.

Every candidate turns the same float32 model into something callable and then serves, in a process
of its own, two questions: what are your logits, and how long do k calls take. Speed is measured on
the data set's test images, accuracy on its labelled held-out images, all candidates in one run.

    python utils/download_tiny_imagenet.py          # the data, once
    python part1_quantize.py                        # DINOv2 ViT-S/14 on Tiny-ImageNet
    python part1_quantize.py --quick                # under a minute, offline: a small ViT on digits
    python part1_quantize.py --list                 # the candidates
"""

import argparse
import functools
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils import cli, data, evaluation, results, timing
from utils.benchmark import (
    Build,
    Job,
    Variant,
    add_memory,
    allow_tf32,
    check_capability,
    load_image_sets,
    measure_setting,
    note_load,
    require_compiler,
)
from utils.breakdown import BREAKDOWN_COLUMNS, break_down
from utils.cost import state_bytes
from utils.isolation import UnavailableError
from utils.models import load_model, scored_logits
from utils.onnx_tools import export_onnx, onnx_bytes, onnx_int8_shapes, onnx_session

COLUMNS = (
    *("model", "dataset", "candidate", "device", "threads", "batch_size", "status", "reason"),
    *timing.LATENCY_COLUMNS,
    *evaluation.ACCURACY_COLUMNS,
    *("accuracy_batch_size", "size_mb", "peak_memory_mb", "build_peak_memory_mb", "build_seconds"),
    *("quantized_layers", "linear_layers"),
    *("quantized_parameters_percent", "quantized_macs_percent"),
    *("load_average_before", "load_average_after"),
)
SHOWN = {
    "candidate": "s",
    "batch_size": "d",
    "threads": "d",
    "latency_ms_median": ".2f",
    "speedup": ".2f",
    "top1_percent": ".2f",
    "top1_difference_points": "+.2f",
    "logit_cosine": ".4f",
    "size_mb": ".1f",
    "peak_memory_mb": ".0f",
    "status": "s",
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


# --- the candidates: each takes (module, example batch, job) and returns a Variant ----------------


def build_fp32(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Float32, TF32 off, eager: the baseline."""
    return Variant(module, state_bytes(module), [])


def build_fp32_compile(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Float32 by torch.compile."""
    return Variant(compile_frozen(module, example), state_bytes(module), [])


def build_tf32(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Float32 with TF32 matrix products, eager (GPU)."""
    allow_tf32()
    return build_fp32(module, example, job)


def build_tf32_compile(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Float32 with TF32 matrix products, by torch.compile (GPU)."""
    allow_tf32()
    return build_fp32_compile(module, example, job)


def build_bf16(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """bfloat16 weights and activations, eager."""
    module = module.bfloat16()
    return Variant(lambda x: module(x.bfloat16()), state_bytes(module), [])


def build_bf16_compile(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """bfloat16 by torch.compile."""
    module = module.bfloat16()
    call = compile_frozen(lambda x: module(x.bfloat16()), example)
    return Variant(call, state_bytes(module), [])


def build_int8_eager(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Dynamic int8 by PyTorch's eager-mode quantize_dynamic, per tensor."""
    try:
        from torch.ao.nn.quantized.dynamic import Linear as QuantizedLinear
        from torch.ao.quantization import quantize_dynamic
    except ImportError as error:
        raise UnavailableError(f"removed from this PyTorch: {error}") from error
    if "x86" not in torch.backends.quantized.supported_engines:
        raise UnavailableError("this PyTorch has no x86 quantised engine")
    torch.backends.quantized.engine = "x86"  # before quantising: weights are packed for an engine
    quantized = quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)
    layers = [m for m in quantized.modules() if isinstance(m, QuantizedLinear)]
    shapes = [(m.out_features, m.in_features) for m in layers]
    return Variant(quantized, state_bytes(quantized), shapes)


def build_int8_torchao(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Dynamic int8 by torchao's quantize_, per token, compiled."""
    return quantize_torchao(module, example, int8_torchao_config(example), torch.float32)


def build_int8_torchao_bf16(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Dynamic int8 by torchao over a bfloat16 model, compiled."""
    return quantize_torchao(module, example, int8_torchao_config(example), torch.bfloat16)


def build_fp8_torchao_bf16(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Dynamic fp8 by torchao over a bfloat16 model, per row, compiled (GPU)."""
    check_capability("fp8")
    quantization = import_torchao()
    config = quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow(), set_inductor_config=False
    )
    return quantize_torchao(module, example, config, torch.bfloat16)


def build_int8_pt2e(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Dynamic int8 by torchao's PT2E with the x86 Inductor quantizer, compiled."""
    return quantize_pt2e(module, example, bf16=False)


def build_int8_pt2e_bf16(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """Dynamic int8 by PT2E, everything else in bfloat16 (autocast), compiled."""
    if not torch.cpu._is_avx512_supported():
        raise UnavailableError(
            "without AVX512 oneDNN falls back to a reference kernel: minutes a call"
        )
    return quantize_pt2e(module, example, bf16=True)


def build_onnx_fp32(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """ONNX Runtime, float32."""
    path, seconds = export_onnx(module, example, Path(job.folder))
    call = onnx_session(path, job.threads)
    return Variant(call, onnx_bytes(path), [], seconds, onnx_path=path)


def build_onnx_int8(module: nn.Module, example: Tensor, job: Job) -> Variant:
    """ONNX Runtime, dynamic int8 of MatMul and Gemm, per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path, seconds = export_onnx(module, example, Path(job.folder))
    prepared, quantized = (path.with_stem(f"{stem}-{os.getpid()}") for stem in ("pre", "int8"))
    quant_pre_process(path, prepared)  # without it shape inference fails on the exporter's graph
    quantize_dynamic(
        prepared,
        quantized,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        reduce_range=not torch.cpu._is_vnni_supported(),
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )
    shapes = onnx_int8_shapes(quantized)
    call = onnx_session(quantized, job.threads)
    return Variant(call, onnx_bytes(quantized), shapes, seconds, onnx_path=quantized)


CANDIDATES: dict[str, tuple[Build, str]] = {  # name: how to build it, and where it runs
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
}
BASELINE = "fp32"
INT8_ROWS_ON_GPU = 16  # torch._int_mm wants more


# --- how the routes work --------------------------------------------------------------------------


def compile_frozen(call: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Any]:
    """torch.compile for one input shape, weights folded into the graph; CUDA graphs on a GPU."""
    import torch._inductor.config as inductor

    on_gpu = example.is_cuda
    require_compiler(example.device.type)
    inductor.freezing = not on_gpu  # as an option of torch.compile it is ignored
    compiled = torch.compile(call, mode="reduce-overhead" if on_gpu else None)
    compiled(example)
    return compiled


def import_torchao() -> Any:
    """torchao.quantization, or UnavailableError."""
    try:
        import torchao.quantization
    except ImportError as error:
        raise UnavailableError(f"torchao is not installed: {error}") from error
    return torchao.quantization


def int8_torchao_config(example: Tensor) -> Any:
    """Per-token int8 activations, per-channel int8 weights.

    Without VNNI the AVX2 kernel adds pairs of products in 16 bits, which overflow unless the
    activations keep to 7 bits.
    """
    if example.is_cuda and len(example) <= INT8_ROWS_ON_GPU:
        raise UnavailableError(
            f"on a GPU int8 products need more than {INT8_ROWS_ON_GPU} rows, and the classifier "
            f"has one per image: use larger --batch-sizes"
        )
    return import_torchao().Int8DynamicActivationInt8WeightConfig(
        set_inductor_config=False,
        reduce_range=not example.is_cuda and not torch.cpu._is_vnni_supported(),
    )


def quantize_torchao(
    module: nn.Module, example: Tensor, config: Any, dtype: torch.dtype
) -> Variant:
    """Quantise all linear layers of the module in `dtype`, then compile it."""
    module = module.to(dtype)
    plain = {name: type(p) for name, p in module.named_parameters()}
    import_torchao().quantize_(module, config)
    shapes = [
        (int(p.shape[0]), int(p.shape[1]))
        for name, p in module.named_parameters()
        if type(p) is not plain[name] and p.ndim == 2
    ]
    call = compile_frozen(lambda x: module(x.to(dtype)), example)
    return Variant(call, state_bytes(module), shapes)


def quantize_pt2e(module: nn.Module, example: Tensor, bf16: bool) -> Variant:
    """Export, insert dynamic quantisers, convert, compile: one graph per batch size."""
    import_torchao()
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(
        x86.get_default_x86_inductor_quantization_config(
            is_dynamic=True, reduce_range=not torch.cpu._is_vnni_supported()
        )
    )
    prepared = prepare_pt2e(torch.export.export(module, (example,)).module(), quantizer)
    prepared(example)
    converted = convert_pt2e(prepared)
    shapes = pt2e_int8_shapes(converted)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return converted(x)

    return Variant(compile_frozen(call, example), state_bytes(converted), shapes)


def pt2e_int8_shapes(graph: Any) -> list[tuple[int, int]]:
    """Shapes of the int8 weight matrices that a converted graph dequantises."""
    constants = dict(graph.named_buffers()) | dict(graph.named_parameters())
    int8 = [t for t in constants.values() if t.dtype == torch.int8 and t.ndim == 2]
    return [(int(t.shape[0]), int(t.shape[1])) for t in int8]


# --- the run --------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `--quick` changes the defaults, and explicit flags still win."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--model", default="dinov2_vits14_lc", help="model to quantise; see utils/models.py")
    add("--untrained", action="store_true", help="random weights: latency only, no accuracy")
    add("--dataset", default="tiny-imagenet", help=f"one of {', '.join(data.DATASETS)}")
    add("--data-dir", type=Path, help="folder of the data set; data/<dataset> if not given")
    add("--num-images", type=cli.positive_int, help="labelled images scored; all if not given")
    add("--candidates", type=cli.name_list, help="comma-separated; all if not given")
    add("--list", action="store_true", help="list the candidates and exit")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    add("--batch-sizes", type=cli.int_list, default=[1, 32], help="images a call, comma-separated")
    add(
        "--threads",
        type=cli.int_list,
        default=[torch.get_num_threads()],
        help="CPU threads, comma-separated",
    )
    add("--rounds", type=cli.positive_int, default=15, help="interleaved rounds of timing")
    add(
        "--block-seconds",
        type=cli.positive_float,
        default=0.5,
        help="length of the baseline's block in each round, in seconds; at most 1000 calls",
    )
    add(
        "--max-slowdown",
        type=cli.positive_float,
        default=4.0,
        help="a candidate this many times slower than fp32 is timed, not scored",
    )
    add(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure peak memory in a further process per candidate",
    )
    add(
        "--breakdown",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="profile each candidate in a further process: ms a call by group of operators (CPU)",
    )
    add("--seed", type=cli.seed, default=0, help="seed of subsets, weights and the order of turns")
    add("--output-dir", type=Path, default=Path("results/part1"), help="folder for the CSV")
    return cli.parse_quick(parser, argv, QUICK)


def list_candidates() -> None:
    """Print each candidate with its devices and one line on what it is."""
    for name, (build, devices) in CANDIDATES.items():
        print(f"{name:20}{devices:10}{build.__doc__}")


def choose_candidates(wanted: Sequence[str] | None, device: str) -> list[str]:
    """The candidates of this run, the baseline first; UserError for an unknown name."""
    for name in wanted or ():
        cli.check_name(name, CANDIDATES, "candidate")
    here = [name for name in CANDIDATES if runs_on(name, device)]
    return list(dict.fromkeys([BASELINE, *(wanted or here)]))


def runs_on(name: str, device: str) -> bool:
    return device in CANDIDATES[name][1].split()


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Run every candidate at every batch size and thread count; write the CSV after each."""
    args = parse_args(argv)
    if args.list:
        list_candidates()
        return 0
    device = cli.pick_device(args.device).type
    cli.check_threads(args.threads)
    if args.breakdown and device == "cuda":
        raise cli.UserError("--breakdown profiles a CPU: add --device cpu")
    names = choose_candidates(args.candidates, device)
    foreign = {"status": "unavailable", "reason": f"it does not run on {device}"}
    missing = {name: foreign for name in names if not runs_on(name, device)}
    cli.check_name(args.dataset, data.DATASETS, "data set")
    model = load_model(args.model, args.untrained)
    load = functools.partial(
        data.load_images,
        args.dataset,
        data_dir=args.data_dir,
        image_size=model.preprocessing.input_size,
    )
    batch_sizes = sorted(args.batch_sizes, reverse=True)  # accuracy is measured at the largest
    labelled, speed = load_image_sets(
        load, args.dataset, args.num_images, batch_sizes[0], args.seed
    )
    class_logits = scored_logits(model, labelled)
    output_dir = cli.make_output_dir(args.output_dir)
    print(f"{args.model}: {len(labelled)} {labelled.split} images for accuracy, {device}")
    if class_logits is None:
        print("note: this model does not know these classes, so there is no accuracy to measure")
    note_load(max(args.threads))

    rows: list[dict[str, Any]] = []
    breakdown: list[dict[str, Any]] = []
    accuracy: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for threads, batch_size in itertools.product(args.threads, batch_sizes):
            print(f"batch size {batch_size}, {threads} threads")
            setting = {"batch_size": batch_size, "threads": threads, "device": device}
            common = {"model": args.model, "untrained": args.untrained, "seed": args.seed}
            jobs = [
                Job(candidate=name, build=CANDIDATES[name][0], folder=folder, **setting, **common)
                for name in names
                if name not in missing
            ]
            timed = speed.images[: len(speed) // batch_sizes[0] * batch_size]
            unscored = None if accuracy else labelled.images
            found, logits = measure_setting(
                jobs, timed, unscored, args.rounds, args.block_seconds, args.max_slowdown
            )
            for name, output in logits.items():
                accuracy[name] = evaluation.accuracy_row(
                    output, logits[BASELINE], labelled.labels, class_logits
                ) | {"accuracy_batch_size": batch_size}
            block = []
            for name, row in (found | missing).items():
                scores = accuracy.get(name, {}) if row["status"] == "ok" else {}
                if not scores and row["status"] == "ok":
                    row.setdefault("reason", f"not scored at batch size {batch_sizes[0]}")
                about = {"model": args.model, "dataset": args.dataset, "candidate": name}
                block.append(about | setting | scores | row)
            rows += block
            environment = results.environment(model=args.model, checkpoints=model.checkpoints)
            results.write_json(output_dir / "environment.json", environment)
            if not breakdown:
                (output_dir / "breakdown.csv").unlink(missing_ok=True)  # of an earlier run
            results.write_csv(output_dir / "quantization.csv", rows, COLUMNS)
            if args.memory:
                add_memory(block[: len(jobs)], jobs, timed)
                results.write_csv(output_dir / "quantization.csv", rows, COLUMNS)
            if args.breakdown:
                breakdown += break_down(block[: len(jobs)], jobs, timed)
                results.write_csv(output_dir / "breakdown.csv", breakdown, BREAKDOWN_COLUMNS)
    results.print_table(rows, SHOWN)
    print(output_dir / "quantization.csv")
    if args.breakdown:
        print(output_dir / "breakdown.csv")
    return int(any(row["status"] == "failed" for row in [*rows, *breakdown]))


if __name__ == "__main__":
    sys.exit(main())
