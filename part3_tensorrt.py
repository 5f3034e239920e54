"""Part 3: take a trained model to ONNX and from there to TensorRT; inference time and speedup.

The model is exported once per precision and every graph is checked against PyTorch on real images.
Then PyTorch (eager, as a CUDA graph, compiled), ONNX Runtime and TensorRT run side by side. A
candidate that does not agree with PyTorch is not timed. Without an NVIDIA GPU the export, the
checks and a comparison of PyTorch with ONNX Runtime on the CPU still run.

    python part3_tensorrt.py                        # Part 2's network, else vit_tiny_imagenet
    python part3_tensorrt.py --model results/part2/best.safetensors
    python part3_tensorrt.py --model smallcnn_cifar100         # that network as published here
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
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    add_reason,
    allow_tf32,
    check_capability,
    load_image_sets,
    measure_setting,
    note_load,
    require_compiler,
)
from utils.cost import count_cost, state_bytes
from utils.isolation import UnavailableError, Worker, recorded
from utils.models import WEIGHTS_DIR, LoadedModel, load_model, scored_logits
from utils.onnx_graphs import (
    GRAPH_FILE_COLUMNS,
    GRAPHS,
    PARITY_COLUMNS,
    compare_logits,
    export_graphs,
    graph_path,
    load_calibration,
    require_parity,
)
from utils.onnx_tools import onnx_bytes, onnx_cuda_session, onnx_session
from utils.roofline import CEILING_COLUMNS, measure_ceilings
from utils.training import capture, memory_format

PART2_MODEL = Path("results/part2/best.safetensors")
PARITY_IMAGES = 64  # labelled images on which a candidate must agree with PyTorch before timing
EXPORT_IMAGES = 12  # labelled images on which an exported graph must agree

COLUMNS = (
    *("model", "dataset", "gflop_per_image", "image_size"),
    *("candidate", "precision", "device", "threads", "batch_size"),
    *("status", "reason", *timing.LATENCY_COLUMNS, "graph_baseline", *GRAPH_COLUMNS),
    *TRANSFER_COLUMNS,
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
    """A benchmark's job with what Part 3's candidates need; graphs and engines are in `folder`."""

    precision: str = "fp32"
    onnx: Path | None = None  # the exported graph; None for PyTorch
    batch_sizes: tuple[int, ...]  # of the run: an engine serves them all
    cuda_graph: bool = True


# --- the candidates: each takes (module, example batch, job) and returns a Variant ----------------


def build_eager(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """PyTorch, eager."""
    return Variant(prepare(module, example, job.precision), state_bytes(module), [])


def build_graph(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """PyTorch, the eager calls replayed as one CUDA graph."""
    call = capture(prepare(module, example, job.precision), example)
    return Variant(call, state_bytes(module), [], uploads=True, columns={"cuda_graph": True})


def build_compiled(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """PyTorch by torch.compile, with CUDA graphs."""
    from torch._dynamo.utils import counters

    require_compiler(job.device)
    call = torch.compile(prepare(module, example, job.precision), mode="reduce-overhead")
    call(example)
    replayed = not counters["inductor"]["cudagraph_skips"]
    return Variant(call, state_bytes(module), [], columns={"cuda_graph": replayed})


def build_onnxruntime(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """ONNX Runtime, float32 graph, TF32 off."""
    if example.is_cuda:
        torch.cuda.set_stream(torch.cuda.Stream())  # the one that ONNX Runtime will work on
        call = onnx_cuda_session(job.onnx)
    else:
        call = onnx_session(job.onnx, job.threads)
    return Variant(call, onnx_bytes(job.onnx), [])


def build_tensorrt(module: nn.Module, example: Tensor, job: Any) -> Variant:
    """TensorRT, strongly typed, one profile per batch size, replayed as a CUDA graph."""
    with tensorrt_for(job) as (recipe, folder):
        opened = tensorrt_engine.open_runner(recipe, folder, job.batch_size, job.cuda_graph)
        runner = _opened.enter_context(opened)
    logits = join_stream(runner)

    def call(x: Tensor) -> Tensor:
        runner.copy_from_device(x.data_ptr(), x.nbytes)
        runner.execute()
        return logits

    def host_call(x: Tensor) -> np.ndarray:
        runner.upload(x.numpy())
        runner.execute()
        return runner.download()

    columns: dict[str, Any] = {"cuda_graph": runner.uses_graph}
    if job.cuda_graph and runner.no_graph:
        columns["reason"] = f"it runs as with --no-cuda-graph: {runner.no_graph}"
    return Variant(call, runner.opened.size_bytes, [], host_call=host_call, columns=columns)


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
BASELINES = {"cpu": "torch-cpu", "cuda": "torch-fp32"}
# PyTorch's CUDA graph of the same precision, or of the nearest that PyTorch has: a speedup over it
# is not due to launches, nor to the precision but for 8 bits.
GRAPH_BASELINES = {
    "fp32": "torch-fp32-graph",
    "tf32": "torch-tf32-graph",
    "fp16": "torch-fp16-graph",
    "int8": "torch-fp16-graph",
    "fp8": "torch-fp16-graph",
}


# --- how the routes work --------------------------------------------------------------------------

# In a worker process only. It holds the engine until the process ends, which frees everything.
_opened = contextlib.ExitStack()


def prepare(module: nn.Module, example: Tensor, precision: str) -> Callable[[Tensor], Tensor]:
    """The module in that precision and in the layout that its device is fastest with, in place.

    Images and logits are float32 and contiguous: the call converts them. TF32 is a setting of the
    process.
    """
    if precision == "tf32":
        allow_tf32()
    dtype = torch.float16 if precision == "fp16" else torch.float32
    layout = memory_format(example.device)
    module = module.to(dtype).to(memory_format=layout)
    return lambda x: module(x.to(dtype, memory_format=layout)).float()


@contextlib.contextmanager
def tensorrt_for(job: EngineJob) -> Iterator[tuple[tensorrt_engine.Recipe, Path]]:
    """The engine's recipe and folder; what TensorRT lacks for it becomes UnavailableError."""
    check_capability(job.precision)
    assert job.onnx is not None
    try:
        yield tensorrt_engine.Recipe(job.onnx, job.precision, job.batch_sizes), Path(job.folder)
    except tensorrt_engine.UnsupportedError as error:
        raise UnavailableError(str(error)) from error


def make_engine(job: EngineJob) -> dict[str, Any]:
    """In a worker: have the candidate's engine in the folder; the columns on how it came about."""
    with tensorrt_for(job) as (recipe, folder):
        seconds, cached = tensorrt_engine.make_engine(recipe, folder)
    return {"engine_build_seconds": seconds, "engine_cached": cached}


def make_engines(jobs: Sequence[EngineJob]) -> dict[str, dict[str, Any]]:
    """Have all engines built, each by a process that shares the GPU's memory with no other.

    Returns:
        The columns on each engine, or the status and the reason of one that there is not.
    """
    if jobs:
        print("engines")
    rows: dict[str, dict[str, Any]] = {job.candidate: {} for job in jobs}
    for job in jobs:
        row = rows[job.candidate]
        with recorded(row), Worker() as worker:
            row |= worker.run(make_engine, job)
        how = row.get("reason") or f"{row['engine_build_seconds']:.1f} s"
        print(f"  {job.candidate:24}{how}{', kept' * row.get('engine_cached', False)}", flush=True)
    return rows


def join_stream(runner: tensorrt_engine.Runner) -> Tensor:
    """Make the engine's stream PyTorch's, its events included; the engine's logits as a tensor."""
    torch.cuda.set_stream(torch.cuda.ExternalStream(runner.stream_handle))
    return torch.as_tensor(runner.device_logits, device="cuda")


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
    sizes = [1, 8, 32, 128]
    add("--batch-sizes", type=cli.int_list, default=sizes, help="images a call, comma-separated")
    threads = [torch.get_num_threads()]
    add("--threads", type=cli.int_list, default=threads, help="CPU threads, comma-separated")
    add("--rounds", type=cli.positive_int, default=15, help="interleaved rounds of timing")
    add(
        "--block-seconds",
        type=cli.positive_float,
        default=0.5,
        help="length of the baseline's block in each round, in seconds; at most 1000 calls",
    )
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
    args = cli.parse_quick(parser, argv, QUICK)
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
    """The candidates of this run with their baselines; a CPU run lists those it lacks a GPU for."""
    for name in wanted or ():
        cli.check_name(name, CANDIDATES, "candidate")
    everything = [name for name, c in CANDIDATES.items() if device in ("cpu", c.device)]
    chosen = {BASELINES[device], *(wanted or everything)}
    chosen |= set(cuda_graph_baselines(chosen, device).values())
    return [name for name in CANDIDATES if name in chosen]


def cuda_graph_baselines(names: Iterable[str], device: str) -> dict[str, str]:
    """For each candidate the CUDA graph that it is compared with; a CPU has none."""
    if device == "cpu":
        return {}
    return {name: GRAPH_BASELINES[CANDIDATES[name].precision] for name in names}


def choose_onnx_graphs(names: Sequence[str]) -> list[str]:
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


def parity_check(model: LoadedModel, images: Tensor, untrained: bool = False) -> Check:
    """A check that compares a candidate's logits with PyTorch's, in float32 on the CPU."""
    reference = evaluation.predict(model.module, images, model.preprocessing, len(images))

    def check(row: dict[str, Any], predict: Predict) -> None:
        row |= compare_logits(torch.from_numpy(predict(images.numpy())), reference)
        require_parity(row, CANDIDATES[row["candidate"]].precision, untrained)

    return check


def model_cost(model: LoadedModel) -> dict[str, float]:
    """The columns that bound a call from below: arithmetic and input."""
    size = model.preprocessing.input_size
    cost = count_cost(model.module, torch.zeros(1, 3, size, size))
    return {"gflop_per_image": cost.gflop, "image_size": size}


def write_ceilings(path: Path) -> None:
    """Measure what this GPU can do at most, in a process of its own; a failure is only noted."""
    outcome: dict[str, Any] = {}
    with recorded(outcome), Worker() as worker:
        results.write_csv(path, worker.run(measure_ceilings, "cuda"), CEILING_COLUMNS)
    if outcome:
        print(f"note: the GPU's ceilings were not measured: {outcome['reason']}")


def make_job(name: str, job: EngineJob) -> EngineJob:
    """The job of one candidate."""
    candidate = CANDIDATES[name]
    onnx = graph_path(job.folder, job.model, candidate.graph) if candidate.graph else None
    job = replace(job, candidate=name, build=candidate.build, precision=candidate.precision)
    return replace(job, onnx=onnx, needs_module=onnx is None)


def make_rows(
    found: Mapping[str, dict[str, Any]],
    scores: Mapping[str, dict[str, Any]],
    about: dict[str, Any],
) -> list[dict[str, Any]]:
    """The rows of one batch size and thread count, with the COLUMNS that are known.

    Args:
        found: what was measured, or why it was not, of each candidate.
        scores: accuracies, measured once in a run.
        about: columns that all these rows share.
    """
    rows = []
    for name, row in found.items():
        if row["status"] == "ok" and name not in scores:
            add_reason(row, "not scored at the largest batch size")
        known = {column: row[column] for column in COLUMNS if column in row}
        accuracy = scores.get(name, {}) if row["status"] == "ok" else {}
        candidate = {"candidate": name, "precision": CANDIDATES[name].precision}
        rows.append(about | candidate | accuracy | known)
    return rows


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Export the graphs, then run every candidate at every batch size and thread count."""
    args = parse_args(argv)
    if args.list:
        list_candidates()
        return 0
    device = cli.pick_device(args.device).type
    cli.check_threads(args.threads)
    names = choose_candidates(args.candidates, device)
    cli.check_name(args.dataset, data.DATASETS, "data set")
    cli.seed_everything(args.seed)  # as in the workers: untrained weights must be the same
    model = load_trained(args.model, args.untrained)
    size = model.preprocessing.input_size
    batch_sizes = sorted(args.batch_sizes, reverse=True)  # accuracy is measured at the largest
    load = functools.partial(
        data.load_images, args.dataset, data_dir=args.data_dir, image_size=size
    )
    labelled, speed = load_image_sets(
        load, args.dataset, args.num_images, batch_sizes[0], args.seed
    )
    class_logits = scored_logits(model, labelled)
    output_dir = cli.make_output_dir(args.output_dir)
    engine_dir = cli.make_output_dir(args.engine_dir, "--engine-dir")
    print(f"{args.model}: {len(labelled)} {labelled.split} images for accuracy, {device}")
    if class_logits is None:
        print("note: this model does not know these classes, so there is no accuracy to measure")
    note_load(max(args.threads))

    def some(count: int) -> Tensor:
        return data.take_subset(labelled, min(count, len(labelled)), args.seed).images

    chosen = choose_onnx_graphs(names)
    eight_bit = any(GRAPHS[graph][1] for graph in chosen)
    calibration = load_calibration(load, labelled, args.seed) if eight_bit else None
    common = {"model": args.model, "untrained": args.untrained, "seed": args.seed}
    common |= {"folder": str(engine_dir), "batch_sizes": tuple(sorted(batch_sizes))}
    setting = {"batch_size": 1, "threads": args.threads[0], "device": "cpu"}  # of the export
    job = EngineJob(candidate="", build=build_eager, load=load_trained, **common, **setting)
    job = replace(job, cuda_graph=args.cuda_graph)
    print("graphs, cosine with PyTorch")
    graphs = export_graphs(chosen, job, calibration, some(EXPORT_IMAGES).numpy())
    results.write_csv(output_dir / "graphs.csv", graphs.values(), GRAPH_FILE_COLUMNS)
    environment = results.environment(model=args.model, checkpoints=model.checkpoints)
    if args.export_only:
        results.write_json(output_dir / "graphs_environment.json", environment)
        print(output_dir / "graphs.csv")
        return int(any(row["status"] == "failed" for row in graphs.values()))

    cost = model_cost(model)
    (output_dir / "ceilings.csv").unlink(missing_ok=True)  # of an earlier run
    if device == "cuda":
        write_ceilings(output_dir / "ceilings.csv")
    missing = {name: why for name in names if (why := why_missing(name, device, graphs))}
    here = [name for name in names if name not in missing]
    built = [name for name in here if CANDIDATES[name].build == build_tensorrt]
    engines = make_engines([make_job(name, job) for name in built])
    missing |= {name: row for name, row in engines.items() if "status" in row}
    rows: list[dict[str, Any]] = []
    accuracy: dict[str, dict[str, Any]] = {}
    check = parity_check(model, some(PARITY_IMAGES), args.untrained)
    for threads, batch_size in itertools.product(args.threads, batch_sizes):
        print(f"batch size {batch_size}, {threads} threads")
        setting = {"batch_size": batch_size, "threads": threads, "device": device}
        measured, logits = measure_setting(
            [make_job(name, replace(job, **setting)) for name in here if name not in missing],
            speed.images[: len(speed) // batch_sizes[0] * batch_size],
            None if accuracy else labelled.images,
            args.rounds,
            args.block_seconds,
            max_slowdown=math.inf,
            check=check,
            second_baselines=cuda_graph_baselines(here, device),
            transfers=device == "cuda",
        )
        for name, output in logits.items():
            accuracy[name] = evaluation.accuracy_row(
                output, logits[BASELINES[device]], labelled.labels, class_logits
            ) | {"accuracy_batch_size": batch_size}
        found = {n: missing.get(n) or measured[n] | engines.get(n, {}) for n in names}
        about = {"model": args.model, "dataset": args.dataset, **cost, **setting}
        rows += make_rows(found, accuracy, about)
        results.write_json(output_dir / "environment.json", environment)
        results.write_csv(output_dir / "tensorrt.csv", rows, COLUMNS)
    results.print_table([row for row in rows if row["status"] != "unavailable"], SHOWN)
    reasons = sorted((why["status"], why["reason"]) for why in missing.values())
    for (status, reason), group in itertools.groupby(reasons):
        print(f"{status}: {len(list(group))} candidates: {reason}")
    print(output_dir / "tensorrt.csv")
    return int(any(row["status"] == "failed" for row in (*graphs.values(), *rows)))


if __name__ == "__main__":
    sys.exit(main())
