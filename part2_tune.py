"""Part 2: tune a small convolutional network for CIFAR-100, then train the best configuration.

Optuna compares configurations on a held-out tenth of the training images, in short trainings; the
best few are trained again at full length, and the best of those is the best configuration. Then the
default and the best configuration, or presets, are trained on all training images with several
seeds; the test images are looked at once for each trained network.

    python part2_tune.py                                   # study, then final trainings
    python part2_tune.py --quick                           # under a minute, offline: digits
    python part2_tune.py --workers 4 --trials 200          # continues the study with 4 processes
    python part2_tune.py --stage final --configurations deep,fast --study-name presets
    python part2_tune.py --sampler random --study-name random         # the sampler's yardstick
    python part2_tune.py --dataset folder --data-dir my/images        # your own classes
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import optuna
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from utils import augmentation, cli, data, evaluation, models, results, study, tuning_report
from utils.isolation import run_jobs
from utils.training import (
    Muon,
    capture,
    memory_format,
    prepare_backend,
    warmup_cosine,
    whitening_kernels,
)

HELD_OUT = 0.1  # share of the training images on which configurations are compared
STUDY_NAME = "smallcnn"
QUICK = {
    "dataset": "digits",
    "device": "cpu",
    "study_name": "quick",
    "trials": 8,
    "workers": 2,
    "tune_epochs": 4,
    "finalists": 2,
    "final_epochs": 8,
    "repeats": 2,
    "max_params": 150_000,
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
    dropout: float = 0.0  # of the features before the classifier
    optimizer: str = "muon"
    learning_rate: float = 1.0  # peak, as a multiple of all usual ones
    batch_size: int = 512  # images
    cutmix: float = 0.5  # share of the images that take a square from another
    colour: float = 0.0  # largest relative change of brightness, contrast and saturation
    shift: float = 1 / 8  # largest shift of an image, as a share of its side, rounded up
    alternate: bool = False  # mirror an image in every other epoch, not at random; needs --flip
    label_smoothing: float = 0.1
    rate_beside_muon: float = 0.2  # usual peak rate of what Muon leaves to SGD, as in PEAK_RATES
    small_share: float = 0.0  # share of the steps, the first, that see smaller images: see shrink
    averaging: float = 0.0  # of the weights: the average's time constant, a share of the steps


# Known to work with batches of 512; rates grow with the root of the batch, and learning_rate
# multiplies them. Muon serves the kernels of the inner convolutions, SGD whatever else it trains.
PEAK_RATES = {"sgd": 0.8, "adamw": 4e-3, "muon": 0.06}
REFERENCE_BATCH = 512
WEIGHT_DECAYS = {"sgd": 5e-4, "adamw": 0.05, "muon": 5e-4}
WARMUP = 0.2  # share of the steps

# A short training wants high rates, little that makes its images harder, small images first, labels
# that are smoothed more, and pooling instead of strides.
SHORT = HParams(
    pool=True,
    learning_rate=1.5,
    cutmix=0.0,
    shift=1 / 16,
    alternate=True,
    label_smoothing=0.2,
    rate_beside_muon=0.4,
    small_share=0.5,
    averaging=0.08,
)
# Beside "tuned", the best configuration of a study.
PRESETS = {
    "default": HParams(),
    # The most accurate found for 5 M parameters and three minutes: more blocks at high resolution,
    # and images that differ more.
    "deep": HParams(depth1=3, depth2=6, depth3=2, cutmix=0.7, colour=0.3, averaging=0.05),
    # No block at full resolution, where it costs most.
    "fast": replace(SHORT, depth1=0, depth2=1, depth3=2),
    # More than --max-params allows unless it is raised to 9 M.
    "sprint": replace(
        SHORT,
        width=128,
        depth1=1,
        depth2=1,
        depth3=1,
        whiten=True,
        learning_rate=2.0,
        batch_size=1024,
    ),
}
# A minute, three minutes, 8 s and 4 s of training on an H100.
FINAL_EPOCHS = {"default": 80, "tuned": 80, "deep": 145, "fast": 21, "sprint": 12}


def suggest(trial: optuna.trial.BaseTrial, batch_sizes: Sequence[int]) -> HParams:
    """The search space.

    A trial is several times shorter than the final training, which wants more regularisation: so
    CutMix and dropout are searched near their usual values, and the rest stays as it is.
    """
    return HParams(
        width=trial.suggest_int("width", 48, 96, step=16),
        depth1=trial.suggest_int("depth1", 0, 2),
        depth2=trial.suggest_int("depth2", 1, 3),
        depth3=trial.suggest_int("depth3", 1, 3),
        dropout=trial.suggest_float("dropout", 0.0, 0.2),
        optimizer=trial.suggest_categorical("optimizer", list(PEAK_RATES)),
        learning_rate=trial.suggest_float("learning_rate", 0.2, 2.5, log=True),
        batch_size=trial.suggest_categorical("batch_size", list(batch_sizes)),
        cutmix=trial.suggest_float("cutmix", 0.3, 0.7),
    )


DEEPEST = HParams(depth1=2, depth2=3, depth3=3)  # of the search space


def search_space(batch_sizes: Sequence[int]) -> dict[str, optuna.distributions.BaseDistribution]:
    """The searched hyperparameters and their ranges."""
    trial = optuna.trial.FixedTrial(asdict(HParams(batch_size=batch_sizes[0])))
    suggest(trial, batch_sizes)
    return trial.distributions


def batch_sizes_for(num_images: int) -> list[int]:
    """Three powers of two that give a few hundred to a few dozen steps an epoch."""
    smallest = 2 ** max(5, int(math.log2(max(1, num_images / 150))))
    return [smallest, 2 * smallest, 4 * smallest]


def preset(name: str, images: data.ImageSet, max_params: int) -> HParams:
    """The preset for these training images: fewer want smaller batches."""
    batch_size = PRESETS[name].batch_size * batch_sizes_for(len(images))[1] // REFERENCE_BATCH
    hparams = replace(PRESETS[name], batch_size=batch_size)
    return fit_width(hparams, len(images.classes), max_params)


def fit_width(hparams: HParams, num_classes: int, max_params: int) -> HParams:
    """The same configuration, no wider than `max_params` allows; UserError if none is so small."""
    for width in (hparams.width, *range((hparams.width - 1) // 8 * 8, 0, -8)):
        narrower = replace(hparams, width=width)
        if count_parameters(narrower, num_classes) <= max_params:
            return narrower
    least = count_parameters(narrower, num_classes)
    raise cli.UserError(
        f"--max-params {max_params}: the narrowest such network has {least} parameters; raise it"
    )


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
        dropout: float,
        num_classes: int,
        pool: bool = False,
        whiten: bool = False,
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
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x).mean((2, 3))))


def architecture_of(hparams: HParams, num_classes: int) -> dict[str, Any]:
    """The arguments of SmallCNN."""
    depths = [hparams.depth1, hparams.depth2, hparams.depth3]
    shape = {"width": hparams.width, "depths": depths, "dropout": hparams.dropout}
    return shape | {"num_classes": num_classes, "pool": hparams.pool, "whiten": hparams.whiten}


def count_parameters(hparams: HParams, num_classes: int) -> int:
    with torch.device("meta"):  # shapes without memory
        network = SmallCNN(**architecture_of(hparams, num_classes))
    return sum(p.numel() for p in network.parameters())


def load_checkpoint(path: Path) -> models.LoadedModel:
    """Load the network that this script saved as `path`, with its card beside it.

    Raises:
        UserError: missing, damaged or foreign files.
    """
    return models.load_checkpoint(path, SmallCNN, "python part2_tune.py")


# --- training: one loop for trials and final networks ---------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a network learns: images and labels on the device, and how they may be distorted."""

    images: data.ImageSet
    mean: tuple[float, ...]  # per channel, on the 0-1 scale
    std: tuple[float, ...]
    flip: bool  # mirror half of the images left-right

    @property
    def size(self) -> int:
        return self.images.images.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.images.images.device

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation on the device, `[1, 3, 1, 1]` each, to normalise with."""
        mean, std = (augmentation.channels(values, self.device) for values in (self.mean, self.std))
        return mean, std


@dataclass(frozen=True)
class Epoch:
    """An epoch that is over."""

    epoch: int  # counted from 1
    loss: float  # mean of its steps
    seconds: float  # of training since the start, without evaluations between epochs
    # Before the first step: resizing and padding of all images, a whitening convolution, choice of
    # kernels, compilation, recording.
    setup_seconds: float


def make_task(images: data.ImageSet, flip: bool, device: torch.device) -> Task:
    """Move the images to the device and measure their channels' mean and deviation."""
    return Task(data.to_device(images, device), *data.channel_statistics(images), flip)


def shrink(task: Task) -> Task:
    """The same task with images of 3/4 the size, rounded down to a multiple of 8, at least 8."""
    size = max(8, task.size * 3 // 32 * 8)
    small = augmentation.resize(task.images.images, size)
    return replace(task, images=replace(task.images, images=small))


def choose_mirrored(mirrored: Tensor, epoch: int, alternate: bool) -> None:
    """Set the flags, bool `[N]`, of a random half, or of what the epoch before did not mirror."""
    if alternate and epoch > 0:
        mirrored.logical_not_()
    else:
        mirrored.copy_(torch.rand(len(mirrored), device=mirrored.device) < 0.5)


def set_whitening(network: SmallCNN, task: Task) -> None:
    """Let the first convolution decorrelate 3x3 patches of up to a thousand of the images."""
    some = task.images.images[:: math.ceil(len(task.images) / 1000)]
    x = augmentation.normalize(some.float().div_(255), *task.statistics)
    convolution = network.features[0]
    assert isinstance(convolution, nn.Conv2d)
    convolution.weight.copy_(whitening_kernels(x, WHITE_CHANNELS // 2))


def train(
    network: SmallCNN, hparams: HParams, task: Task, epochs: int, compiled: bool = False
) -> Iterator[Epoch]:
    """Train in place under a one-cycle schedule and yield after every epoch.

    Weights, shuffling and augmentation follow PyTorch's global seed; on a GPU some kernels still
    add in varying order, so that two runs differ a little. If `averaging`, an exponential average
    of the weights and running statistics takes their place after the last epoch. A loss that is not
    finite is yielded as it is: the caller decides.
    """
    clock = time.perf_counter()
    hparams = replace(hparams, batch_size=min(hparams.batch_size, len(task.images)))
    if compiled:
        torch.compiler.reset()  # graphs of earlier trainings count towards recompile_limit
    if hparams.whiten:
        set_whitening(network, task)
    optimizers = make_optimizers(network, hparams)
    mirrored = torch.zeros(len(task.images), dtype=torch.bool, device=task.device)
    step = whole_step = make_step(network, optimizers, hparams, task, mirrored, compiled)
    if hparams.small_share and (small := shrink(task)).size < task.size:
        step = make_step(network, optimizers, hparams, small, mirrored, compiled)
    steps = len(task.images) // hparams.batch_size
    if hparams.averaging:
        weights = [t for t in network.state_dict().values() if t.is_floating_point()]
        averages = [t.clone() for t in weights]
        renewed = 1 / max(1.0, hparams.averaging * epochs * steps)
    setup_seconds, seconds = time.perf_counter() - clock, 0.0
    for epoch in range(epochs):
        clock = time.perf_counter()
        network.train()
        if task.flip:
            choose_mirrored(mirrored, epoch, hparams.alternate)
        batches = torch.randperm(len(task.images), device=task.device).split(hparams.batch_size)
        losses = torch.zeros((), device=task.device)
        for i, batch in enumerate(batches[:steps], start=epoch * steps):
            for optimizer, peak in optimizers:
                rate = warmup_cosine(i, epochs * steps, WARMUP * epochs * steps, peak)
                for group in optimizer.param_groups:
                    group["lr"].fill_(rate)
            if i >= hparams.small_share * epochs * steps:
                step = whole_step
            losses += step(batch)
            if hparams.averaging:
                torch._foreach_lerp_(averages, weights, renewed)
        if hparams.averaging and epoch == epochs - 1:
            torch._foreach_copy_(weights, averages)
        loss = float(losses) / steps  # waits for the device
        seconds += time.perf_counter() - clock
        yield Epoch(epoch + 1, loss, seconds, setup_seconds)


def make_optimizers(
    network: SmallCNN, hparams: HParams
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each optimiser with its peak learning rate; the rates are tensors, for CUDA graphs.

    Weight decay acts on kernels and matrices, not on normalisations and biases.
    """
    device = network.head.weight.device
    on_gpu = device.type == "cuda"
    kernels = [p for p in network.parameters() if p.ndim == 4 and p.requires_grad]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    multiple = hparams.learning_rate * (hparams.batch_size / REFERENCE_BATCH) ** 0.5
    peak = multiple * PEAK_RATES[hparams.optimizer]
    rate = torch.zeros((), device=device)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = []
    if hparams.optimizer == "muon":
        inner = kernels if hparams.whiten else kernels[1:]
        optimizers.append((Muon(inner, rate, momentum=0.9), peak))
        kernels, rate = kernels[: len(kernels) - len(inner)], torch.zeros((), device=device)
        peak = multiple * hparams.rate_beside_muon
    decay = WEIGHT_DECAYS[hparams.optimizer]
    groups = [
        {"params": [*kernels, network.head.weight], "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    rest: torch.optim.Optimizer
    if hparams.optimizer == "adamw":
        rest = torch.optim.AdamW(groups, lr=rate, fused=on_gpu, capturable=on_gpu)
    else:
        rest = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, fused=on_gpu)
    return [*optimizers, (rest, peak)]


def make_step(
    network: SmallCNN,
    optimizers: Sequence[tuple[torch.optim.Optimizer, float]],
    hparams: HParams,
    task: Task,
    mirrored: Tensor,
    compiled: bool,
) -> Callable[[Tensor], Tensor]:
    """One optimisation step: indices of a batch `[batch_size]` -> its loss.

    `mirrored`, bool `[N]`, says which images are mirrored, and may be changed between steps.

    On a GPU the whole step, augmentation included, is one CUDA graph: launching its several
    hundred kernels one by one would take longer than running them.
    """
    on_gpu = task.device.type == "cuda"
    padded = augmentation.pad_for_crops(task.images.images, math.ceil(task.size * hparams.shift))
    statistics = task.statistics  # here, as the compiler would not see that they are cached

    def loss_of(batch: Tensor) -> Tensor:
        x, targets = augment(padded, batch, mirrored, task, hparams)
        x = augmentation.normalize(x, *statistics)
        with torch.autocast(task.device.type, torch.bfloat16, enabled=on_gpu):
            logits = network(x.to(memory_format=memory_format(task.device)))
        return F.cross_entropy(logits.float(), targets, label_smoothing=hparams.label_smoothing)

    compute_loss: Callable[[Tensor], Tensor] = loss_of
    updates: list[Callable[[], Any]] = [optimizer.step for optimizer, _ in optimizers]
    if compiled:
        compute_loss = torch.compile(loss_of, dynamic=False)
        for i, (optimizer, _) in enumerate(optimizers):
            if isinstance(optimizer, Muon):  # the others are fused
                updates[i] = torch.compile(optimizer.update, dynamic=False)

    def step(batch: Tensor) -> Tensor:
        loss = compute_loss(batch)
        loss.backward()
        for update in updates:
            update()
        network.zero_grad()
        return loss.detach()

    if not on_gpu:
        return step
    network.train()
    example = torch.randperm(len(task.images), device=task.device)[: hparams.batch_size]
    return capture(step, example)


def augment(
    padded: Tensor, batch: Tensor, mirrored: Tensor, task: Task, hparams: HParams
) -> tuple[Tensor, Tensor]:
    """Crop, flip, colour, mix: images `[N, 3, S, S]`, targets `[N, classes]`.

    Pixels are from 0 to 1, and beyond that if `colour`: not cut off, as the network has no use for
    the limits.
    """
    x = augmentation.crop_and_flip(padded, batch, task.size, mirrored).float().div_(255)
    if hparams.colour:
        x = augmentation.random_colour(x, hparams.colour)
    targets = F.one_hot(data.labels_of(task.images)[batch], len(task.images.classes)).float()
    if hparams.cutmix:
        weights = augmentation.mixing_weights(
            len(batch), task.size, 0.0, hparams.cutmix, task.device
        )
        x, targets = augmentation.mix(x, targets, weights)
    return x, targets


@torch.no_grad()
def evaluate(network: nn.Module, images: data.ImageSet, task: Task, half: bool) -> dict[str, float]:
    """Top-1 and top-5 in percent, single view; in bf16 on a GPU if `half`, else in fp32."""
    layout, on_gpu = memory_format(task.device), task.device.type == "cuda"
    how = data.Preprocessing(task.size, task.mean, task.std)
    network.eval()
    with torch.autocast(task.device.type, torch.bfloat16, enabled=half and on_gpu):
        logits = evaluation.predict(
            lambda x: network(x.to(memory_format=layout)),
            images.images,
            how,
            min(1000, len(images)),
            task.device,
        )
    labels = data.labels_of(images).cpu()
    return {
        "top1_percent": evaluation.percent(logits.argmax(1) == labels),
        "top5_percent": evaluation.percent(evaluation.top_k_correct(logits, labels, 5)),
    }


def start_network(hparams: HParams, num_classes: int, device: torch.device, seed: int) -> SmallCNN:
    """A network with fresh weights on the device; everything random after it follows the seed."""
    cli.seed_everything(seed)
    network = SmallCNN(**architecture_of(hparams, num_classes))
    return network.to(device).to(memory_format=memory_format(device))


# --- the study ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all trainings of a run share."""

    study_name: str
    dataset: str
    data_dir: Path | None
    image_size: int  # pixels, of an image folder
    train_images: int | None
    flip: bool
    max_params: int
    threads: int  # on a CPU
    seed: int

    def load(self, split: str) -> data.ImageSet:
        number = self.train_images if split == "train" else None
        return data.load_images(
            self.dataset, split, self.data_dir, self.image_size, number, self.seed
        )


def make_objective(
    setting: Setting, epochs: int, device: torch.device
) -> Callable[[optuna.Trial], float]:
    """Load the images onto a worker's device; what is returned runs one trial."""
    # Each width has new shapes: trying kernels would take as long as a good part of the trial.
    prepare_backend(device, setting.threads, benchmark=False)
    return functools.partial(run_trial, setting, epochs, *load_task(setting, False, device))


@functools.cache  # a worker trains several networks on the same images
def load_task(setting: Setting, final: bool, device: torch.device) -> tuple[Task, data.ImageSet]:
    """What networks learn, and the images that judge them.

    In the final training all training images and the test images, before that the training images
    less the held-out ones, and those.
    """
    train_set = setting.load("train")
    if final:
        judges = setting.load(data.ACCURACY_SPLIT[setting.dataset])
    else:
        train_set, judges = data.hold_out(train_set, HELD_OUT)
    return make_task(train_set, setting.flip, device), data.to_device(judges, device)


def run_trial(
    setting: Setting, epochs: int, task: Task, held_out: data.ImageSet, trial: optuna.Trial
) -> float:
    """Train one configuration; its value is the top-1 of held-out images after the last epoch."""
    classes = len(held_out.classes)
    hparams = suggest(trial, batch_sizes_for(len(task.images) + len(held_out)))
    hparams = fit_width(hparams, classes, setting.max_params)
    trial.set_user_attr("hparams", asdict(hparams))
    trial.set_user_attr("parameters", count_parameters(hparams, classes))
    network = start_network(hparams, classes, task.device, setting.seed + trial.number)
    history: list[Epoch] = []
    try:
        for done in train(network, hparams, task, epochs):
            history.append(done)
            if not math.isfinite(done.loss):
                return math.nan
            top1 = evaluate(network, held_out, task, half=True)["top1_percent"]
            trial.report(top1, done.epoch)
            # The default configuration is the yardstick and runs to its end.
            may_prune = done.epoch < epochs and "default" not in trial.user_attrs
            if may_prune and trial.should_prune():
                raise optuna.TrialPruned
        return top1
    finally:
        trial.set_user_attr("history", [asdict(done) for done in history])


def describe_study(
    setting: Setting, images: data.ImageSet, epochs: int, sampler: str, pruner: str
) -> dict[str, Any]:
    """What a study must keep when it is continued, in JSON's types."""
    space = search_space(batch_sizes_for(len(images)))
    return {
        "dataset": setting.dataset,
        "classes": tuning_report.digest(images.classes),
        "images": len(images),
        "image_size": images.images.shape[-1],
        "flip": setting.flip,
        "max_params": setting.max_params,
        "seed": setting.seed,
        "epochs": epochs,
        "sampler": sampler,
        "pruner": pruner,
        "search_space": tuning_report.digest(map(str, space.items())),
    }


# --- trainings at full length: the finalists, then the final networks -----------------------------


def train_whole(
    setting: Setting,
    hparams: HParams,
    epochs: int,
    seed: int,
    final: bool,
    compiled: bool,
    device: torch.device,
) -> tuple[dict[str, Any], list[Epoch], models.Checkpoint]:
    """In a worker: train to the end, then look once at the images that judge the network.

    Returns columns of final.csv, the epochs, and what to save. The weights are rounded to fp16
    first, so that the accuracy is that of the saved network.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    # A finalist is trained but once: trying kernels would take longer than it saves.
    prepare_backend(device, setting.threads, benchmark=final)
    task, judges = load_task(setting, final, device)
    network = start_network(hparams, len(judges.classes), device, seed)
    history = []
    for done in train(network, hparams, task, epochs, compiled):
        if not math.isfinite(done.loss):
            raise FloatingPointError(f"the loss is {done.loss} in epoch {done.epoch}")
        history.append(done)
    state = models.round_to_half(network)
    columns = {
        "parameters": count_parameters(hparams, len(judges.classes)),
        "train_images": len(task.images),
        "train_seconds": round(history[-1].seconds, 2),
        "setup_seconds": round(history[-1].setup_seconds, 2),
        "final_loss": round(history[-1].loss, 4),
        "num_images": len(judges),
        **evaluate(network, judges, task, half=False),
    }
    how = data.Preprocessing(task.size, task.mean, task.std)
    architecture = architecture_of(hparams, len(judges.classes))
    checkpoint = models.Checkpoint(state, architecture, how, columns["top1_percent"])
    return columns, history, checkpoint


def train_side_by_side(
    jobs: Sequence[tuple[Any, ...]], device: torch.device, unit: str
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Run `train_whole` for every job on all GPUs at once, or on the CPU; results in their order.

    Yields the columns `status` and `reason`, and what `train_whole` returned or None.
    """
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    places = [torch.device("cuda", i) for i in range(gpus)] or [device]
    outcomes = run_jobs(train_whole, jobs, places)
    for failure, outcome in tqdm(outcomes, total=len(jobs), unit=unit, disable=None):
        yield {"status": "ok"} | failure, outcome


def run_finalists(
    setting: Setting,
    whole: optuna.Study,
    number: int,
    epochs: int,
    device: torch.device,
    output_dir: Path,
) -> list[dict[str, Any]]:
    """Train the best trials' configurations at full length; the best of them is the best.

    A trial is several times shorter, which favours whatever learns fast, and the best of many short
    trials owes something to luck. Returns rows of finalists.csv, none if there is no choice.
    """
    trials = tuning_report.best_trials(whole, number)
    if number < 2 or len(trials) < 2:
        (output_dir / "finalists.csv").unlink(missing_ok=True)
        tuning_report.write_best_trial(whole, output_dir)
        return []
    jobs = [
        (setting, HParams(**trial.user_attrs["hparams"]), epochs, setting.seed, False, False)
        for trial in trials
    ]
    rows: list[dict[str, Any]] = []
    outcomes = train_side_by_side(jobs, device, "finalist")
    for trial, (status, outcome) in zip(trials, outcomes, strict=True):
        row = {"study": setting.study_name, "trial": trial.number, **status}
        row |= {"trial_top1_percent": trial.value, "epochs": epochs}
        row["hparams"] = json.dumps(trial.user_attrs["hparams"])
        if outcome is not None:
            columns, _, _ = outcome
            row |= {name: columns[name] for name in ("parameters", "train_seconds")}
            row["held_out_top1_percent"] = columns["top1_percent"]
        rows.append(row)
        tuning_report.write_finalists(rows, trials[: len(rows)], whole, output_dir)
        shown = f"held-out top-1 {columns['top1_percent']:.2f} %" if outcome else row["reason"]
        tqdm.write(f"finalist {trial.number}: {shown}")
    return rows


def run_final(
    setting: Setting,
    configurations: dict[str, HParams],
    epochs: dict[str, int],
    repeats: int,
    compiled: bool,
    device: torch.device,
    environment: dict[str, Any],
    output_dir: Path,
) -> list[dict[str, Any]]:
    """Train every configuration with every seed; a row of final.csv each."""
    # The seed outside: an interrupted comparison is still a fair one.
    runs = [(setting.seed + i, name) for i in range(repeats) for name in configurations]
    jobs = [
        (setting, configurations[name], epochs[name], seed, True, compiled) for seed, name in runs
    ]
    rows: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []
    outcomes = train_side_by_side(jobs, device, "training")
    for (seed, name), (status, outcome) in zip(runs, outcomes, strict=True):
        about = {"study": setting.study_name, "configuration": name, "seed": seed}
        row = about | {"epochs": epochs[name], "compiled": compiled, **status}
        row["hparams"] = json.dumps(asdict(configurations[name]))
        if outcome is not None:
            columns, epochs_done, checkpoint = outcome
            row |= columns
            history += [about | asdict(done) for done in epochs_done]
        if not rows:
            results.write_json(output_dir / "final_environment.json", environment)
        rows.append(row)
        tuning_report.write_final(rows, history, output_dir)
        # The first seed's, whatever its accuracy: the best of several would flatter.
        if outcome is not None and name == "tuned" and seed == setting.seed:
            save_network(output_dir / "best.safetensors", checkpoint, setting, row, device)
        shown = f"top-1 {row['top1_percent']:.2f} %" if outcome else row["reason"]
        tqdm.write(f"{name}, seed {seed}: {shown}")
    return rows


def save_network(
    path: Path,
    checkpoint: models.Checkpoint,
    setting: Setting,
    row: dict[str, Any],
    device: torch.device,
) -> None:
    """Write the weights and a card that says how they came about."""
    test_set = setting.load(data.ACCURACY_SPLIT[setting.dataset])
    network = SmallCNN(**checkpoint.architecture)
    about = {key: row[key] for key in ("seed", "epochs", "train_images", "train_seconds")}
    hparams = json.loads(row["hparams"])
    facts = {"hyperparameters": hparams, "training": about}
    models.write_checkpoint(path, checkpoint, network, test_set, facts, device)


# --- the command line -----------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `--quick` changes the defaults, and explicit flags still win."""
    parser = cli.Parser(__doc__)
    add, number, boolean = parser.add_argument, cli.positive_int, argparse.BooleanOptionalAction
    stages, threads = ("tune", "final", "all"), torch.get_num_threads()
    add("--stage", choices=stages, default="all", help="study, final trainings, or both in turn")
    add("--dataset", default="cifar100", help=f"one of {', '.join(data.DATASETS)}")
    add("--data-dir", type=Path, help="folder of the data set; data/<dataset> if not given")
    add("--image-size", type=number, default=32, help="of --dataset folder, in pixels")
    add("--train-images", type=number, help="how many to learn from; all if not given")
    add("--flip", action=boolean, help="mirror images left-right; if not given, all but digits")
    add("--trials", type=number, default=100, help="of the study, over all its runs")
    add("--workers", type=number, default=1, help="processes of the study, spread over the GPUs")
    add("--timeout", type=cli.positive_float, help="seconds after which no trial starts")
    add("--tune-epochs", type=number, default=15, help="epochs of each trial")
    add("--finalists", type=number, default=4, help="trials trained again at full length; 1: none")
    add("--sampler", choices=study.SAMPLERS, default="tpe", help="how configurations are chosen")
    add("--pruner", choices=study.PRUNERS, default="hyperband", help="which trials end early")
    add("--storage", help="journal file or database URL; study.journal in the output folder")
    add("--study-name", default=STUDY_NAME, help="others than this write to a folder of that name")
    add("--fresh", action="store_true", help="delete this study and its results, and start anew")
    add("--max-params", type=number, default=5_000_000, help="parameters at most")
    add(
        "--final-epochs",
        type=number,
        help="epochs of finalists and final trainings; if not given, 80, or the preset's",
    )
    add("--repeats", type=number, default=5, help="final trainings of each configuration")
    add(
        "--configurations",
        type=cli.name_list,
        default=["default", "tuned"],
        help=f"which to train finally, comma-separated: {', '.join(FINAL_EPOCHS)} (sprint is "
        "narrowed unless --max-params is 9000000)",
    )
    add("--compile", action=boolean, default=True, help="compile the final trainings on a GPU")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    add("--threads", type=number, default=threads, help="CPU threads, shared by a study's workers")
    add("--seed", type=cli.seed, default=0, help="of the study and of the first final training")
    add("--output-dir", type=Path, default=Path("results/part2"), help="folder for all results")
    args = cli.parse_quick(parser, argv, QUICK)
    if args.flip is None:
        args.flip = args.dataset != "digits"
    if args.fresh and args.stage == "final":
        raise cli.UserError("--fresh deletes the study that --stage final reads: leave one out")
    return args


def prepare_output(output_dir: Path, study_name: str) -> Path:
    """The folder of a study's results."""
    if study_name in ("", ".", "..") or Path(study_name).name != study_name:
        raise cli.UserError(f"--study-name {study_name!r}: choose a name without slashes")
    return cli.make_output_dir(output_dir if study_name == STUDY_NAME else output_dir / study_name)


def load_checked(setting: Setting, tuned: bool) -> data.ImageSet:
    """The training images; UserError if they, the test images or the limit do not suffice."""
    images = setting.load("train")
    setting.load(data.ACCURACY_SPLIT[setting.dataset])
    height, width = images.images.shape[-2:]
    if len(images.classes) < 2 or width < 8 or height != width:
        raise cli.UserError(
            f"{setting.dataset}: {len(images.classes)} classes of {height}x{width} pixels; give "
            "images of at least two classes, square and of at least 8 pixels"
        )
    if tuned:
        data.hold_out(images, HELD_OUT)
        fit_width(DEEPEST, len(images.classes), setting.max_params)
    return images


def run_study(
    setting: Setting,
    args: argparse.Namespace,
    images: data.ImageSet,
    device: torch.device,
    environment: dict[str, Any],
    output_dir: Path,
) -> optuna.Study:
    """Run or continue the study and write its tables, also when it is interrupted.

    Raises:
        UserError: see `study.tune`; or no trial is complete.
    """
    storage = args.storage or str(output_dir / "study.journal")
    threads = max(1, args.threads // args.workers)
    opened: list[optuna.Study] = []
    about = describe_study(setting, images, args.tune_epochs, args.sampler, args.pruner)
    sizes = batch_sizes_for(len(images))
    names = list(search_space(sizes))
    # Not narrowed to max_params: each trial does that, and its width lies in the search space.
    default = HParams(batch_size=sizes[1])

    def begin(found: optuna.Study) -> None:
        opened.append(found)
        if args.fresh:
            tuning_report.delete_results(output_dir)
        if study.trials_left(found, args.trials) > 0:  # else nothing comes from this run
            results.write_json(output_dir / "environment.json", environment)

    try:
        whole = study.tune(
            functools.partial(make_objective, replace(setting, threads=threads), args.tune_epochs),
            storage=storage,
            study_name=args.study_name,
            trials=args.trials,
            workers=args.workers,
            device=device,
            sampler=args.sampler,
            pruner=args.pruner,
            max_epochs=args.tune_epochs,
            seed=args.seed,
            timeout=args.timeout,
            default_params={name: getattr(default, name) for name in names},
            setting=about,
            fresh=args.fresh,
            on_open=begin,
        )
    finally:
        for found in opened:
            tuning_report.write_study(found, names, output_dir)
    if not tuning_report.best_trials(whole, 1):
        raise cli.UserError(
            f"no trial is complete: see {output_dir / 'trials.csv'} for reasons; raise --trials or "
            "--timeout, or choose --pruner none"
        )
    print(output_dir / "trials.csv")
    return whole


def read_tuned(path: Path, setting: Setting, classes: Sequence[str]) -> HParams:
    """The best configuration that the study left in `path`; UserError if it is not usable."""
    digest, searched = tuning_report.digest(classes), search_space([REFERENCE_BATCH])
    found = tuning_report.read_best(path, setting.dataset, digest, HParams(), searched)
    hparams = HParams(**found)
    cli.check_name(hparams.optimizer, PEAK_RATES, "optimizer")
    parameters = count_parameters(hparams, len(classes))
    if parameters > setting.max_params:
        raise cli.UserError(
            f"{path} has {parameters} parameters, --max-params is {setting.max_params}: raise it"
        )
    return hparams


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Tune, train the chosen configurations, report."""
    args = parse_args(argv)
    device = cli.pick_device(args.device)
    cli.check_threads([args.threads])
    cli.check_name(args.dataset, data.DATASETS, "data set")
    for name in args.configurations:
        cli.check_name(name, FINAL_EPOCHS, "configuration")
    setting = Setting(**{field.name: getattr(args, field.name) for field in fields(Setting)})
    images = load_checked(setting, tuned=args.stage != "final")
    output_dir = prepare_output(args.output_dir, args.study_name)
    environment = results.environment(threads=args.threads)
    epochs = {name: args.final_epochs or usual for name, usual in FINAL_EPOCHS.items()}
    rows: list[dict[str, Any]] = []
    if args.stage != "final":
        whole = run_study(setting, args, images, device, environment, output_dir)
        rows = run_finalists(setting, whole, args.finalists, epochs["tuned"], device, output_dir)
    if args.stage == "tune":
        return int(any(row["status"] == "failed" for row in rows))
    chosen = {
        name: read_tuned(output_dir / "best_params.json", setting, images.classes)
        if name == "tuned"
        else preset(name, images, args.max_params)
        for name in args.configurations
    }
    for name, hparams in chosen.items():
        if name in PRESETS and hparams.width < PRESETS[name].width:
            print(f"note: --max-params narrows {name} to {hparams.width} channels")
    compiled = args.compile and device.type == "cuda"
    final = run_final(
        setting, chosen, epochs, args.repeats, compiled, device, environment, output_dir
    )
    summary = tuning_report.summarize(final)
    if summary:
        results.print_table(summary, tuning_report.SHOWN)
    print(output_dir / "final.csv")
    return int(not summary or any(row["status"] == "failed" for row in [*rows, *final]))


if __name__ == "__main__":
    sys.exit(main())
