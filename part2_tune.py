"""Part 2: tune a small convolutional network for CIFAR-100 within a budget of seconds.

Every trial is a whole training of `--train-seconds` on this device: how many steps that gives is
measured before it starts, and the schedule, averaging and small images are shares of the steps.
Optuna compares configurations on a held-out tenth of the training images. The three best and the
default are trained again with new seeds, and the highest mean wins, be it the default's. Default
and winner are then trained on all training images with several seeds; the test images are looked at
once for each of these networks.

    python part2_tune.py                              # on one GPU about an hour and a half
    python part2_tune.py --quick                      # under a minute, offline: digits
    python part2_tune.py --sampler random             # the sampler's yardstick
    python part2_tune.py --train-seconds 170 --start results/part2/cifar100-60s-gp/trials.csv
    python part2_tune.py --stage final                # the default alone, unless there is a winner
    python part2_tune.py --dataset folder --data-dir my/images          # your own classes
    python part2_tune.py --storage postgresql+psycopg2://me@host/mine   # on several machines

The same command again continues what was stopped or killed.
"""

from utils import cli  # isort: skip  # first: it says in one line if this Python is too old

import argparse
import contextlib
import functools
import gc
import hashlib
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import torch
import torch.nn.functional as F
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from torch import Tensor, nn

from utils import data, evaluation, figures, models, results, study, training
from utils.training import Muon, capture, memory_format, prepare_backend, warmup_cosine

HELD_OUT = 0.1  # share of the training images on which configurations are compared
FINALIST_SEEDS = 100_000  # from here on, so that no trial has them
START_TRIALS = 8  # taken from a table
BUDGETS = {"cuda": (60.0, 48), "cpu": (120.0, 16)}  # seconds of a training, number of trials
QUICK = {
    "dataset": "digits",
    "device": "cpu",
    "train_seconds": 2.0,
    "trials": 5,
    "finalists": 1,
    "finalist_seeds": 2,
    "repeats": 2,
    "max_params": 150_000,
    "tolerance": 100.0,  # percent: it is to show the way, on a busy machine too
    "threads": 1,  # several would wait for each other on such small images
}


# --- hyperparameters ------------------------------------------------------------------------------


@dataclass(frozen=True)
class HParams:
    """One configuration. The defaults are what an experienced hand would try first."""

    width: int = 64  # channels at the first resolution; twice and four times as many below
    depth1: int = 1  # residual blocks at the first resolution, the images' own
    depth2: int = 2  # at half of it
    depth3: int = 3  # at a quarter
    whiten: bool = False  # a fixed convolution first; the three resolutions begin at half
    pool: bool = False  # halve the resolution by max-pooling, not by a convolution's stride
    learning_rate: float = 1.0  # peak, as a multiple of the usual rates of Muon and SGD
    batch_size: int = 512  # images
    cutmix: float = 0.5  # share of the images that take a square from another
    colour: float = 0.0  # largest relative change of brightness, contrast and saturation
    shift: float = 1 / 8  # largest shift of an image, as a share of its side, rounded up
    label_smoothing: float = 0.1
    rate_beside_muon: float = 0.2  # usual peak rate of SGD, for what Muon does not train
    small_share: float = 0.0  # share of the steps, the first, that see smaller images: see shrink
    averaging: float = 0.0  # of the weights: the average's time constant, a share of the steps


# Known to work with batches of 512; rates grow with the root of the batch.
MUON_RATE = 0.06
REFERENCE_BATCH = 512
WEIGHT_DECAY = 5e-4  # of SGD; Muon needs none
WARMUP = 0.2  # share of the steps

Space = Mapping[str, Any]  # hyperparameter -> distribution


def search_space(num_images: int) -> Space:
    """Where Optuna looks, for a training set of this size.

    Most of it are networks of more than 5 M parameters: see `repair`.
    """
    batch = smallest_batch(num_images)
    return {
        "width": IntDistribution(32, 160, step=32),
        "depth1": IntDistribution(0, 4),
        "depth2": IntDistribution(0, 6),
        "depth3": IntDistribution(0, 4),
        "whiten": CategoricalDistribution([False, True]),
        "pool": CategoricalDistribution([False, True]),
        "learning_rate": FloatDistribution(0.4, 3.0, log=True),
        "batch_size": IntDistribution(batch, 6 * batch, step=batch),
        "cutmix": FloatDistribution(0.0, 0.9),
        "colour": FloatDistribution(0.0, 0.5),
        "shift": FloatDistribution(0.0, 1 / 8),
        "label_smoothing": FloatDistribution(0.0, 0.4),
        "rate_beside_muon": FloatDistribution(0.1, 1.6, log=True),
        "small_share": FloatDistribution(0.0, 0.7),
        "averaging": FloatDistribution(0.0, 0.12),
    }


def smallest_batch(num_images: int) -> int:
    """A power of two that gives a few hundred steps an epoch, at least 32."""
    return 2 ** max(5, int(math.log2(max(1, num_images / 150))))


# What a network that is too large loses, in this order: hyperparameter, its least value, its step.
REPAIRS = (("depth3", 0, 1), ("depth2", 0, 1), ("width", 32, 32), ("depth1", 0, 1))


def repair(hparams: HParams, num_classes: int, max_params: int) -> HParams:
    """The same configuration with at most so many parameters; UserError if there is none."""
    for name, least, step in REPAIRS:
        for value in range(getattr(hparams, name), least - 1, -step):
            hparams = replace(hparams, **{name: value})  # type: ignore[arg-type]
            if count_parameters(hparams, num_classes) <= max_params:
                return hparams
    if hparams.whiten:  # which takes parameters, too
        return repair(replace(hparams, whiten=False), num_classes, max_params)
    fewest = count_parameters(hparams, num_classes)
    raise cli.UserError(f"--max-params {max_params}: the smallest network has {fewest}")


def near_ends(hparams: HParams, space: Space) -> list[str]:
    """Hyperparameters within a tenth of an end of their range, beyond which better may lie."""
    found = []
    for name, value in asdict(hparams).items():
        if not isinstance(space[name], CategoricalDistribution):
            low, high = space[name].low, space[name].high
            scale: Callable[[float], float] = math.log if space[name].log else float
            if not 0.1 <= (scale(value) - scale(low)) / (scale(high) - scale(low)) <= 0.9:
                found.append(f"{name} {value:.3g} ({low:g} to {high:g})")
    return found


def read_start(start: str, space: Space) -> list[dict[str, Any]]:
    """Up to eight configurations to begin with, from a CSV: a study's best, or else the first.

    Raises:
        UserError: it is not such a table, or a configuration is outside the space.
    """
    try:
        table = pd.read_csv(start)
        if "hparams" not in table:
            raise ValueError("it has no column hparams")
        if "held_out_top1_percent" in table:
            table = table.sort_values("held_out_top1_percent", ascending=False)
        if table.empty:
            raise ValueError("it has no rows")
        rows = [json.loads(text) for text in table.hparams.unique()[:START_TRIALS]]
        params = [{name: row.get(name, getattr(HParams, name)) for name in space} for row in rows]
        for row in params:
            optuna.trial.create_trial(value=0.0, params=row, distributions=dict(space))  # checks
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise cli.UserError(f"--start {start}: {cli.first_line(error)}") from error
    return params


# --- the network ----------------------------------------------------------------------------------

WHITE_CHANNELS = 32  # of the fixed convolution, if there is one


class ConvNormAct(nn.Sequential):
    """3x3 convolution, possibly 2x2 max-pooling, batch normalisation, SiLU."""

    def __init__(self, narrow: int, wide: int, stride: int = 1, pool: bool = False) -> None:
        conv = nn.Conv2d(narrow, wide, 3, stride, padding=1, bias=False)
        pooling = [nn.MaxPool2d(2)] if pool else []
        super().__init__(conv, *pooling, nn.BatchNorm2d(wide), nn.SiLU())


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions whose result is added to their input; at first it adds nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = ConvNormAct(width, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.norm(self.conv(self.first(x))))


class SmallCNN(nn.Module):
    """Residual network for small images: float `[N, 3, H, W]` -> logits `[N, num_classes]`.

    A 3x3 convolution each leads into the resolutions H, H/2 and H/4; it halves them by its stride
    or, if `pool`, by max-pooling. `depths` residual blocks follow. The features' average over the
    last map goes to a linear classifier. If `whiten`, a 3x3 convolution that is not trained and a
    SiLU come first, and the resolutions are H/2, H/4 and H/8.
    """

    def __init__(
        self,
        width: int,
        depths: Sequence[int],
        num_classes: int,
        pool: bool = False,
        whiten: bool = False,
        dropout: float = 0.0,  # on the cards of earlier networks; it acted in training only
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        if whiten:
            layers = [nn.Conv2d(3, WHITE_CHANNELS, 3, padding=1, bias=False), nn.SiLU()]
            layers[0].requires_grad_(False)
            channels = WHITE_CHANNELS
        for stage, depth in enumerate(depths):
            wide, lower = width * 2**stage, whiten or stage > 0
            stride = 2 if lower and not pool else 1
            layers.append(ConvNormAct(channels, wide, stride, pool=lower and pool))
            layers += [ResidualBlock(wide) for _ in range(depth)]
            channels = wide
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def architecture_of(hparams: HParams, num_classes: int) -> dict[str, Any]:
    """The arguments of SmallCNN."""
    depths = [hparams.depth1, hparams.depth2, hparams.depth3]
    shape = {"width": hparams.width, "depths": depths, "num_classes": num_classes}
    return shape | {"pool": hparams.pool, "whiten": hparams.whiten}


def count_parameters(hparams: HParams, num_classes: int) -> int:
    with torch.device("meta"):  # shapes without memory
        network = SmallCNN(**architecture_of(hparams, num_classes))
    return sum(p.numel() for p in network.parameters())


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a network learns: images and labels on the device, and how they may be distorted."""

    images: data.ImageSet
    mean: tuple[float, ...]  # per channel, on the 0-1 scale
    std: tuple[float, ...]
    flip: bool  # mirror half of the images left-right, the other half in the next epoch

    @property
    def size(self) -> int:
        return self.images.images.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.images.images.device

    @property
    def preprocessing(self) -> data.Preprocessing:
        return data.Preprocessing(self.size, self.mean, self.std)


def make_task(images: data.ImageSet, flip: bool, device: torch.device) -> Task:
    """Move the images to the device and measure their channels' mean and deviation."""
    return Task(data.to_device(images, device), *data.channel_statistics(images), flip)


def shrink(task: Task) -> Task:
    """The same task with images of 3/4 the size, rounded down to a multiple of 8, at least 8."""
    size = max(8, task.size * 3 // 32 * 8)
    small = training.resize(task.images.images, size)
    return replace(task, images=replace(task.images, images=small))


def start_network(hparams: HParams, num_classes: int, task: Task, seed: int) -> SmallCNN:
    """A network with fresh weights on the task's device; all that is random follows the seed.

    A first convolution that is not trained decorrelates the 3x3 patches of a thousand images.
    """
    cli.seed_everything(seed)
    network = SmallCNN(**architecture_of(hparams, num_classes))
    network.to(task.device).to(memory_format=memory_format(task.device))
    if hparams.whiten:
        some = task.images.images[:: math.ceil(len(task.images) / 1000)]
        x = data.preprocess(some, task.preprocessing, task.device)
        kernels = training.whitening_kernels(x, WHITE_CHANNELS // 2)
        network.features[0].load_state_dict({"weight": kernels})
    return network


@dataclass(frozen=True)
class Training:
    """A training that is over."""

    steps: int
    loss: float  # mean over the last epoch
    train_seconds: float  # from the first batch to the last update
    # Before: resizing and padding of all images, choice of kernels, compilation, recording, timing.
    setup_seconds: float


def train(
    network: SmallCNN,
    hparams: HParams,
    task: Task,
    seconds: float,
    compiled: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Training:
    """Train in place, in as many steps as this device is expected to do in so many seconds.

    Shuffling and augmentation follow PyTorch's global seed. If `averaging`, an exponential average
    of the weights and running statistics takes their place at the end. A loss that is not finite
    is returned as it is.
    """
    begun = clock()
    with unchanged(network, task.device):
        run = prepare_run(network, hparams, task, compiled)
        steps = count_steps(run, seconds, hparams.small_share, clock)
    ready = clock()
    loss = run(steps, hparams.small_share)
    return Training(steps, loss, clock() - ready, ready - begun)


@contextlib.contextmanager
def unchanged(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo, in the end, what happened to weights, buffers and random generators."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    network.load_state_dict(state)  # into the same memory, which a CUDA graph reads


Run = Callable[[int, float], float]  # steps, share of them with small images -> loss at the end

BLOCKS = 3
BLOCK_SHARE = 0.01  # of the seconds of a training, at least, are those of a block


def count_steps(run: Run, seconds: float, small_share: float, clock: Callable[[], float]) -> int:
    """How many steps take so many seconds, by the mean of a few blocks for each image size."""

    def time_step(small: float) -> float:
        run(1, small)  # the first is slower
        durations: list[float] = []
        steps = 1
        while len(durations) < BLOCKS:
            begun = clock()
            run(steps, small)
            duration = clock() - begun
            if durations or duration >= BLOCK_SHARE * seconds:
                durations.append(duration / steps)
            else:  # too short to time
                steps *= 2
        return statistics.fmean(durations)

    step = (1 - small_share) * time_step(0.0)
    if small_share:
        step += small_share * time_step(1.0)
    return max(1, round(seconds / step))


def prepare_run(network: SmallCNN, hparams: HParams, task: Task, compiled: bool) -> Run:
    """The training loop, for any number of steps; each run begins without momentum."""
    batch_size = min(hparams.batch_size, len(task.images))
    if compiled:
        torch.compiler.reset()  # code of earlier trainings counts towards recompile_limit
    optimizers = make_optimizers(network, hparams, batch_size)
    mirrored = torch.zeros(len(task.images), dtype=torch.bool, device=task.device)
    what = (network, optimizers, hparams, batch_size, mirrored, compiled)
    step = small_step = make_step(*what, task)
    if hparams.small_share and (small := shrink(task)).size < task.size:
        small_step = make_step(*what, small)
    weights = [value for value in network.state_dict().values() if value.is_floating_point()]

    def run(steps: int, small_share: float) -> float:
        network.train()
        forget_momentum(optimizers)
        averages = [value.clone() for value in weights] if hparams.averaging else []
        renewed = 1 / max(1.0, hparams.averaging * steps)
        losses = torch.zeros(min(steps, len(task.images) // batch_size), device=task.device)
        batches = itertools.islice(shuffled(task, batch_size, mirrored), steps)
        for number, batch in enumerate(batches):
            for optimizer, peak in optimizers:
                rate = warmup_cosine(number, steps, WARMUP * steps, peak)
                for group in optimizer.param_groups:
                    group["lr"].fill_(rate)
            loss = small_step(batch) if number < small_share * steps else step(batch)
            losses[number % len(losses)] = loss
            if averages:
                torch._foreach_lerp_(averages, weights, renewed)
        if averages:
            torch._foreach_copy_(weights, averages)
        return float(losses.mean())  # waits for the device

    return run


def shuffled(task: Task, batch_size: int, mirrored: Tensor) -> Iterator[Tensor]:
    """Indices of whole batches `[batch_size]`, epoch after epoch, without end.

    If the task may flip, `mirrored`, bool `[N]`, becomes a random half of the images, and the other
    half in every second epoch (Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU").
    """
    number = len(task.images)
    if task.flip:
        mirrored.copy_(torch.rand(number, device=task.device) < 0.5)
    while True:
        order = torch.randperm(number, device=task.device)
        yield from order.split(batch_size)[: number // batch_size]
        if task.flip:
            mirrored.logical_not_()


# Each with its peak learning rate.
Optimizers = tuple[tuple[Muon, float], tuple[torch.optim.SGD, float]]


def make_optimizers(network: SmallCNN, hparams: HParams, batch_size: int) -> Optimizers:
    """Muon for the kernels of the inner convolutions, SGD for the rest.

    The rates are tensors, for CUDA graphs. Weight decay acts on kernels and matrices, not on
    normalisations and biases.
    """
    device = network.head.weight.device
    kernels = [p for p in network.parameters() if p.ndim == 4 and p.requires_grad]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    outer = 0 if hparams.whiten else 1  # number of kernels that are trained and see pixels
    muon = Muon(kernels[outer:], torch.zeros((), device=device), momentum=0.9)
    groups = [
        {"params": [*kernels[:outer], network.head.weight], "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    rate = torch.zeros((), device=device)
    sgd = torch.optim.SGD(groups, rate, momentum=0.9, nesterov=True, fused=device.type == "cuda")
    multiple = hparams.learning_rate * (batch_size / REFERENCE_BATCH) ** 0.5
    return (muon, multiple * MUON_RATE), (sgd, multiple * hparams.rate_beside_muon)


def forget_momentum(optimizers: Optimizers) -> None:
    """Set it to zero where it lies: a CUDA graph reads that memory."""
    for optimizer, _ in optimizers:
        for state in optimizer.state.values():
            for momentum in state.values():
                momentum.zero_()


def make_step(
    network: SmallCNN,
    optimizers: Optimizers,
    hparams: HParams,
    batch_size: int,
    mirrored: Tensor,
    compiled: bool,
    task: Task,
) -> Callable[[Tensor], Tensor]:
    """One optimisation step: indices of a batch `[batch_size]` -> its loss.

    `mirrored`, bool `[N]`, says which images are mirrored, and may be changed between steps.

    On a GPU the whole step, augmentation included, is one CUDA graph: launching its several
    hundred kernels one by one would take longer than running them.
    """
    on_gpu = task.device.type == "cuda"
    padded = training.pad_for_crops(task.images.images, math.ceil(task.size * hparams.shift))
    # Here, as the compiler would not see that they are cached.
    mean, std = (training.channels(values, task.device) for values in (task.mean, task.std))

    def loss_of(batch: Tensor) -> Tensor:
        x, targets = augment(padded, batch, mirrored, task, hparams)
        x = x.sub_(mean).div_(std)
        with torch.autocast(task.device.type, torch.bfloat16, enabled=on_gpu):
            logits = network(x.to(memory_format=memory_format(task.device)))
        return F.cross_entropy(logits.float(), targets, label_smoothing=hparams.label_smoothing)

    (muon, _), (sgd, _) = optimizers
    compute_loss: Callable[[Tensor], Tensor] = loss_of
    update_kernels: Callable[[], Any] = muon.update
    if compiled:  # SGD is fused as it is
        compute_loss = torch.compile(loss_of, dynamic=False)
        update_kernels = torch.compile(muon.update, dynamic=False)

    def step(batch: Tensor) -> Tensor:
        loss = compute_loss(batch)
        loss.backward()
        update_kernels()
        sgd.step()
        network.zero_grad()
        return loss.detach()

    if not on_gpu:
        return step
    network.train()
    return capture(step, torch.randperm(len(task.images), device=task.device)[:batch_size])


def augment(
    padded: Tensor, batch: Tensor, mirrored: Tensor, task: Task, hparams: HParams
) -> tuple[Tensor, Tensor]:
    """Crop, flip, colour, mix: images `[N, 3, S, S]`, targets `[N, classes]`.

    Pixels are from 0 to 1, and beyond that if `colour`: not cut off, as the network has no use for
    the limits.
    """
    x = training.crop_and_flip(padded, batch, task.size, mirrored).float().div_(255)
    if hparams.colour:
        x = training.random_colour(x, hparams.colour)
    targets = F.one_hot(data.labels_of(task.images)[batch], len(task.images.classes)).float()
    if hparams.cutmix:
        weights = training.mixing_weights(len(batch), task.size, 0.0, hparams.cutmix, task.device)
        x, targets = training.mix(x, targets, weights)
    return x, targets


# --- a training in a worker -----------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all trainings of a run share."""

    dataset: str
    data_dir: Path | None
    image_size: int  # pixels, of an image folder
    train_images: int | None
    flip: bool
    max_params: int
    threads: int  # on a CPU
    seed: int
    train_seconds: float
    tolerance: float  # percent of the seconds
    device_name: str

    def load(self, split: str) -> data.ImageSet:
        number = self.train_images if split == "train" else None
        return data.load_images(
            self.dataset, split, self.data_dir, self.image_size, number, self.seed
        )


@functools.cache  # a worker trains several networks on the same images
def load_task(setting: Setting, final: bool, device: torch.device) -> tuple[Task, data.ImageSet]:
    """What networks learn, and the images that they are scored on.

    All training images and the test images if `final`, else the training images less the held-out
    ones, and those.
    """
    train_set = setting.load("train")
    if final:
        scored = setting.load(data.ACCURACY_SPLIT[setting.dataset])
    else:
        train_set, scored = data.hold_out(train_set, HELD_OUT)
    return make_task(train_set, setting.flip, device), data.to_device(scored, device)


def run_training(
    setting: Setting,
    hparams: HParams,
    seed: int,
    final: bool,
    compiled: bool,
    save_as: Path | None,
    device: torch.device,
) -> tuple[float, dict[str, Any], str]:
    """Train once, then look once at the images that the network is scored on.

    Not even that if the seconds are off, as that training does not count. The weights are rounded
    to fp16 first, so that the accuracy is that of a saved network.

    Returns:
        Top-1 in percent, columns of the training's row, and why it does not count, or nothing. If
        it does not, top-1 is not a number.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    gc.collect()  # an earlier training's memory
    torch.cuda.empty_cache()
    prepare_backend(device, setting.threads, benchmark=compiled)
    task, scored = load_task(setting, final, device)
    network = start_network(hparams, len(scored.classes), task, seed)
    done = train(network, hparams, task, setting.train_seconds, compiled)
    if not math.isfinite(done.loss):
        raise FloatingPointError(f"the loss is {done.loss} after {done.steps} steps")
    columns: dict[str, Any] = {
        "parameters": count_parameters(hparams, len(scored.classes)),
        "steps": done.steps,
        "epochs": round(done.steps * min(1, hparams.batch_size / len(task.images)), 2),
        "train_seconds": round(done.train_seconds, 2),
        "setup_seconds": round(done.setup_seconds, 2),
        "final_loss": round(done.loss, 4),
        "train_images": len(task.images),
        "num_images": len(scored),
        "compiled": compiled,
        "device": setting.device_name,
    }
    if abs(done.train_seconds / setting.train_seconds - 1) > setting.tolerance / 100:
        why = f"{done.train_seconds:.2f} s of training, not {setting.train_seconds:g}"
        return math.nan, columns, why
    models.round_to_half(network)
    top1, top5 = evaluation.accuracy(network.eval(), scored, task.preprocessing)
    columns["top5_percent" if final else "held_out_top5_percent"] = top5
    if save_as:
        about = {
            "architecture": architecture_of(hparams, len(scored.classes)),
            "top1": round(top1, 2),
            "hyperparameters": asdict(hparams),
            "training": {"seed": seed} | columns,
        }
        models.write_checkpoint(save_as, network, task.preprocessing, scored, about)
    return top1, columns, ""


# --- the three studies: search, finalists, final --------------------------------------------------

ABOUT = ["study", "trial", "configuration", "seed", "status", "reason", "retry_of"]
DONE = ["parameters", "steps", "epochs", "train_seconds", "setup_seconds", "final_loss"]
DONE += ["train_images", "num_images", "compiled", "device", "started", "hparams"]
SHOWN = {  # of summary.csv: its header and format on the screen
    "configuration": ("configuration", "s"),
    "stage": ("stage", "s"),
    "trainings": ("n", "d"),
    "top1_percent_mean": ("top-1, %", ".2f"),
    "top1_percent_sd": ("sd", ".2f"),
    "difference_points": ("change", "+.2f"),
    "difference_low_points": ("from", "+.2f"),
    "difference_high_points": ("to", "+.2f"),
    "train_seconds_mean": ("s", ".1f"),
    "steps_mean": ("steps", ".0f"),
    "parameters": ("parameters", "d"),
}
TRIAL_COLUMNS = [*ABOUT, "held_out_top1_percent", "held_out_top5_percent", *DONE]
COLUMNS = {  # of each CSV file
    "trials": TRIAL_COLUMNS,
    "finalists": TRIAL_COLUMNS,
    "final": [*ABOUT, "top1_percent", "top5_percent", *DONE],
    "summary": [*SHOWN, "top1_percent_low", "top1_percent_high"],
    "importances": ["hyperparameter", "importance", "complete_trials"],
}


@dataclass(frozen=True)
class Tuning:
    """What the stages share."""

    setting: Setting
    pool: study.WorkerPool
    folder: Path
    default: HParams
    space: Space
    num_classes: int
    compiled: bool  # finalists and final networks
    search: optuna.Study
    finalists: optuna.Study
    final: optuna.Study
    dead_after_s: float  # a trial of another machine; 0 if there can be none


def run_search(tuning: Tuning, trials: int, sampler: str, start: list[dict[str, Any]]) -> None:
    """Compare configurations: first the default, then those of `start`, then the sampler's."""
    search, shared = tuning.search, tuning.dead_after_s > 0
    begun = search.get_trials(deepcopy=False)
    search.sampler = study.make_sampler(sampler, tuning.setting.seed, len(begun), shared)
    for params in [asdict(tuning.default), *start]:
        search.enqueue_trial(params, skip_if_exists=True)
    if start and study.left(search, trials) <= 0:
        print("note: --start is not used: the search has all its --trials")
    work_off(tuning, search, trials)


def run_finalists(tuning: Tuning, number: int, seeds: int) -> None:
    """Train the default and the best configurations with new seeds.

    The best of many trials owes something to luck: the value that chose it does not count again.

    Raises:
        UserError: there was no search.
    """
    if not study.finished(tuning.search):
        raise cli.UserError(f"{tuning.folder.name} has no trials yet: --stage search first")
    study.queue(tuning.finalists, missing_finalists(tuning, number, seeds))
    work_off(tuning, tuning.finalists)


def missing_finalists(tuning: Tuning, number: int, seeds: int) -> list[study.Row]:
    """Trainings to queue, of the default and the best of the search; none without a search."""
    configurations = {"default": asdict(tuning.default)}
    for trial in study.best_trials(tuning.search):
        hparams = trial.user_attrs["hparams"]
        if len(configurations) <= number and hparams not in configurations.values():
            configurations[trial.user_attrs["configuration"]] = hparams
    if len(configurations) == 1:
        return []
    first = FINALIST_SEEDS + tuning.setting.seed
    return study.missing(tuning.finalists, configurations, range(first, first + seeds))


def run_final(tuning: Tuning, repeats: int) -> None:
    """Train default and winner on all training images, then look at the test images.

    Raises:
        UserError: finalists are still to train, perhaps on another machine.
    """
    if study.unfinished(tuning.finalists):
        raise cli.UserError(
            f"the finalists of {tuning.folder.name} are not all trained: wait for the machines "
            "that train them, or go on with --stage all"
        )
    chosen = choose_final(tuning)
    if "best" in chosen:
        ends = near_ends(HParams(**chosen["best"]), tuning.space)
        print(f"the winner's near an end of their range: {', '.join(ends) or 'none'}")
    elif study.finished(tuning.finalists):
        print("no finalist is better than the default: it is trained alone")
    else:
        print("there are no finalists: the default is trained alone")
    study.queue(tuning.final, missing_final(tuning, repeats))
    work_off(tuning, tuning.final)
    best = network_path(tuning, "best")  # perhaps an earlier winner's; Part 3 takes what it finds
    if study.finished(tuning.finalists) and not is_saved(tuning, "best", chosen.get("best")):
        best.unlink(missing_ok=True)
        best.with_suffix(".json").unlink(missing_ok=True)


def missing_final(tuning: Tuning, repeats: int) -> list[study.Row]:
    """Trainings to queue, of the default and the winner; also those whose network is lost."""
    chosen, first = choose_final(tuning), tuning.setting.seed
    lost = [(name, first) for name in chosen if not is_saved(tuning, name, chosen[name])]
    if tuning.dead_after_s:  # a network that is not here may be on the machine that trained it
        lost = []
    return study.missing(tuning.final, chosen, range(first, first + repeats), lost)


def network_path(tuning: Tuning, configuration: str) -> Path:
    return tuning.folder / f"{configuration}.safetensors"


def is_saved(tuning: Tuning, configuration: str, hparams: dict[str, Any] | None) -> bool:
    """Whether the network of that name has these hyperparameters, by its card."""
    path = network_path(tuning, configuration)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        card = json.loads(path.with_suffix(".json").read_text())
        return path.exists() and card["hyperparameters"] == hparams
    return False


def choose_final(tuning: Tuning) -> dict[str, dict[str, Any]]:
    """The default and, if another finalist has a higher mean, that as `best`.

    One that lacks more than half of the seeds does not count.
    """
    rows = study.rows_of(tuning.finalists, "held_out_top1_percent")
    means = study.summarize(rows, "held_out_top1_percent")
    most = max((row["trainings"] for row in means), default=0)
    means = [row for row in means if 2 * row["trainings"] >= most]
    chosen = {"default": asdict(tuning.default)}
    if means and not study.unfinished(tuning.finalists):
        winner = max(means, key=lambda row: row["top1_percent_mean"])["configuration"]
        if winner != "default":
            hparams = {row["configuration"]: row["hparams"] for row in rows}
            chosen["best"] = json.loads(hparams[winner])
    return chosen


def job_of(tuning: Tuning, part: optuna.Study, trial: optuna.Trial) -> study.Job | None:
    """The training that a trial stands for; None if another machine had emptied the queue."""
    if part is tuning.search:
        describe(tuning, trial)
    setting, asked, final = tuning.setting, trial.user_attrs, part is tuning.final
    if "hparams" not in asked:
        return None
    # The first seed's, whatever its accuracy: the best of several would flatter.
    keep = final and asked["seed"] == setting.seed
    save_as = network_path(tuning, asked["configuration"]) if keep else None
    compiled = tuning.compiled and part is not tuning.search
    hparams = HParams(**asked["hparams"])
    return run_training, (setting, hparams, asked["seed"], final, compiled, save_as)


def describe(tuning: Tuning, trial: optuna.Trial) -> None:
    """Note what a trial of the search trains: what was chosen, less what is too large.

    A retry keeps its seed and its name.
    """
    hparams = repair(HParams(**trial.params), tuning.num_classes, tuning.setting.max_params)
    name = "default" if hparams == tuning.default else f"trial {trial.number}"
    seed = tuning.setting.seed + trial.number
    asked = {"configuration": name, "hparams": asdict(hparams), "seed": seed}
    for key, value in (asked | trial.user_attrs).items():
        trial.set_user_attr(key, value)


def work_off(tuning: Tuning, part: optuna.Study, total: int | None = None) -> None:
    """See `study.work_off`; the tables are written after every training."""
    job = functools.partial(job_of, tuning, part)
    changed = functools.partial(write_tables, tuning)
    space = tuning.space if part is tuning.search else {}
    study.work_off(part, tuning.pool, space, job, changed, total, tuning.dead_after_s)


def write_tables(tuning: Tuning) -> dict[str, list[study.Row]]:
    """Write the tables that have rows; return the rows, of final those of default and winner."""
    held_out, chosen = "held_out_top1_percent", choose_final(tuning).values()
    finalists = study.rows_of(tuning.finalists, held_out)
    final = study.rows_of(tuning.final, "top1_percent")
    final = [row for row in final if json.loads(row["hparams"]) in chosen]
    tables = {
        "trials": study.rows_of(tuning.search, held_out),
        "finalists": finalists,
        "final": final,
        "summary": study.summarize(finalists, held_out, stage="finalists")
        + study.summarize(final, "top1_percent", stage="final"),
        "importances": study.importance_rows(tuning.search),
    }
    for name, rows in tables.items():
        if rows:
            results.write_csv(tuning.folder / f"{name}.csv", rows, COLUMNS[name])
    return tables


def report(tuning: Tuning) -> int:
    """Write, draw and print what there is; exit code 1 if a finalist's or a final training failed.

    One that is unavailable, as where memory does not suffice, is only named. What is not done by
    this run may have been by another, on this or another machine.
    """
    rows = write_tables(tuning)
    if rows["trials"]:
        figures.draw_study(rows["trials"], tuning.folder / "trials.png")
    if rows["final"]:
        figures.draw_final(rows["final"], tuning.folder / "final.png")
    results.print_table(rows["summary"], SHOWN)
    print(tuning.folder)
    bad = [r for r in rows["finalists"] + rows["final"] if r["status"] not in ("ok", "retried")]
    for row in bad:
        print(f"{row['study']}, {row['configuration']}, seed {row['seed']}: {row['reason']}")
    if rows["trials"] and all(row["status"] != "ok" for row in rows["trials"]):
        print(f"no trial succeeded: {rows['trials'][-1]['reason']}")
        return 1
    return int(any(row["status"] == "failed" for row in bad))


# --- the command line -----------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `--quick` changes the defaults, and explicit flags still win."""
    parser = cli.Parser(__doc__)
    add, number, seconds = parser.add_argument, cli.positive_int, cli.positive_float
    boolean, threads = argparse.BooleanOptionalAction, torch.get_num_threads()
    stages = ["search", "finalists", "final"]
    add("--stage", choices=[*stages, "all"], default="all", help="what to do")
    add("--train-seconds", type=seconds, help="of each training; 60 on a GPU, 120 on a CPU")
    add("--trials", type=number, help="of the search, all its runs; 48 on a GPU, 16 on a CPU")
    add("--sampler", choices=study.SAMPLERS, default="gp", help="how configurations are chosen")
    add("--start", help="CSV with hparams to begin with: a study's trials (its best 8), or any 8")
    add("--finalists", type=number, default=3, help="best trials that are compared once more")
    add("--finalist-seeds", type=number, default=4, help="trainings of each of them")
    add("--repeats", type=number, default=5, help="final trainings of default and winner, each")
    add("--tolerance", type=seconds, default=5.0, help="percent that the seconds may be off")
    add("--dataset", default="cifar100", help=data.DATASETS_HELP)
    add("--data-dir", type=Path, help="folder of the data set; data/<dataset> if not given")
    add("--image-size", type=number, default=32, help="of --dataset folder, in pixels")
    add("--train-images", type=number, help="how many to learn from; all if not given")
    add("--flip", action=boolean, help="mirror images left-right; if not given, all but digits")
    add("--max-params", type=number, default=5_000_000, help="parameters at most")
    add("--storage", help="journal file or database URL; study.journal in --output-dir")
    add("--study-name", help="and folder; <dataset>-<seconds>s-<sampler> if not given")
    add("--compile", action=boolean, default=True, help="all but the search, on a GPU")
    devices = ("auto", "cpu", "cuda")
    add("--device", choices=devices, default="auto", help="where to train; cuda: on all GPUs")
    add("--threads", type=number, default=threads, help="CPU threads")
    add("--seed", type=cli.seed, default=0, help="of the search and of the first final training")
    add("--output-dir", type=Path, default=Path("results/part2"), help="folder for all results")
    args = cli.parse_quick(parser, argv, QUICK)
    args.stages = stages if args.stage == "all" else [args.stage]
    args.device = cli.pick_device(args.device)
    usual_seconds, usual_trials = BUDGETS[args.device.type]
    args.train_seconds = args.train_seconds or usual_seconds
    args.trials = args.trials or usual_trials
    args.flip = args.dataset != "digits" if args.flip is None else args.flip
    if args.study_name is None:
        args.study_name = f"{args.dataset}-{args.train_seconds:g}s-{args.sampler}"
    args.storage = args.storage or str(args.output_dir / "study.journal")
    return args


def load_checked(setting: Setting) -> tuple[data.ImageSet, str]:
    """The training images, and a digest of them and the test images with their labels.

    Raises:
        UserError: they do not suffice.
    """
    images, test = (setting.load(s) for s in ("train", data.ACCURACY_SPLIT[setting.dataset]))
    height, width = images.images.shape[-2:]
    if len(images.classes) < 2 or width < 8 or height != width:
        raise cli.UserError(
            f"{setting.dataset}: {len(images.classes)} classes of {height}x{width} pixels; give "
            "images of at least two classes, square and of at least 8 pixels"
        )
    data.hold_out(images, HELD_OUT)
    content = hashlib.sha256()
    for part in (images, test):
        content.update(part.images.numpy().data)
        content.update(data.labels_of(part).numpy().data)
    return images, content.hexdigest()[:12]


def open_tuning(
    args: argparse.Namespace,
    setting: Setting,
    images: data.ImageSet,
    pixels: str,
    storage: optuna.storages.BaseStorage,
    pool: study.WorkerPool,
) -> Tuning:
    """Open or create the three studies; UserError if they were made with another setting."""
    space, name = search_space(len(images)), args.study_name
    default = HParams(batch_size=2 * smallest_batch(len(images)))
    kept = ("dataset", "flip", "max_params", "seed", "train_seconds", "device_name")
    about = {key: getattr(setting, key) for key in kept} | {"images": pixels}
    about |= {"classes": digest(images.classes), "search_space": digest(map(str, space.items()))}
    compiled = {"compiled": args.compile and args.device.type == "cuda"}
    # Twice what two trainings may take, one queued behind the other, with minutes of setup each: to
    # wait costs less than to train what is not lost.
    dead_after_s = 4 * (setting.train_seconds + 300)
    return Tuning(
        setting=setting,
        pool=pool,
        folder=cli.make_output_dir(args.output_dir / name),
        default=repair(default, len(images.classes), setting.max_params),
        space=space,
        num_classes=len(images.classes),
        compiled=compiled["compiled"],
        search=study.open_study(storage, name, about | {"sampler": args.sampler}),
        finalists=study.open_study(storage, f"{name}-finalists", about | compiled),
        final=study.open_study(storage, f"{name}-final", about | compiled),
        dead_after_s=dead_after_s if study.is_shared(args.storage) else 0.0,
    )


def digest(texts: Iterable[str]) -> str:
    """A short fingerprint of texts, in their order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def announce(tuning: Tuning, args: argparse.Namespace, devices: int) -> int:
    """Say what the run will cost, less what is there already; the number of trainings.

    A stage whose configurations may change before it begins is counted whole.
    """
    costs: dict[str, int] = {}
    if "search" in args.stages:
        costs["search"] = max(0, args.trials - len(study.finished(tuning.search)))
    if "finalists" in args.stages:
        new = len(missing_finalists(tuning, args.finalists, args.finalist_seeds))
        if costs.get("search"):
            new = (args.finalists + 1) * args.finalist_seeds
        costs["finalists"] = len(study.unfinished(tuning.finalists)) + new
    if "final" in args.stages:
        new = 2 * args.repeats if any(costs.values()) else len(missing_final(tuning, args.repeats))
        costs["final"] = len(study.unfinished(tuning.final)) + new
    total, parts = sum(costs.values()), ", ".join(f"{n} {stage}" for stage, n in costs.items())
    print(
        f"at most {total} trainings of {args.train_seconds:g} s ({parts}), {devices} at a time: "
        f"{total * args.train_seconds / devices / 60:.0f} minutes, and the setup of each"
    )
    return total


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Search, compare finalists, train default and winner, report."""
    args = parse_args(argv)
    cli.check_threads([args.threads])
    cli.check_name(args.dataset, data.DATASETS, "data set")
    taken = args.study_name.endswith(("-finalists", "-final"))  # the other stages' studies
    if args.study_name in ("", "..") or Path(args.study_name).name != args.study_name or taken:
        remedy = "choose a name without slashes that does not end in -final or -finalists"
        raise cli.UserError(f"--study-name {args.study_name!r}: {remedy}")
    if args.start and "search" not in args.stages:
        raise cli.UserError(f"--start {args.start}: --stage {args.stage} has no use for it")
    environment = results.environment(threads=args.threads)
    args.device_name = f"{environment['cpu']}, {args.threads} threads"
    if args.device.type == "cuda":
        args.device_name = environment["gpu"]
    setting = Setting(**{field.name: getattr(args, field.name) for field in fields(Setting)})
    images, pixels = load_checked(setting)
    gpus = torch.cuda.device_count() if args.device.type == "cuda" else 0
    devices = [torch.device("cuda", i) for i in range(gpus)] or [args.device]
    cli.make_output_dir(args.output_dir)  # the journal's, unless --storage is elsewhere
    # On a CPU a sampler at work would take the time of a training.
    with study.opened(args.storage) as storage, study.WorkerPool(devices, ahead=bool(gpus)) as pool:
        tuning = open_tuning(args, setting, images, pixels, storage, pool)
        start = read_start(args.start, tuning.space) if args.start else []
        if not study.is_shared(args.storage):
            results.written.append(Path(args.storage))  # for the line after a Ctrl-C
        if announce(tuning, args, len(devices)):
            results.write_json(tuning.folder / "environment.json", environment)
        if "search" in args.stages:
            run_search(tuning, args.trials, args.sampler, start)
        if "finalists" in args.stages:
            run_finalists(tuning, args.finalists, args.finalist_seeds)
        if "final" in args.stages:
            run_final(tuning, args.repeats)
        return report(tuning)


if __name__ == "__main__":
    sys.exit(main())
