"""Candidates of one model, measured side by side: the run that Parts 1 and 3 share.

Every candidate is built in a worker process of its own and serves questions there: its logits, the
time of k calls, its memory. The parent asks one at a time, so that none disturbs another. A script
adds what is its own to

    benchmark.add_arguments(parser, …)
    with benchmark.open_run(args) as run:
        jobs = [benchmark.Job(…) for each candidate, the baseline first]
        rows = benchmark.measure(run, jobs, "table.csv", COLUMNS)
        return benchmark.finish(run, "table.csv", rows, SHOWN)
"""

import argparse
import contextlib
import functools
import gc
import io
import itertools
import logging
import math
import os
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from utils import cli, data, evaluation, figures, models, results, timing, training, workers
from utils.models import LoadedModel, ModelSource
from utils.workers import Outcome, UnavailableError, Worker, attempt, recorded

NEEDS_CAPABILITY = {"tf32": (8, 0), "bf16": (8, 0), "fp8": (8, 9)}
MAX_SLOWDOWN = 4.0  # a candidate this many times slower than the baseline is timed, not scored
MEMORY_BATCHES = 3
INPUT_BATCHES = 4  # timed inputs take turns, so that consecutive calls differ
SCORED_AT_ONCE = 256  # images a question: the bar moves, and Ctrl-C is heard in between
PRODUCT_SIDE, PRODUCT_SECONDS = 1024, 0.5  # of the square matrices that tell machines apart

MEMORY_COLUMNS = ("peak_memory_mb", "build_peak_memory_mb")
LOAD_COLUMNS = ("load_average_before", "load_average_after")
SHARE_COLUMNS: tuple[str, ...] = (
    "quantized_layers",
    "linear_layers",
    "quantized_convolutions",
    "convolutions",
    "quantized_parameters_percent",
    "quantized_macs_percent",
)
TRANSFER_COLUMNS = {  # column: which of LATENCY_COLUMNS it is, with host-device transfers
    "transfers_latency_ms_median": "latency_ms_median",
    "transfers_latency_ms_p90": "latency_ms_p90",
    "transfers_wall_ms_mean": "wall_ms_mean",
    "transfers_images_per_s": "images_per_s",
    "transfers_speedup": "speedup",
}
GRAPH_COLUMNS = {  # the same over a second baseline, the column `graph_baseline`
    "speedup_over_graph": "speedup",
    "speedup_over_graph_p10": "speedup_p10",
    "speedup_over_graph_p90": "speedup_p90",
}

Row = dict[str, Any]
Shape = tuple[int, ...]  # of a weight
Predict = Callable[[np.ndarray], np.ndarray]  # uint8 images [N, 3, H, W] -> logits [N, C]
Check = Callable[[Row, Predict], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One candidate: how a worker process builds it, and what is known of it beforehand."""

    candidate: str
    build: "Build"
    source: ModelSource
    device: str
    needs_module: bool = True  # on the device; a candidate that reads a file does not
    missing: Outcome | None = None  # why it cannot start here
    columns: Mapping[str, Any] = field(default_factory=dict)  # further columns of its rows
    graph_baseline: str | None = None  # a candidate; the speedup over it goes into GRAPH_COLUMNS
    batch_size: int = 1  # `measure` sets this and the next two
    threads: int = 1
    folder: Path = Path()  # for files that the candidates of a run share; it goes with the run


@dataclass(frozen=True)
class Variant:
    """A built candidate: float32 images `[B, 3, S, S]` -> logits `[B, C]`."""

    call: Callable[[Tensor], Any]
    size_bytes: int
    quantized: Sequence[Shape] | None = None  # weights held in 8 bits; None: it does not quantise
    extra_build_seconds: float = 0.0  # spent earlier in the run, on a file that candidates share
    uploads: bool = False  # `call` also takes images in pinned host memory
    host_call: Callable[[Tensor], Any] | None = None  # instead of `round_trip`, if it has its own
    columns: Mapping[str, Any] = field(default_factory=dict)  # further columns of its row


Build = Callable[[nn.Module, Tensor, Job], Variant]  # takes a float32 module, an example batch


# --- the command line, and what it chooses --------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, output_dir: Path, sizes: list[int]) -> None:
    """Add the arguments that Parts 1 and 3 share; `sizes` are the default batch sizes.

    The script itself gives `--model` and `--dataset` their defaults.
    """
    add = parser.add_argument
    add("--model", help="a name or a checkpoint of Part 2; see utils/models.py")
    add("--checkpoint", type=Path, help="your own weights for --model timm/NAME")
    add("--classes", type=Path, help="a file with the name of each output, one a line")
    add("--mean", type=cli.float_list, help="of red, green, blue on the 0-1 scale; model's own")
    add("--std", type=cli.float_list, help="standard deviations, likewise")
    add("--input-size", type=cli.positive_int, help="side of the input, pixels; the model's own")
    add("--interpolation", choices=data.INTERPOLATIONS, help="how images are resized; likewise")
    add("--untrained", action="store_true", help="random weights: latency only, no accuracy")
    add("--dataset", help=data.DATASETS_HELP)
    add("--data-dir", type=Path, help="folder of the data set; data/<dataset> if not given")
    add("--num-images", type=cli.positive_int, help="labelled images scored; all if not given")
    add("--candidates", type=cli.name_list, help="comma-separated; all if not given")
    add("--list", action="store_true", help="list the candidates and exit")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    add("--batch-sizes", type=cli.int_list, default=sizes, help="images a call, comma-separated")
    threads = [torch.get_num_threads()]
    add("--threads", type=cli.int_list, default=threads, help="CPU threads, comma-separated")
    add("--rounds", type=cli.positive_int, default=15, help="interleaved rounds of timing")
    turn = "seconds of the baseline in each round, at most 1000 calls"
    add("--block-seconds", type=cli.positive_float, default=0.5, help=turn)
    apart = "measure peak memory, in a further process per candidate"
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help=apart)
    add("--seed", type=cli.seed, default=0, help="seed of subsets, weights and the order of turns")
    add("--output-dir", type=Path, default=output_dir, help="each model has a folder in it")


@dataclass
class Run:
    """What the command line chose, loaded; while it is open, its folder is its own."""

    source: ModelSource
    model: LoadedModel  # on the CPU
    cost: "Cost"
    dataset: str
    load: Callable[..., data.ImageSet]  # `data.load_images` of this data set, for this model
    labelled: data.ImageSet  # for accuracy
    class_logits: list[int] | None  # which logit stands for each class; None: no accuracy
    speed: data.ImageSet  # INPUT_BATCHES of the largest batch size, or fewer
    device: str  # "cpu" or "cuda"
    threads: list[int]
    batch_sizes: list[int]  # the largest first: accuracy is measured there
    rounds: int
    block_seconds: float
    memory: bool
    folder: Path
    environment: dict[str, Any]  # a script may add to it before its first table
    started: bool = False  # whether what an earlier run left in the folder is gone

    def write_table(self, name: str, rows: Iterable[Row], columns: Sequence[str]) -> Path:
        """Write a CSV; the run's first removes an earlier run's picture, streams and profiles."""
        if not self.started:
            for pattern in (f"{Path(name).stem}.png", "streams.csv", "profile-*-batch*-threads*"):
                for old in set(self.folder.glob(pattern)).difference(results.written):
                    old.unlink()
            results.write_json(self.folder / "environment.json", self.environment)
            self.started = True
        results.write_csv(self.folder / name, rows, columns)
        return self.folder / name


@contextlib.contextmanager
def open_run(
    args: argparse.Namespace,
    network: Callable[..., nn.Module] | None = None,
    images: bool = True,
) -> Iterator[Run]:
    """Check the shared arguments, load the model and the images, and hold the run's folder.

    Args:
        args: what `add_arguments` asked for.
        network: builds a network of Part 2 from its card; must pickle.
        images: False leaves `labelled` and `speed` empty, for what measures nothing.

    Raises:
        UserError: something in the arguments, or another run works in the folder.
    """
    device = cli.pick_device(args.device).type
    cli.check_threads(args.threads)
    cli.check_name(args.dataset, data.DATASETS, "data set")
    source = ModelSource(
        name=args.model,
        checkpoint=args.checkpoint,
        untrained=args.untrained,
        classes_file=args.classes,
        mean=args.mean,
        std=args.std,
        input_size=args.input_size,
        interpolation=args.interpolation,
        seed=args.seed,
        network=network,
    )
    print(f"loading {args.model}", flush=True)  # a hub that is not there takes a minute to say so
    model = models.load_model(source)
    load = functools.partial(
        data.load_images,
        args.dataset,
        data_dir=args.data_dir,
        image_size=model.preprocessing.input_size,
        interpolation=model.preprocessing.interpolation,
    )
    batch_sizes: list[int] = []
    labelled = speed = data.ImageSet(args.dataset, "no", torch.empty(0, 3, 1, 1), None, ())
    class_logits, classes = None, ""
    if images:
        split = data.ACCURACY_SPLIT[args.dataset]
        labelled = load(split=split, num_images=args.num_images, seed=args.seed)
        most = INPUT_BATCHES * max(args.batch_sizes)
        speed = load(split="test", num_images=most, seed=args.seed, fewer=True)
        batch_sizes = choose_batch_sizes(args.batch_sizes, speed)
        batches = min(INPUT_BATCHES, len(speed) // batch_sizes[0])
        speed = data.take_subset(speed, batches * batch_sizes[0], args.seed)
        model = models.name_classes(model, labelled.classes)
        class_logits, classes = models.scored_logits(model, labelled)
    elif model.classes is None:  # an exported file carries their names
        with contextlib.suppress(cli.UserError):
            train = load(split="train", num_images=1, seed=args.seed, fewer=True)
            model = models.name_classes(model, train.classes)
    run = Run(
        source=source,
        model=model,
        cost=count_cost(model),
        dataset=args.dataset,
        load=load,
        labelled=labelled,
        class_logits=class_logits,
        speed=speed,
        device=device,
        threads=args.threads,
        batch_sizes=batch_sizes,
        rounds=args.rounds,
        block_seconds=args.block_seconds,
        memory=args.memory,
        folder=cli.make_output_dir(args.output_dir / models.run_name(source)),
        environment=results.environment(
            model=args.model,
            checkpoints=model.checkpoints,
            preprocessing=asdict(model.preprocessing),
            classes=classes,
        ),
    )
    with cli.hold(run.folder / ".lock", "take another --output-dir"):
        introduce(run)
        yield run


def choose_batch_sizes(wanted: Sequence[int], images: data.ImageSet) -> list[int]:
    """Those that the images suffice for, the largest first; a note says which are left out."""
    sizes = sorted(wanted, reverse=True)
    fitting = [size for size in sizes if size <= len(images)]
    has = f"{images.dataset} {images.split} has {len(images)} images"
    if not fitting:
        raise cli.UserError(f"batches of {sizes[-1]}: {has}; use smaller --batch-sizes")
    if left_out := [str(size) for size in sizes if size not in fitting]:
        print(f"note: no batches of {', '.join(left_out)}: {has}")
    return fitting


def load_calibration(run: Run, count: int) -> np.ndarray:
    """Up to `count` training images uint8 `[N, 3, H, W]`, none of them scored.

    Raises:
        UnavailableError: there are none.
    """
    try:
        train = run.load(split="train", num_images=count, seed=run.source.seed, fewer=True)
    except cli.UserError as error:
        raise UnavailableError(f"there are no training images to calibrate on: {error}") from error
    seen = {hash(image.tobytes()) for image in run.labelled.images.numpy()}
    images = train.images.numpy()
    images = images[[hash(image.tobytes()) not in seen for image in images]]  # CIFAR-100 repeats
    if not len(images):
        raise UnavailableError("all training images that were drawn to calibrate on are scored too")
    return images


def introduce(run: Run) -> None:
    """Say what is measured on what, and what this CPU can do at most, which is measured now."""
    print(f"{run.source.name} on {run.device}, {models.describe_preprocessing(run.model)}")
    if not run.batch_sizes:  # nothing is measured
        return
    print(f"{len(run.labelled)} {run.labelled.split} images; {run.environment['classes']}")
    load, cores, threads = os.getloadavg()[0], os.cpu_count() or 1, max(run.threads)
    if load + threads > cores + 0.5:
        print(
            f"note: the last minute's load average is {load:.1f} on {cores} cores; what shares "
            f"them with the benchmark spoils its times"
        )
    if run.device == "cpu":
        with Worker() as worker:
            rates = worker.run(measure_products, threads)
        run.environment["large_product_gops"] = rates
        shown = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        print(f"a large matrix product with {threads} threads, billions of operations/s: {shown}")


def measure_products(threads: int) -> dict[str, float]:
    """In a worker: rates of a large matrix product, in billions of operations per second."""
    from torch.utils.benchmark import Timer

    x = torch.rand(PRODUCT_SIDE, PRODUCT_SIDE)
    factors = {"x": x, "whole": (100 * x).to(torch.int8)}
    rates = {}
    for name, product in (("fp32", "torch.mm(x, x)"), ("int8", "torch._int_mm(whole, whole)")):
        timer = Timer(product, globals=factors, num_threads=threads)
        seconds = timer.blocked_autorange(min_run_time=PRODUCT_SECONDS).median
        rates[name] = round(2 * PRODUCT_SIDE**3 / seconds / 1e9, 1)
    return rates


# --- what a model costs, and which share of it is quantised ---------------------------------------


@dataclass(frozen=True)
class Layer:
    """A weight that is a factor of products, or of convolutions, with all its calls."""

    shape: Shape  # sorted: formats differ in which side comes first
    convolution: bool
    multiply_adds: int


@dataclass(frozen=True)
class Cost:
    """Counts of one model for one image."""

    parameters: int
    multiply_adds: int  # of the whole model, attention products included
    layers: tuple[Layer, ...]

    @property
    def gflop(self) -> float:
        """Billions of operations; a multiply-add is two."""
        return 2 * self.multiply_adds / 1e9


class CountingMode(TorchDispatchMode):
    """Counts multiply-adds, and apart those of each weight, whatever function it is passed to."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.multiply_adds = 0
        self.calls: Counter[tuple[int, int, Shape, bool]] = Counter()
        self._weights = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        operator = func.overloadpacket
        if operator in flop_registry:
            flop = flop_registry[operator](*args, **(kwargs or {}), out_val=output)
            self.multiply_adds += flop // 2
            for factor in args:
                if not isinstance(factor, Tensor) or factor.ndim < 2:
                    continue
                pointer = factor.untyped_storage().data_ptr()
                if pointer in self._weights:
                    shape = tuple(sorted(map(int, factor.shape)))
                    is_convolution = operator is torch.ops.aten.convolution
                    layer = (pointer, int(factor.storage_offset()), shape, is_convolution)
                    self.calls[layer] += flop // 2
        return output


@torch.no_grad()
def count_cost(model: LoadedModel) -> Cost:
    """Run the model once, on a black image, and count."""
    size = model.preprocessing.input_size
    # Nothing can look into the CPU's fused attention; its plain form is two products.
    with CountingMode(model.module) as mode, sdpa_kernel(SDPBackend.MATH):
        model.module(torch.zeros(1, 3, size, size))
    layers = [Layer(key[2], key[3], count) for key, count in mode.calls.items()]
    parameters = sum(p.numel() for p in model.module.parameters())
    return Cost(parameters, mode.multiply_adds, tuple(layers))


def quantized_share(cost: Cost, shapes: Iterable[Shape]) -> Row:
    """SHARE_COLUMNS: how much of the model lies in weights held in 8 bits.

    Where only some of the layers of one shape are held so, the cheapest of them are counted: the
    share of multiply-adds is then a lower bound.

    Args:
        shapes: of the weights that a candidate holds in 8 bits, in any order of their sides.
    """
    left = Counter(tuple(sorted(shape)) for shape in shapes)
    found = []
    for layer in sorted(cost.layers, key=lambda layer: layer.multiply_adds):
        if left[layer.shape]:
            left[layer.shape] -= 1
            found.append(layer)
    parameters = sum(math.prod(layer.shape) for layer in found)
    multiply_adds = sum(layer.multiply_adds for layer in found)
    return {
        "quantized_layers": sum(not layer.convolution for layer in found),
        "linear_layers": sum(not layer.convolution for layer in cost.layers),
        "quantized_convolutions": sum(layer.convolution for layer in found),
        "convolutions": sum(layer.convolution for layer in cost.layers),
        "quantized_parameters_percent": 100 * parameters / cost.parameters,
        "quantized_macs_percent": 100 * multiply_adds / cost.multiply_adds,
    }


def state_bytes(module: nn.Module) -> int:
    """Bytes of the saved state dict."""
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    return buffer.getbuffer().nbytes


# --- what a worker process does: it builds one candidate and serves it ----------------------------


@dataclass
class Served:
    """A built candidate and what it is asked about; batches are on its device."""

    job: Job
    preprocessing: data.Preprocessing
    variant: Variant
    inputs: list[Tensor] = field(default_factory=list)
    host_inputs: list[Tensor] = field(default_factory=list)
    host_call: Callable[[Tensor], Any] | None = None


served: Served  # in a worker process only


def open_candidate(job: Job, cost: Cost) -> Row:
    """Build the candidate in this process; return the columns known once it is built."""
    seconds = serve(job)
    variant = served.variant
    row = {"size_mb": variant.size_bytes / 1e6, "build_seconds": seconds, **variant.columns}
    if variant.quantized is None:
        return row
    share = quantized_share(cost, variant.quantized)
    if not share["quantized_layers"] + share["quantized_convolutions"]:
        raise UnavailableError("nothing to quantise: no layer of this model is held in 8 bits")
    return row | share


def serve(job: Job) -> float:
    """Build the candidate and call it once; from now on it is `served`. Returns the seconds."""
    global served
    prepare_process(job)
    model = models.load_model(job.source)
    size = model.preprocessing.input_size
    example = torch.rand(job.batch_size, 3, size, size, device=job.device)
    module = model.module.to(job.device) if job.needs_module else model.module
    start = time.perf_counter()
    variant = job.build(module, example, job)
    variant.call(example)
    timing.synchronize()
    seconds = time.perf_counter() - start + variant.extra_build_seconds
    served = Served(job, model.preprocessing, variant)
    return seconds


def prepare_process(job: Job) -> None:
    """Set this worker's global state: no gradients, threads, TF32 off, cuDNN tuned, seeds."""
    warnings.simplefilter("ignore")  # deprecations of the routes compared
    logging.disable(logging.WARNING)
    torch.set_grad_enabled(False)
    # cuDNN tries its kernels, as ONNX Runtime and TensorRT do theirs.
    training.prepare_backend(torch.device(job.device), job.threads)
    cli.seed_everything(job.source.seed)


def require_compiler(device: str) -> None:
    """UnavailableError unless torch.compile finds a compiler: of C++ for a CPU, of C for a GPU."""
    names = {"cpu": ["CXX", "g++", "clang++"], "cuda": ["CC", "cc", "gcc", "clang"]}[device]
    chosen = os.environ.get(names[0], names[1])
    if not any(map(shutil.which, [chosen, *names[1:]])):
        raise UnavailableError(f"torch.compile needs a compiler on this machine: {names[1]}")


def predict_logits(images: np.ndarray) -> np.ndarray:
    """Logits `[N, C]` of uint8 images `[N, 3, H, W]`, in batches of the candidate's size."""
    job, tensor = served.job, torch.from_numpy(images)
    return evaluation.predict(
        served.variant.call, tensor, served.preprocessing, job.batch_size, job.device
    ).numpy()


def load_inputs(images: np.ndarray) -> None:
    """Preprocess uint8 images `[K * B, 3, H, W]` into the K batches that will be timed."""
    batches = torch.from_numpy(images).split(served.job.batch_size)
    preprocessing, device = served.preprocessing, served.job.device
    served.inputs = [data.preprocess(batch, preprocessing, device) for batch in batches]


def load_host_inputs() -> None:
    """Copy the batches to pinned host memory, for timing with transfers."""
    served.host_inputs = [batch.cpu().pin_memory() for batch in served.inputs]
    served.host_call = served.variant.host_call or round_trip(served.variant, served.inputs[0])


def round_trip(variant: Variant, example: Tensor) -> Callable[[Tensor], Tensor]:
    """Images and logits in pinned host memory; both copies on the stream of the call."""
    images = torch.empty_like(example)
    logits = torch.empty(variant.call(example).shape, pin_memory=True)

    def host_call(x: Tensor) -> Tensor:
        output = variant.call(x if variant.uploads else images.copy_(x, non_blocking=True))
        return logits.copy_(output, non_blocking=True)

    return host_call


def time_calls(calls: int) -> timing.Block:
    """Time calls of the candidate; images and logits stay on the device.

    A CUDA graph and TensorRT begin with a copy of the images, on the device, into the buffer that
    they read; eager PyTorch and ONNX Runtime read them where they are.
    """
    return timing.time_block(served.variant.call, served.inputs, calls, served.job.device)


def time_host_calls(calls: int) -> timing.Block:
    """Time calls with the transfers: images start and logits end in pinned host memory."""
    assert served.host_call
    return timing.time_block(served.host_call, served.host_inputs, calls, served.job.device)


def measure_memory(job: Job, images: np.ndarray) -> Row:
    """Peak memory in MB of building the candidate, and then of running it.

    CPU: the resident set of the whole process, libraries included; what building left behind is
    handed back before the second figure. GPU: what PyTorch reserved.
    """
    serve(job)
    load_inputs(images)
    build_peak = workers.peak_memory_mb(job.device)
    gc.collect()
    workers.reset_peak_memory(job.device)
    time_calls(MEMORY_BATCHES)
    return {
        "build_peak_memory_mb": build_peak,
        "peak_memory_mb": workers.peak_memory_mb(job.device),
    }


def check_capability(precision: str) -> None:
    """UnavailableError if this GPU has no arithmetic of that precision."""
    needed = NEEDS_CAPABILITY.get(precision, (0, 0))
    if torch.cuda.get_device_capability() < needed:
        wanted = ".".join(map(str, needed))
        raise UnavailableError(f"{precision} needs a GPU of compute capability {wanted} or newer")


def allow_tf32() -> None:
    """TF32 matrix products and convolutions in this process; UnavailableError without them."""
    check_capability("tf32")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


# --- what the parent does -------------------------------------------------------------------------


def measure(
    run: Run,
    jobs: Sequence[Job],
    table: str,
    columns: Sequence[str],
    check: Check | None = None,
    transfers: bool = False,
) -> list[Row]:
    """Measure all candidates at every thread count and batch size; write `table` after each.

    Args:
        jobs: one a candidate, the baseline first, in the order of the rows.
        table, columns: the CSV in the run's folder.
        check: called with each candidate's row and its `predict_logits` before it is timed; it
            adds columns to the row, or raises to keep the candidate out of the timing.
        transfers: time the candidates once more with host-device transfers, TRANSFER_COLUMNS.

    Returns:
        A row for each candidate, thread count and batch size.

    Raises:
        UserError, RuntimeError: the baseline did not run.
    """
    rows: list[Row] = []
    scores: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as shared:
        for threads, batch_size in itertools.product(run.threads, run.batch_sizes):
            print(f"batch size {batch_size}, {threads} threads")
            chosen = [
                replace(job, threads=threads, batch_size=batch_size, folder=Path(shared))
                for job in jobs
            ]
            here = [job for job in chosen if job.missing is None]
            images = run.speed.images[: len(run.speed) // run.batch_sizes[0] * batch_size]
            found, logits = measure_setting(run, here, images, not scores, check, transfers)
            scores = scores or score(run, logits)
            block = [make_row(run, job, found, scores) for job in chosen]
            rows += block
            run.write_table(table, rows, columns)
            if run.memory:
                add_memory(block, here, images)
                run.write_table(table, rows, columns)
    return rows


def make_row(run: Run, job: Job, found: Mapping[str, Row], scores: Mapping[str, Row]) -> Row:
    """One row of the table; accuracies are measured once in a run and stand in all its rows."""
    name = job.candidate
    row: Row = {"model": run.source.name, "dataset": run.dataset, "device": run.device}
    row |= {"candidate": name, "threads": job.threads, "batch_size": job.batch_size}
    row |= job.columns
    row |= found[name] if job.missing is None else job.missing.columns
    if row["status"] == "ok" and name not in scores and not row.get("reason"):
        row["reason"] = f"not scored at batch size {run.batch_sizes[0]}"
    return row | scores[name] if row["status"] == "ok" and name in scores else row


def score(run: Run, logits: Mapping[str, Tensor]) -> dict[str, Row]:
    """The columns on accuracy of each candidate; the baseline's logits come first."""
    baseline = next(iter(logits.values()))
    rows: dict[str, Row] = {}
    for name, output in logits.items():
        labels, chosen = run.labelled.labels, run.class_logits
        rows[name] = dict(evaluation.accuracy_row(output, baseline, labels, chosen))
        rows[name]["accuracy_batch_size"] = run.batch_sizes[0]
        if not run.model.num_classes:  # the largest of a network's features stands for nothing
            rows[name]["agreement_percent"] = None
    return rows


def measure_setting(
    run: Run,
    jobs: Sequence[Job],
    images: Tensor,
    scored: bool,
    check: Check | None,
    transfers: bool,
) -> tuple[dict[str, Row], dict[str, Tensor]]:
    """Build all candidates for one batch size and thread count, then time them in rounds.

    Args:
        images: uint8 `[K * B, 3, H, W]`, the K batches that take turns.
        scored: whether logits of the labelled images are wanted, too.

    Returns:
        A row for each candidate, and the logits `[N, C]` of those that were scored.
    """
    baseline, batch_size = jobs[0].candidate, jobs[0].batch_size
    load_before = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        processes = {job.candidate: stack.enter_context(Worker()) for job in jobs}
        # They start side by side; none builds before all are idle.
        for worker in processes.values():
            worker.run(os.getpid)
        rows, latency_ms, logits = build_all(run, jobs, processes, images, scored, check)
        # As many calls as fill the baseline's turn, fewer where that would take twice as long.
        usual = latency_ms[baseline]
        calls = {
            name: timing.calls_per_block(max(usual, latency / 2), run.block_seconds)
            for name, latency in latency_ms.items()
        }
        take_turns = functools.partial(
            timing.measure_rounds, rounds=run.rounds, calls=calls, seed=run.source.seed
        )
        turns = {name: functools.partial(processes[name].run, time_calls) for name in calls}
        blocks = take_turns(turns, guard=lambda name: recorded(rows[name]))
        check_baseline(rows[baseline], batch_size)
        load = {"load_average_before": load_before, "load_average_after": os.getloadavg()[0]}
        for name, latency_row in timing.summarise(blocks, baseline, batch_size).items():
            rows[name] |= latency_row | load
        add_graph_speedups(jobs, rows, blocks)
        if transfers:
            timed = {name: processes[name] for name in blocks}
            add_transfers(rows, timed, take_turns, baseline, batch_size)
    return rows, {name: output for name, output in logits.items() if rows[name]["status"] == "ok"}


def build_all(
    run: Run,
    jobs: Sequence[Job],
    processes: Mapping[str, Worker],
    images: Tensor,
    scored: bool,
    check: Check | None,
) -> tuple[dict[str, Row], dict[str, float], dict[str, Tensor]]:
    """Build, check, warm up and score the candidates one after the other; see `measure_setting`.

    Returns:
        A row for each candidate, the warm latency in ms of those that can be timed, and the logits
        `[N, C]` of those that were scored.
    """
    baseline = jobs[0].candidate
    rows: dict[str, Row] = {}
    latency_ms: dict[str, float] = {}
    logits: dict[str, Tensor] = {}
    for job in jobs:
        name, worker = job.candidate, processes[job.candidate]
        row = rows[name] = {"candidate": name, "status": "ok"}
        with recorded(row):
            row |= worker.run(open_candidate, job, run.cost)
            if check is not None:
                check(row, functools.partial(worker.run, predict_logits))
            worker.run(load_inputs, images.numpy())
            warm_up = functools.partial(timing.warm_up, functools.partial(worker.run, time_calls))
            latency = warm_up()
            reference = latency_ms.get(baseline, latency)
            if scored and latency > MAX_SLOWDOWN * reference:  # or others stalled it
                latency = min(latency, warm_up())
            slowdown = latency / reference
            if scored and slowdown > MAX_SLOWDOWN:
                add_reason(row, f"not scored: {slowdown:.0f} times slower than {baseline}")
            elif scored:
                logits[name] = take_logits(run, job, worker, 0 if logits else len(jobs))
            latency_ms[name] = latency
        built = f"built in {row['build_seconds']:.1f} s" if row["status"] == "ok" else row["status"]
        print(f"  {name:24}{built}  {row.get('reason', '')}", flush=True)
        check_baseline(rows[baseline], job.batch_size)
        if name not in latency_ms:
            worker.stop()  # what it holds is memory that the others need
    return rows, latency_ms, logits


def take_logits(run: Run, job: Job, worker: Worker, candidates: int) -> Tensor:
    """Logits `[N, C]` of the labelled images; tell early how long that many `candidates` take."""
    parts = run.labelled.images.split(job.batch_size * max(1, SCORED_AT_ONCE // job.batch_size))
    logits: list[Tensor] = []
    start = time.perf_counter()
    for part in tqdm(parts, desc=f"scoring {job.candidate}", disable=None, leave=False):
        logits.append(torch.from_numpy(worker.run(predict_logits, part.numpy())))
        if candidates and len(logits) == 1:
            scoring = len(parts) * (time.perf_counter() - start)
            turns = len(run.threads) * len(run.batch_sizes) * run.rounds
            seconds = candidates * (scoring + turns * run.block_seconds)
            duration = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
            print(f"  about {duration} if all are as fast as this one, building not counted")
    return torch.cat(logits)


def add_graph_speedups(
    jobs: Sequence[Job], rows: Mapping[str, Row], blocks: Mapping[str, Sequence[timing.Block]]
) -> None:
    """Fill GRAPH_COLUMNS; where the second baseline was not timed, they stay empty."""
    for job in jobs:
        name, second = job.candidate, job.graph_baseline
        if second is None or name not in blocks:
            continue
        if second not in blocks:
            add_reason(rows[name], f"{second} was not timed")
            continue
        both = {second: blocks[second], name: blocks[name]}
        summary = timing.summarise(both, second, job.batch_size)[name]
        columns = {column: summary[like] for column, like in GRAPH_COLUMNS.items()}
        rows[name] |= {"graph_baseline": second, **columns}


def add_transfers(
    rows: Mapping[str, Row],
    processes: Mapping[str, Worker],
    take_turns: Callable[..., dict[str, list[timing.Block]]],
    baseline: str,
    batch_size: int,
) -> None:
    """Time the candidates once more, with transfers; who fails only here keeps what it has."""
    turns: dict[str, timing.TimeBlock] = {}
    outcomes: dict[str, Row] = {name: {} for name in processes}
    for name, worker in processes.items():
        with recorded(outcomes[name]):
            worker.run(load_host_inputs)
            turns[name] = functools.partial(worker.run, time_host_calls)
    blocks = take_turns(turns, guard=lambda name: recorded(outcomes[name]))
    for name, outcome in outcomes.items():
        if outcome:
            add_reason(rows[name], f"transfers not measured: {outcome['reason']}")
    if baseline not in blocks:
        return
    for name, latency_row in timing.summarise(blocks, baseline, batch_size).items():
        rows[name] |= {column: latency_row[like] for column, like in TRANSFER_COLUMNS.items()}


def add_reason(row: Row, text: str) -> None:
    """Say something more of a candidate that ran."""
    row["reason"] = "; ".join(filter(None, [row.get("reason"), text]))


def check_baseline(row: Row, batch_size: int) -> None:
    """Without its baseline a comparison means nothing: UserError, or RuntimeError if it failed."""
    message = f"{row['candidate']} did not run at batch size {batch_size}: {row.get('reason')}"
    if row["status"] == "unavailable":
        raise cli.UserError(f"{message}; try smaller --batch-sizes")
    if row["status"] == "failed":
        raise RuntimeError(message)


def add_memory(rows: Sequence[Row], jobs: Sequence[Job], images: Tensor) -> None:
    """Measure each candidate's memory in a fresh process, after all timing is done."""
    job_of = {job.candidate: job for job in jobs}
    for row in tqdm(rows, desc="memory", disable=None, leave=False):
        job = job_of.get(row["candidate"])
        if row["status"] != "ok" or job is None:
            continue
        if job.device == "cuda" and not job.needs_module:
            continue  # what other libraries take there, PyTorch does not know
        with Worker() as worker, tempfile.TemporaryDirectory() as folder:
            alone = replace(job, folder=Path(folder))
            outcome = attempt(worker.run, measure_memory, alone, images.numpy())
        if outcome.ok:
            row |= outcome.value
        else:  # a measured candidate stays measured
            add_reason(row, f"memory not measured: {outcome.reason}")


def finish(run: Run, table: str, rows: Sequence[Row], shown: Mapping[str, tuple[str, str]]) -> int:
    """Print the table, draw the picture, name the files; the exit code: 1 if a candidate failed.

    Args:
        shown: columns for `results.print_table`.
    """
    results.print_table(rows, shown)
    picture = (run.folder / table).with_suffix(".png")
    figures.draw_run(rows, picture, run.environment)
    print(run.folder / table)
    print(picture)
    return int(any(row["status"] == "failed" for row in rows))
