"""Part 3: take a trained model to ONNX and from there to TensorRT; inference time and speedup.

The model is exported once per precision and every graph is checked against PyTorch on real images.
Then PyTorch (eager, as a CUDA graph, compiled), ONNX Runtime and TensorRT run side by side. A
candidate that does not agree with PyTorch is not timed. Without an NVIDIA GPU the export, the
checks and a comparison of PyTorch with ONNX Runtime on the CPU still run.

    python part3_tensorrt.py                        # Part 2's network, else vit_tiny_imagenet
    python part3_tensorrt.py --model smallcnn_cifar100
    python part3_tensorrt.py --quick                # under a minute, offline, CPU
    python part3_tensorrt.py --list                 # the candidates
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils import cli, data, evaluation, results, tensorrt_engine, timing
from utils.benchmark import (
    GRAPH_COLUMNS,
    TRANSFER_COLUMNS,
    Build,
    Check,
    Job,
    Predict,
    Variant,
    capture,
    measure_block,
    prepare_process,
)
from utils.cost import state_bytes
from utils.isolation import UnavailableError, Worker, recorded
from utils.models import WEIGHTS_DIR, LoadedModel, load_model, scored_logits
from utils.onnx_quantization import NothingToQuantizeError, quantize_graph
from utils.onnx_tools import (
    HalfPrecision,
    check_onnx,
    onnx_cuda_session,
    onnx_session,
    write_onnx,
)

PART2_MODEL = Path("results/part2/best.safetensors")
REPLAYED = {"cuda_graph": True}
INPUT_BATCHES = 4  # timed inputs take turns, so that no call finds its images in the cache
PARITY_IMAGES = 64  # labelled images on which a candidate must agree with PyTorch before timing
EXPORT_IMAGES = 12  # labelled images on which an exported graph must agree
CHECKED_BATCHES = (1, 3)  # at which a graph is checked; it is exported with a batch of 2
CALIBRATION_IMAGES, CALIBRATION_BATCH = 256, 16  # training images that set the 8-bit ranges

# The least mean cosine of the (centred) logits with those of PyTorch in float32 on the CPU. Below
# it an 8-bit engine is broken; above it the accuracy column speaks.
GATES = {"fp32": 0.9999, "tf32": 0.9995, "fp16": 0.999, "int8": 0.90, "fp8": 0.90}
NEEDS_CAPABILITY = {"tf32": (8, 0), "fp8": (8, 9)}

GRAPHS = {  # exported graph: (precision, what is quantised in it); the rest of it is fp16
    "fp32": ("fp32", ()),
    "fp16": ("fp16", ()),
    "int8": ("int8", ("linear",)),
    "int8-attention": ("int8", ("linear", "attention")),
    "int8-residual": ("int8", ("linear", "residual")),
    "fp8": ("fp8", ("linear",)),
    "fp8-attention": ("fp8", ("linear", "attention")),
}
PARITY_COLUMNS = ("parity_cosine", "parity_max_difference", "parity_images")
GRAPH_FILE_COLUMNS = (
    *("model", "graph", "precision", "file", "status", "reason", "onnx_opset", "nodes", "size_mb"),
    *("export_seconds", *PARITY_COLUMNS, "checked_batch_sizes"),
    *("quantized_weights", "quantized_activations", "calibration_images"),
)
COLUMNS = (
    *("model", "dataset", "candidate", "precision", "device", "threads", "batch_size"),
    *("status", "reason", *timing.LATENCY_COLUMNS, *GRAPH_COLUMNS, *TRANSFER_COLUMNS),
    *PARITY_COLUMNS,
    *evaluation.ACCURACY_COLUMNS,
    *("accuracy_batch_size", "size_mb", "build_seconds"),
    *("engine_build_seconds", "engine_cached", "cuda_graph"),
    *("load_average_before", "load_average_after"),
)
SHOWN = {
    "candidate": "s",
    "batch_size": "d",
    "latency_ms_median": ".3f",
    "speedup": ".2f",
    "speedup_over_graph": ".2f",
    "transfers_latency_ms_median": ".3f",
    "images_per_s": ".0f",
    "top1_percent": ".2f",
    "parity_cosine": ".5f",
    "size_mb": ".1f",
    "status": "s",
}
QUICK = {
    "model": "vit_digits",
    "device": "cpu",
    "batch_sizes": [1, 16],
    "rounds": 7,
    "block_seconds": 0.1,
}


@dataclass(frozen=True, kw_only=True)
class EngineJob(Job):
    """A benchmark's job with what Part 3's candidates need."""

    precision: str = "fp32"
    onnx: Path | None = None  # the exported graph; None for PyTorch
    engine_dir: Path
    batch_sizes: tuple[int, ...]  # of the run: an engine serves them all
    cuda_graph: bool = True


# --- the candidates: each takes (module, example batch, job) and returns a Variant ----------------


def build_eager(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """PyTorch, eager."""
    return Variant(in_precision(module, job.precision), state_bytes(module), [])


def build_graph(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """PyTorch, the eager calls replayed as one CUDA graph."""
    module = in_precision(module, job.precision)
    return Variant(capture(module, example), state_bytes(module), [], columns=REPLAYED)


def build_compiled(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """PyTorch by torch.compile, with CUDA graphs."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise UnavailableError("torch.compile needs a C compiler on this machine")
    module = in_precision(module, job.precision)
    call = torch.compile(module, mode="reduce-overhead")
    return Variant(call, state_bytes(module), [], columns=REPLAYED)


def build_onnxruntime(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """ONNX Runtime, float32 graph, TF32 off."""
    if example.is_cuda:
        torch.cuda.set_stream(torch.cuda.Stream())  # the one that ONNX Runtime will work on
        call = onnx_cuda_session(job.onnx)
    else:
        call = onnx_session(job.onnx, job.threads)
    return Variant(call, job.onnx.stat().st_size, [])


def build_tensorrt(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """TensorRT, strongly typed, one profile per batch size, replayed as a CUDA graph."""
    check_capability(job.precision)
    recipe = tensorrt_engine.Recipe(job.onnx, job.precision, job.batch_sizes)
    runner = _opened.enter_context(
        tensorrt_engine.open_runner(recipe, job.engine_dir, job.batch_size, job.cuda_graph)
    )
    logits = join_stream(runner)

    def call(x: Tensor) -> Tensor:
        runner.copy_from_device(x.data_ptr())
        runner.execute()
        return logits

    def host_call(x: Tensor) -> np.ndarray:
        runner.upload(x.numpy())
        runner.execute()
        return runner.download()

    opened = runner.opened
    columns = {
        "engine_build_seconds": opened.build_seconds,
        "engine_cached": opened.cached,
        "cuda_graph": runner.uses_graph,
    }
    return Variant(call, opened.size_bytes, [], host_call=host_call, columns=columns)


@dataclass(frozen=True)
class Candidate:
    """How to build it, where it runs, and which exported graph it reads."""

    build: Build
    device: str
    precision: str
    graph: str | None = None


CANDIDATES = {
    "torch-cpu": Candidate(build_eager, "cpu", "fp32"),
    "onnxruntime-cpu": Candidate(build_onnxruntime, "cpu", "fp32", "fp32"),
    "torch-fp32": Candidate(build_eager, "cuda", "fp32"),
    "torch-fp32-graph": Candidate(build_graph, "cuda", "fp32"),
    "torch-fp32-compile": Candidate(build_compiled, "cuda", "fp32"),
    "torch-tf32": Candidate(build_eager, "cuda", "tf32"),
    "torch-tf32-graph": Candidate(build_graph, "cuda", "tf32"),
    "torch-tf32-compile": Candidate(build_compiled, "cuda", "tf32"),
    "torch-fp16": Candidate(build_eager, "cuda", "fp16"),
    "torch-fp16-graph": Candidate(build_graph, "cuda", "fp16"),
    "torch-fp16-compile": Candidate(build_compiled, "cuda", "fp16"),
    "onnxruntime-cuda": Candidate(build_onnxruntime, "cuda", "fp32", "fp32"),
    "tensorrt-fp32": Candidate(build_tensorrt, "cuda", "fp32", "fp32"),
    "tensorrt-tf32": Candidate(build_tensorrt, "cuda", "tf32", "fp32"),
    **{
        f"tensorrt-{graph}": Candidate(build_tensorrt, "cuda", precision, graph)
        for graph, (precision, _) in GRAPHS.items()
        if precision != "fp32"
    },
}
BASELINES = {"cpu": ["torch-cpu"], "cuda": ["torch-fp32", "torch-fp32-graph"]}


# --- how the routes work --------------------------------------------------------------------------

# In a worker process only. It holds the engine until the process ends, which frees everything.
_opened = contextlib.ExitStack()


def join_stream(runner: tensorrt_engine.Runner) -> Tensor:
    """Make the engine's stream PyTorch's, its events included; the engine's logits as a tensor."""
    torch.cuda.set_stream(torch.cuda.ExternalStream(runner.stream_handle))
    return torch.as_tensor(runner.device_logits, device="cuda")


class ParityError(Exception):
    """Logits too far from PyTorch's."""


def check_capability(precision: str) -> None:
    """UnavailableError if this GPU has no arithmetic of that precision."""
    needed = NEEDS_CAPABILITY.get(precision, (0, 0))
    if torch.cuda.get_device_capability() < needed:
        wanted = ".".join(map(str, needed))
        raise UnavailableError(f"{precision} needs a GPU of compute capability {wanted} or newer")


def in_precision(module: nn.Module, precision: str) -> nn.Module:
    """The module in that precision, float32 outside; TF32 is a setting of the process."""
    if precision == "tf32":
        check_capability(precision)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return HalfPrecision(module) if precision == "fp16" else module


# --- the model ------------------------------------------------------------------------------------


def checkpoint_of(name: str) -> Path | None:
    """The file of a checkpoint that Part 2 wrote; None for the models that utils.models knows."""
    if name == "smallcnn_cifar100":
        return WEIGHTS_DIR / f"{name}.safetensors"
    return Path(name) if name.endswith(".safetensors") else None


def load_trained(name: str, untrained: bool = False) -> LoadedModel:
    """Load a model by name, or a checkpoint of Part 2."""
    path = checkpoint_of(name)
    if path is None:
        return load_model(name, untrained)
    if untrained:
        raise cli.UserError(f"--untrained: {path} holds trained weights")
    if not path.is_file():
        raise cli.UserError(f"--model {name}: {path} does not exist: run part2_tune.py")
    model = importlib.import_module("part2_tune").load_checkpoint(path)
    model.module.eval().requires_grad_(False)
    return model


def dataset_of(name: str) -> str:
    """The data set that a model was trained on: its card's, else Tiny-ImageNet."""
    path = checkpoint_of(name) or WEIGHTS_DIR / f"{name}.safetensors"
    try:
        return str(json.loads(path.with_suffix(".json").read_text())["dataset"])
    except (OSError, ValueError, LookupError, TypeError):
        return "cifar100" if checkpoint_of(name) else "tiny-imagenet"


def load_calibration(
    load: Callable[..., data.ImageSet], scored: data.ImageSet, seed: int
) -> np.ndarray | None:
    """Training images uint8 `[N, 3, H, W]`, none of them scored; None if there are none."""
    try:
        train = load(split="train")
    except cli.UserError as error:
        print(f"note: no images to calibrate int8 and fp8 on ({error})")
        return None
    train = data.take_subset(train, min(CALIBRATION_IMAGES, len(train)), seed)
    seen = {hash(image.tobytes()) for image in scored.images.numpy()}  # CIFAR-100 repeats ten
    images = train.images.numpy()
    return images[[hash(image.tobytes()) not in seen for image in images]]


# --- the export -----------------------------------------------------------------------------------


def compare_logits(logits: Tensor, reference: Tensor) -> dict[str, Any]:
    """PARITY_COLUMNS of logits `[N, C]`."""
    return {
        "parity_cosine": evaluation.centred_cosine(logits, reference),
        "parity_max_difference": (logits - reference).abs().max().item(),
        "parity_images": len(logits),
    }


def require_parity(row: dict[str, Any], precision: str) -> None:
    """ParityError if the row's cosine is below the precision's gate, or is not a number."""
    cosine, gate = row["parity_cosine"], GATES[precision]
    if not cosine >= gate:
        raise ParityError(f"cosine {cosine:.5f} with PyTorch's logits, at least {gate} wanted")


def make_graph(
    name: str, job: EngineJob, calibration: np.ndarray | None, images: np.ndarray
) -> dict[str, Any]:
    """In a worker: write one of GRAPHS to `job.onnx`, check it, compare it with PyTorch.

    Args:
        calibration, images: uint8 `[N, 3, H, W]`, training images and labelled ones.
    """
    prepare_process(job)
    model = job.load(job.model, job.untrained)
    how, path = model.preprocessing, graph_path(job.engine_dir, job.model, name)
    precision, parts = GRAPHS[name]
    start = time.perf_counter()
    reference = evaluation.predict(model.module, torch.from_numpy(images), how, len(images))
    row: dict[str, Any] = {}
    if not parts:
        module = in_precision(model.module, precision)
        write_onnx(module, torch.zeros(1, 3, how.input_size, how.input_size), path)
    elif calibration is None:
        raise UnavailableError("there are no training images to calibrate on")
    else:
        source = graph_path(job.engine_dir, job.model, "fp16")
        inputs = data.preprocess(torch.from_numpy(calibration), how).numpy()
        try:
            row = quantize_graph(
                source, path, precision, parts, inputs, CALIBRATION_BATCH, job.threads
            )
        except NothingToQuantizeError as error:
            raise UnavailableError(str(error)) from error
        row["calibration_images"] = len(inputs)
    row |= {"export_seconds": time.perf_counter() - start, **check_onnx(path)}
    call = onnx_session(path, job.threads, optimize=False)
    logits = [
        evaluation.predict(call, torch.from_numpy(images), how, size) for size in CHECKED_BATCHES
    ]
    return row | compare_logits(torch.cat(logits), torch.cat([reference] * len(logits)))


def export_graphs(
    names: Sequence[str], job: EngineJob, calibration: np.ndarray | None, images: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Make each graph in a process of its own; a row of GRAPH_FILE_COLUMNS for each."""
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        path = graph_path(job.engine_dir, job.model, name)
        path.unlink(missing_ok=True)  # a failed export must not leave an older graph
        precision, parts = GRAPHS[name]
        row = rows[name] = {"model": job.model, "graph": name, "precision": precision}
        row |= {"file": str(path), "status": "ok"}
        with recorded(row), Worker() as worker:
            if parts and rows["fp16"]["status"] != "ok":
                raise UnavailableError("it starts from the fp16 graph, which there is not")
            row["checked_batch_sizes"] = " ".join(map(str, CHECKED_BATCHES))
            row |= worker.run(make_graph, name, job, calibration, images)
            require_parity(row, precision)
        print(f"  {name:20}{row.get('reason') or row['parity_cosine']}", flush=True)
    return rows


def graph_path(folder: Path, model: str, graph: str) -> Path:
    """Where a model's graph lies."""
    stem = model.removesuffix(".safetensors").replace("/", "-").strip("-.")
    return folder / f"{stem}-{graph}.onnx"


# --- the run --------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `--quick` changes the defaults, and explicit flags still win."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "--model",
        help=f"a name (see utils/models.py), smallcnn_cifar100, or a checkpoint of Part 2; "
        f"{PART2_MODEL} if there, else vit_tiny_imagenet",
    )
    add("--untrained", action="store_true", help="random weights: latency only, no accuracy")
    add("--dataset", help=f"one of {', '.join(data.DATASETS)}; the model's own if not given")
    add("--data-dir", type=Path, help="folder of the data set; data/<dataset> if not given")
    add("--num-images", type=cli.positive_int, help="labelled images scored; all if not given")
    add("--candidates", type=cli.name_list, help="comma-separated; all if not given")
    add("--list", action="store_true", help="list the candidates and exit")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    add("--batch-sizes", type=cli.int_list, default=[1, 8, 32, 128], help="images a call")
    threads = [torch.get_num_threads()]
    add("--threads", type=cli.int_list, default=threads, help="CPU threads, comma-separated")
    add("--rounds", type=cli.positive_int, default=15, help="interleaved rounds of timing")
    add("--block-seconds", type=cli.positive_float, default=0.5, help="baseline's turn, in seconds")
    add("--engine-dir", type=Path, help="for graphs and engines; OUTPUT_DIR/engines if not given")
    add("--export-only", action="store_true", help="write and check the graphs, measure nothing")
    add(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="replay TensorRT engines as CUDA graphs",
    )
    add("--seed", type=cli.seed, default=0, help="seed of subsets, weights and the order of turns")
    add("--output-dir", type=Path, default=Path("results/part3"), help="folder for the CSVs")
    add("--quick", action="store_true", help="a small run on digits: under a minute, no network")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    args.model = args.model or (str(PART2_MODEL) if PART2_MODEL.is_file() else "vit_tiny_imagenet")
    args.dataset = args.dataset or dataset_of(args.model)
    args.engine_dir = args.engine_dir or args.output_dir / "engines"
    return args


def list_candidates() -> None:
    """Print each candidate with its device, its precision and one line on what it is."""
    for name, candidate in CANDIDATES.items():
        what = candidate.build.__doc__
        print(f"{name:24}{candidate.device:6}{candidate.precision:6}{what}")


def choose_candidates(wanted: Sequence[str] | None, device: str) -> list[str]:
    """The candidates of this run, baselines first; a CPU run lists those it lacks a GPU for."""
    for name in wanted or ():
        cli.check_name(name, CANDIDATES, "candidate")
    everything = [name for name, c in CANDIDATES.items() if device in ("cpu", c.device)]
    return list(dict.fromkeys([*BASELINES[device], *(wanted or everything)]))


def choose_graphs(names: Sequence[str]) -> list[str]:
    """The graphs that these candidates read, and the one that 8-bit graphs start from."""
    wanted = {CANDIDATES[name].graph for name in names}
    if any(graph and GRAPHS[graph][1] for graph in wanted):
        wanted.add("fp16")
    return [graph for graph in GRAPHS if graph in wanted]


def why_missing(name: str, device: str, graphs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Status and reason of a candidate that cannot start here; empty if it can."""
    candidate = CANDIDATES[name]
    if candidate.device != device:
        reason = "no NVIDIA GPU is in use" if device == "cpu" else "it runs with --device cpu"
        return {"status": "unavailable", "reason": reason}
    graph = graphs.get(candidate.graph or "", {"status": "ok"})
    if graph["status"] == "ok":
        return {}
    reason = f"no {candidate.graph} graph: {graph['reason']}"
    return {"status": graph["status"], "reason": reason}


def load_image_sets(
    load: Callable[..., data.ImageSet], dataset: str, num_images: int | None, batch: int, seed: int
) -> tuple[data.ImageSet, data.ImageSet]:
    """The images for accuracy and the INPUT_BATCHES batches for speed (fewer if few images)."""
    accuracy = load(split=data.ACCURACY_SPLIT[dataset], num_images=num_images, seed=seed)
    speed = load(split=data.SPEED_SPLIT[dataset])
    if batch > len(speed):
        raise cli.UserError(
            f"--batch-sizes {batch}: {dataset} {speed.split} has {len(speed)} images"
        )
    batches = min(INPUT_BATCHES, len(speed) // batch)
    return accuracy, data.take_subset(speed, batches * batch, seed)


def parity_check(model: LoadedModel, images: Tensor) -> Check:
    """A check that compares a candidate's logits with PyTorch's, in float32 on the CPU."""
    reference = evaluation.predict(model.module, images, model.preprocessing, len(images))

    def check(row: dict[str, Any], predict: Predict) -> None:
        row |= compare_logits(torch.from_numpy(predict(images.numpy())), reference)
        require_parity(row, CANDIDATES[row["candidate"]].precision)

    return check


def make_job(name: str, job: EngineJob) -> EngineJob:
    """The job of one candidate."""
    candidate = CANDIDATES[name]
    onnx = candidate.graph and graph_path(job.engine_dir, job.model, candidate.graph)
    return replace(
        job, candidate=name, build=candidate.build, precision=candidate.precision, onnx=onnx or None
    )


def make_engine_dir(path: Path) -> Path:
    """Create the folder for graphs and engines, else UserError."""
    try:
        return cli.make_output_dir(path)
    except cli.UserError as error:
        raise cli.UserError(str(error).replace("--output-dir", "--engine-dir")) from error


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Export the graphs, then run every candidate at every batch size and thread count."""
    args = parse_args(argv)
    if args.list:
        list_candidates()
        return 0
    device = cli.pick_device(args.device).type
    names = choose_candidates(args.candidates, device)
    cli.check_name(args.dataset, data.DATASETS, "data set")
    model = load_trained(args.model, args.untrained)
    size = model.preprocessing.input_size
    batch_sizes = sorted(args.batch_sizes, reverse=True)  # accuracy is measured at the largest
    load = functools.partial(
        data.load_images, args.dataset, data_dir=args.data_dir, image_size=size
    )
    labelled, speed = load_image_sets(
        load, args.dataset, args.num_images, batch_sizes[0], args.seed
    )
    columns = scored_logits(model, labelled)
    output_dir = cli.make_output_dir(args.output_dir)
    engine_dir = make_engine_dir(args.engine_dir)
    print(f"{args.model}: {len(labelled)} {labelled.split} images for accuracy, {device}")
    if columns is None:
        print("note: this model does not know these classes, so there is no accuracy to measure")

    chosen = choose_graphs(names)
    eight_bit = any(GRAPHS[graph][1] for graph in chosen)
    calibration = load_calibration(load, labelled, args.seed) if eight_bit else None
    common = {"model": args.model, "untrained": args.untrained, "seed": args.seed, "folder": ""}
    common |= {"engine_dir": engine_dir, "batch_sizes": tuple(sorted(batch_sizes))}
    setting = {"batch_size": 1, "threads": args.threads[0], "device": "cpu"}  # of the export
    job = EngineJob(candidate="", build=build_eager, load=load_trained, **common, **setting)
    job = replace(job, cuda_graph=args.cuda_graph)
    print("graphs, cosine with PyTorch")
    graphs = export_graphs(chosen, job, calibration, labelled.images[:EXPORT_IMAGES].numpy())
    environment = results.environment(model=args.model, checkpoints=model.checkpoints)
    results.write_json(output_dir / "environment.json", environment)
    results.write_csv(output_dir / "graphs.csv", graphs.values(), GRAPH_FILE_COLUMNS)
    if args.export_only:
        print(output_dir / "graphs.csv")
        return int(any(row["status"] == "failed" for row in graphs.values()))

    rows: list[dict[str, Any]] = []
    accuracy: dict[str, dict[str, Any]] = {}
    missing = {name: why for name in names if (why := why_missing(name, device, graphs))}
    check = parity_check(model, labelled.images[:PARITY_IMAGES])
    for threads, batch_size in itertools.product(args.threads, batch_sizes):
        print(f"batch size {batch_size}, {threads} threads")
        setting = {"batch_size": batch_size, "threads": threads, "device": device}
        jobs = [make_job(name, replace(job, **setting)) for name in names if name not in missing]
        block, logits = measure_block(
            jobs,
            speed.images[: len(speed) // batch_sizes[0] * batch_size],
            None if accuracy else labelled.images,
            args.rounds,
            args.block_seconds,
            max_slowdown=math.inf,
            check=check,
            second_baseline="torch-fp32-graph" if device == "cuda" else None,
            transfers=device == "cuda",
        )
        for name, output in logits.items():
            accuracy[name] = evaluation.accuracy_row(
                output, logits[BASELINES[device][0]], labelled.labels, columns
            ) | {"accuracy_batch_size": batch_size}
        for name in names:
            row = missing.get(name) or block[name]
            scores = accuracy.get(name, {}) if row["status"] == "ok" else {}
            about = {"candidate": name, "precision": CANDIDATES[name].precision}
            about |= {"model": args.model, "dataset": args.dataset} | setting
            if row["status"] == "ok" and not scores:
                row.setdefault("reason", f"not scored at batch size {batch_sizes[0]}")
            known = {column: row[column] for column in COLUMNS if column in row}
            rows.append(about | scores | known)
        results.write_csv(output_dir / "tensorrt.csv", rows, COLUMNS)
    results.print_table([row for row in rows if row["status"] != "unavailable"], SHOWN)
    for reason, group in itertools.groupby(missing.values(), key=lambda why: why["reason"]):
        print(f"unavailable: {len(list(group))} candidates: {reason}")
    print(output_dir / "tensorrt.csv")
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
