"""Part 2: tune a small convolutional network for CIFAR-100, then train the best configuration.

Optuna looks for the hyperparameters on a held-out part of the training images. Then the default
and the best configuration are trained on all of them with several seeds, and the test images are
looked at once for each trained network.

    python part2_tune.py                                   # study, then final training
    python part2_tune.py --quick                           # under a minute, offline: digits
    python part2_tune.py --workers 4 --trials 200          # continues the study with 4 processes
    python part2_tune.py --sampler random --study-name random         # the same cost, no model
    python part2_tune.py --dataset folder --data-dir my/images        # your own classes
"""

import argparse
import functools
import json
import math
import os
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
from utils.training import Muon, capture, memory_format, warmup_cosine

FINAL_COLUMNS = (
    *("configuration", "seed", "device", "epochs", "parameters", "train_images", "compiled"),
    *("train_seconds", "setup_seconds", "final_loss", "top1_percent", "top5_percent"),
    *("num_images", "hparams"),
)
FINAL_HISTORY_COLUMNS = ("configuration", "seed", "number", "loss", "seconds", "setup_seconds")
RESULT_FILES = (
    *("trials.csv", "history.csv", "importances.csv", "final.csv", "final_history.csv"),
    *("best_params.json", "best.safetensors", "best.json"),
)
HELD_OUT = 0.1  # share of the training images on which configurations are compared
STUDY_NAME = "smallcnn"
QUICK = {
    "dataset": "digits",
    "device": "cpu",
    "flip": False,
    "trials": 8,
    "workers": 2,
    "tune_epochs": 4,
    "final_epochs": 8,
    "repeats": 2,
    "max_params": 150_000,
}


# --- hyperparameters ------------------------------------------------------------------------------


@dataclass(frozen=True)
class HParams:
    """One configuration. The defaults are what an experienced hand would try first."""

    width: int = 64  # channels at full resolution; twice and four times as many below
    depth1: int = 1  # residual blocks at full resolution
    depth2: int = 2  # at half
    depth3: int = 3  # at a quarter
    dropout: float = 0.0  # of the features before the classifier
    optimizer: str = "muon"
    learning_rate: float = 1.0  # peak, as a multiple of PEAK_RATES
    weight_decay: float = 1.0  # as a multiple of WEIGHT_DECAYS
    warmup: float = 0.2  # share of the steps
    batch_size: int = 512  # images
    label_smoothing: float = 0.1
    cutmix: float = 0.5  # share of the images that take a square from another


# Values known to work with batches of REFERENCE_BATCH; the search multiplies them, and rates grow
# with the root of the batch. Muon serves the kernels of inner convolutions, SGD the rest.
REFERENCE_BATCH = 512
PEAK_RATES = {"sgd": 0.8, "adamw": 4e-3, "muon": 0.06}
WEIGHT_DECAYS = {"sgd": 5e-4, "adamw": 0.05, "muon": 5e-4}
PEAK_RATE_BESIDE_MUON = 0.2


def suggest(trial: optuna.trial.BaseTrial, batch_sizes: Sequence[int]) -> HParams:
    """The search space."""
    return HParams(
        width=trial.suggest_int("width", 32, 96, step=16),
        depth1=trial.suggest_int("depth1", 0, 2),
        depth2=trial.suggest_int("depth2", 1, 3),
        depth3=trial.suggest_int("depth3", 1, 3),
        dropout=trial.suggest_float("dropout", 0.0, 0.3),
        optimizer=trial.suggest_categorical("optimizer", list(PEAK_RATES)),
        learning_rate=trial.suggest_float("learning_rate", 0.2, 3.0, log=True),
        weight_decay=trial.suggest_float("weight_decay", 0.2, 5.0, log=True),
        warmup=trial.suggest_float("warmup", 0.05, 0.4),
        batch_size=trial.suggest_categorical("batch_size", list(batch_sizes)),
        label_smoothing=trial.suggest_float("label_smoothing", 0.0, 0.2),
        cutmix=trial.suggest_float("cutmix", 0.0, 0.8),
    )


def batch_sizes_for(num_images: int) -> list[int]:
    """Three powers of two that give a few hundred to a few dozen steps an epoch."""
    smallest = 2 ** max(5, int(math.log2(max(1, num_images / 150))))
    return [smallest, 2 * smallest, 4 * smallest]


def default_hparams(num_images: int) -> HParams:
    """The default configuration for a training set of this size."""
    return HParams(batch_size=batch_sizes_for(num_images)[1])


def fit_width(hparams: HParams, num_classes: int, max_params: int) -> HParams:
    """The same configuration, no wider than `max_params` allows; UserError if none is so small."""
    for width in (hparams.width, *range((hparams.width - 1) // 8 * 8, 0, -8)):
        narrower = replace(hparams, width=width)
        if count_parameters(narrower, num_classes) <= max_params:
            return narrower
    least = count_parameters(narrower, num_classes)
    raise cli.UserError(f"--max-params {max_params}: the narrowest such network has {least}")


# --- the network ----------------------------------------------------------------------------------


class ConvNormAct(nn.Sequential):
    """3x3 convolution, batch normalisation, SiLU."""

    def __init__(self, narrow: int, wide: int, stride: int = 1) -> None:
        conv = nn.Conv2d(narrow, wide, 3, stride, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(wide), nn.SiLU())


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions whose result is added to their input; an identity before training."""

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

    A 3x3 convolution each leads into the resolutions H, H/2 and H/4; residual blocks follow. The
    features' average over the last map goes to a linear classifier.
    """

    def __init__(self, width: int, depths: Sequence[int], dropout: float, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, depth in enumerate(depths):
            wide = width * 2**stage
            layers.append(ConvNormAct(channels, wide, stride=1 if stage == 0 else 2))
            layers += [ResidualBlock(wide) for _ in range(depth)]
            channels = wide
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x).mean((2, 3))))


def build_network(hparams: HParams, num_classes: int) -> SmallCNN:
    depths = (hparams.depth1, hparams.depth2, hparams.depth3)
    return SmallCNN(hparams.width, depths, hparams.dropout, num_classes)


def count_parameters(hparams: HParams, num_classes: int) -> int:
    with torch.device("meta"):  # shapes without memory
        return sum(p.numel() for p in build_network(hparams, num_classes).parameters())


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


@dataclass(frozen=True)
class Epoch:
    """An epoch that is over."""

    number: int  # counted from 1
    loss: float  # mean of its steps
    seconds: float  # of training since the start, without evaluations between epochs
    setup_seconds: float  # before the first step: choice of kernels, compilation, recording


def make_task(images: data.ImageSet, flip: bool, device: torch.device) -> Task:
    """Move the images to the device and measure their channels' mean and deviation."""
    pixels = images.images.transpose(0, 1).flatten(1).double().div_(255)
    mean = tuple(round(float(x), 4) for x in pixels.mean(1))
    std = tuple(max(0.01, round(float(x), 4)) for x in pixels.std(1))  # of a constant channel: 0
    return Task(data.to_device(images, device), mean, std, flip)


def train(
    network: SmallCNN, hparams: HParams, task: Task, epochs: int, compiled: bool = False
) -> Iterator[Epoch]:
    """Train in place under a one-cycle schedule and yield after every epoch.

    Weights, shuffling and augmentation follow PyTorch's global seed. A loss that is not finite is
    yielded as it is: the caller decides.
    """
    clock = time.perf_counter()
    batch_size = min(hparams.batch_size, len(task.images))
    optimizers = make_optimizers(network, hparams)
    step = make_step(network, optimizers, hparams, task, batch_size, compiled)
    steps = len(task.images) // batch_size
    setup_seconds, seconds = time.perf_counter() - clock, 0.0
    for epoch in range(epochs):
        clock = time.perf_counter()
        network.train()
        order = torch.randperm(len(task.images), device=task.device)
        losses = torch.zeros((), device=task.device)
        for i, batch in enumerate(order.split(batch_size)[:steps], start=epoch * steps):
            for optimizer, peak in optimizers:
                rate = warmup_cosine(i, epochs * steps, hparams.warmup * epochs * steps, peak)
                for group in optimizer.param_groups:
                    group["lr"].fill_(rate)
            losses += step(batch)
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
    kernels = [p for p in network.parameters() if p.ndim == 4]
    vectors = [p for p in network.parameters() if p.ndim == 1]
    multiple = hparams.learning_rate * (hparams.batch_size / REFERENCE_BATCH) ** 0.5
    peak = multiple * PEAK_RATES[hparams.optimizer]
    decay = hparams.weight_decay * WEIGHT_DECAYS[hparams.optimizer]
    rate = torch.zeros((), device=device)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = []
    if hparams.optimizer == "muon":
        optimizers.append((Muon(kernels[1:], rate, momentum=0.9), peak))
        kernels, rate = kernels[:1], torch.zeros((), device=device)
        peak = multiple * PEAK_RATE_BESIDE_MUON
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
    batch_size: int,
    compiled: bool,
) -> Callable[[Tensor], Tensor]:
    """One optimisation step: indices of a batch `[batch_size]` -> its loss.

    On a GPU the whole step, augmentation included, is one CUDA graph: launching its several
    hundred kernels one by one would take longer than running them.
    """
    on_gpu = task.device.type == "cuda"
    forward = torch.compile(network) if compiled else network
    padded = augmentation.pad_for_crops(task.images.images, task.size // 8)

    def step(batch: Tensor) -> Tensor:
        x, targets = augment(padded, batch, task, hparams.cutmix)
        with torch.autocast(task.device.type, torch.bfloat16, enabled=on_gpu):
            logits = forward(x.to(memory_format=memory_format(task.device)))
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=hparams.label_smoothing)
        loss.backward()
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    network.train()
    return capture(step, batch_size) if on_gpu else step


def augment(padded: Tensor, batch: Tensor, task: Task, cutmix: float) -> tuple[Tensor, Tensor]:
    """Crop, flip, normalise and mix: images `[N, 3, S, S]`, targets `[N, classes]`."""
    pixels = augmentation.crop_and_flip(padded, batch, task.size, task.flip)
    x = augmentation.normalize(pixels.float().div_(255), task.mean, task.std)
    targets = F.one_hot(data.labels_of(task.images)[batch], len(task.images.classes)).float()
    weights = augmentation.mixing_weights(len(batch), task.size, 0.0, cutmix, task.device)
    return augmentation.mix(x, targets, weights)


def evaluate(network: nn.Module, images: data.ImageSet, task: Task, half: bool) -> dict[str, float]:
    """Top-1 and top-5 in percent, single view; in bf16 on a GPU if `half`, else in fp32."""
    device = task.device
    how = data.Preprocessing(task.size, task.mean, task.std)
    network.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=half and device.type == "cuda"):
        call = functools.partial(_forward, network)
        logits = evaluation.predict(call, images.images, how, min(1000, len(images)), device)
    labels = data.labels_of(images).cpu()
    return {
        "top1_percent": evaluation.percent(logits.argmax(1) == labels),
        "top5_percent": evaluation.percent(evaluation.top_k_correct(logits, labels, 5)),
    }


def _forward(network: nn.Module, x: Tensor) -> Tensor:
    return network(x.to(memory_format=memory_format(x.device)))


def start_network(hparams: HParams, num_classes: int, device: torch.device, seed: int) -> SmallCNN:
    """A network with fresh weights on the device; everything random after it follows the seed."""
    cli.seed_everything(seed)
    network = build_network(hparams, num_classes)
    return network.to(device).to(memory_format=memory_format(device))


# --- the study ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What all trials of a study share; a study made with another is not continued."""

    dataset: str
    data_dir: str | None
    image_size: int
    flip: bool
    num_images: int | None
    epochs: int
    max_params: int
    seed: int


def load_training_images(setting: Setting) -> data.ImageSet:
    folder = None if setting.data_dir is None else Path(setting.data_dir)
    return data.load_images(
        setting.dataset, "train", folder, setting.image_size, setting.num_images, setting.seed
    )


def make_objective(setting: Setting, device: torch.device) -> Callable[[optuna.Trial], float]:
    """Load the images onto a worker's device; what is returned runs one trial."""
    prepare_backend()
    train_set, held_out = data.hold_out(load_training_images(setting), HELD_OUT)
    task = make_task(train_set, setting.flip, device)
    held_out = data.to_device(held_out, device)
    return functools.partial(run_trial, setting, task, held_out)


def run_trial(setting: Setting, task: Task, held_out: data.ImageSet, trial: optuna.Trial) -> float:
    """Train one configuration; its value is the top-1 of held-out images after the last epoch."""
    classes = len(held_out.classes)
    hparams = suggest(trial, batch_sizes_for(len(task.images)))
    hparams = fit_width(hparams, classes, setting.max_params)
    trial.set_user_attr("hparams", asdict(hparams))
    trial.set_user_attr("parameters", count_parameters(hparams, classes))
    network = start_network(hparams, classes, task.device, setting.seed + trial.number)
    epochs: list[Epoch] = []
    try:
        for epoch in train(network, hparams, task, setting.epochs):
            epochs.append(epoch)
            if not math.isfinite(epoch.loss):
                return math.nan
            top1 = evaluate(network, held_out, task, half=True)["top1_percent"]
            trial.report(top1, epoch.number)
            # Trial 0, the default configuration, is the yardstick and runs to its end.
            if trial.number > 0 and epoch.number < setting.epochs and trial.should_prune():
                raise optuna.TrialPruned
        return top1
    finally:
        trial.set_user_attr("history", [asdict(epoch) for epoch in epochs])


# --- the final training ---------------------------------------------------------------------------


def train_final(
    hparams: HParams, task: Task, test_set: data.ImageSet, epochs: int, seed: int, compiled: bool
) -> tuple[SmallCNN, dict[str, Any], list[Epoch]]:
    """Train on all training images, then look at the test images once.

    Returns the network, its row of final.csv, and its epochs.
    """
    network = start_network(hparams, len(test_set.classes), task.device, seed)
    history: list[Epoch] = []
    with tqdm(total=epochs, desc=f"seed {seed}", unit="epoch", disable=None) as bar:
        for epoch in train(network, hparams, task, epochs, compiled):
            if not math.isfinite(epoch.loss):
                raise cli.UserError(f"seed {seed}: the loss is {epoch.loss}; tune again")
            history.append(epoch)
            bar.set_postfix_str(f"loss {epoch.loss:.3f}", refresh=False)
            bar.update()
    row = {
        "seed": seed,
        "epochs": epochs,
        "parameters": sum(p.numel() for p in network.parameters()),
        "train_images": len(task.images),
        "compiled": compiled,
        "train_seconds": round(epoch.seconds, 2),
        "setup_seconds": round(epoch.setup_seconds, 2),
        "final_loss": round(epoch.loss, 4),
        **evaluate(network, test_set, task, half=False),
        "num_images": len(test_set),
    }
    return network, row, history


def run_final(
    configurations: dict[str, HParams],
    task: Task,
    test_set: data.ImageSet,
    epochs: int,
    seeds: Sequence[int],
    compiled: bool,
    output_dir: Path,
) -> list[dict[str, Any]]:
    """Train every configuration with every seed, leaving out what final.csv already holds."""
    rows = tuning_report.read_rows(output_dir / "final.csv")
    history = tuning_report.read_rows(output_dir / "final_history.csv")
    for seed in seeds:  # the seed outside: an interrupted comparison is still a fair one
        for name, hparams in configurations.items():
            key = {"configuration": name, "seed": seed, "epochs": epochs}
            key |= {"hparams": json.dumps(asdict(hparams)), "device": device_name(task.device)}
            if any(key.items() <= row.items() for row in rows):
                continue
            network, row, epochs_done = train_final(hparams, task, test_set, epochs, seed, compiled)
            rows = [r for r in rows if (r["configuration"], r["seed"]) != (name, seed)]
            rows.append(key | row)
            history = [r for r in history if (r["configuration"], r["seed"]) != (name, seed)]
            history += [{"configuration": name, "seed": seed} | asdict(e) for e in epochs_done]
            results.write_csv(output_dir / "final.csv", rows, FINAL_COLUMNS)
            results.write_csv(output_dir / "final_history.csv", history, FINAL_HISTORY_COLUMNS)
            print(f"{name}, seed {seed}: top-1 {row['top1_percent']:.2f} %", flush=True)
            # The first seed's, whatever its accuracy: the best of several would flatter.
            if name == "tuned" and seed == seeds[0]:
                save_network(output_dir / "best.safetensors", network, hparams, task, test_set, row)
    return rows


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def save_network(
    path: Path,
    network: SmallCNN,
    hparams: HParams,
    task: Task,
    test_set: data.ImageSet,
    row: dict[str, Any],
) -> None:
    """Write the weights rounded to fp16, and a card with their accuracy after the rounding."""
    state = models.half_state(network)
    rounded = build_network(hparams, len(test_set.classes)).eval()
    rounded.load_state_dict({name: value.float() for name, value in state.items()})
    sample = models.sample_logits(rounded, task.size)
    top1 = evaluate(rounded.to(task.device), test_set, task, half=False)["top1_percent"]
    card = {
        "architecture": {
            "width": hparams.width,
            "depths": [hparams.depth1, hparams.depth2, hparams.depth3],
            "dropout": hparams.dropout,
            "num_classes": len(test_set.classes),
        },
        "image_size": task.size,
        "mean": task.mean,
        "std": task.std,
        "classes": test_set.classes,
        "dataset": test_set.dataset,
        "split": test_set.split,
        "n_images": len(test_set),
        "top1": round(top1, 2),
        "sample_logits": sample,
        "hyperparameters": asdict(hparams),
        "training": {key: row[key] for key in ("seed", "epochs", "train_images", "train_seconds")},
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "hardware": device_name(task.device),
    }
    models.write_model(path, state, card)


def load_checkpoint(path: Path) -> models.LoadedModel:
    """Load what `save_network` wrote: `path` with its card beside it.

    Raises:
        UserError: missing, damaged or foreign files.
    """
    card = models.read_card(path, "python part2_tune.py")
    state = models.read_weights(path, card, "python part2_tune.py")
    try:
        network = SmallCNN(**card["architecture"])
        network.load_state_dict({name: value.float() for name, value in state.items()})
        how = data.Preprocessing(card["image_size"], tuple(card["mean"]), tuple(card["std"]))
        classes = tuple(card["classes"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise cli.UserError(
            f"{path} does not hold a SmallCNN ({cli.first_line(error)}): write it again with "
            "python part2_tune.py"
        ) from error
    network.eval().requires_grad_(False)
    checkpoints = {path.name: card["sha256"]}
    return models.LoadedModel(path.stem, network, how, classes, True, checkpoints)


# --- the command line -----------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    stages = ("tune", "final", "all")
    add("--stage", choices=stages, default="all", help="study, final training, or both in turn")
    add("--dataset", default="cifar100", help="one of cifar100, digits, folder, tiny-imagenet")
    add("--data-dir", type=Path, help="folder of the data set; data/<dataset> if not given")
    add("--image-size", type=cli.positive_int, default=32, help="of --dataset folder, in pixels")
    add("--num-images", type=cli.positive_int, help="training images; all if not given")
    add(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="mirror training images left-right: not for digits or text",
    )
    add("--trials", type=cli.positive_int, default=100, help="of the study, over all its runs")
    add("--workers", type=cli.positive_int, default=1, help="processes, spread over the GPUs")
    add("--timeout", type=cli.positive_float, help="seconds after which no trial starts")
    add("--tune-epochs", type=cli.positive_int, default=16, help="epochs of each trial")
    add("--sampler", choices=study.SAMPLERS, default="tpe", help="how configurations are chosen")
    add("--pruner", choices=study.PRUNERS, default="hyperband", help="which trials end early")
    add("--storage", help="journal file or database URL; study.journal in the output folder")
    add("--study-name", default=STUDY_NAME, help="others than this write to a folder of that name")
    add("--fresh", action="store_true", help="delete this study and its results, and start anew")
    add("--max-params", type=cli.positive_int, default=5_000_000, help="parameters at most")
    add("--final-epochs", type=cli.positive_int, default=72, help="epochs of the final training")
    add("--repeats", type=cli.positive_int, default=5, help="final trainings a configuration")
    add(
        "--configurations",
        type=cli.name_list,
        default=["default", "tuned"],
        help="which to train finally, comma-separated: default, tuned",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile the final trainings on a GPU: half a minute once, then a fifth faster",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    add("--threads", type=cli.positive_int, default=torch.get_num_threads(), help="CPU threads")
    add("--seed", type=cli.seed, default=0, help="of the study and of the first final training")
    add("--output-dir", type=Path, default=Path("results/part2"), help="folder for all results")
    add("--quick", action="store_true", help="a small run on digits: under a minute, no network")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    return args


def prepare_backend() -> None:
    """Let cuDNN try its kernels; keep fp32 true, which the reported accuracy is measured in."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False


def prepare_output(output_dir: Path, study_name: str, fresh: bool) -> Path:
    """The folder of this study's results, emptied of earlier ones if `fresh`."""
    if not study_name or Path(study_name).name != study_name:
        raise cli.UserError(f"--study-name {study_name!r}: choose a name without slashes")
    folder = output_dir if study_name == STUDY_NAME else output_dir / study_name
    folder = cli.make_output_dir(folder)
    if fresh:
        for name in (*RESULT_FILES, *tuning_report.FIGURES):
            (folder / name).unlink(missing_ok=True)
    return folder


def write_study(finished: optuna.Study, output_dir: Path) -> None:
    """Write the tables, the best configuration and the figures of a study."""
    names = [field.name for field in fields(HParams)]
    tuning_report.write_study(finished, names, output_dir)
    best = tuning_report.best_trial(finished)
    if best is not None:
        content = {
            "study": finished.study_name,
            "trial": best.number,
            "held_out_top1_percent": best.value,
            "hparams": best.user_attrs["hparams"],
        }
        results.write_json(output_dir / "best_params.json", content)


def read_best(path: Path) -> HParams:
    """The best configuration of a study, from best_params.json; UserError if it is not usable."""
    try:
        return HParams(**json.loads(path.read_text())["hparams"])
    except OSError as error:
        raise cli.UserError(
            f"{path} cannot be read ({error.strerror}): run --stage tune first, or train only "
            "--configurations default"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise cli.UserError(f"{path} is damaged ({cli.first_line(error)}): tune again") from error


def run_study(
    setting: Setting, args: argparse.Namespace, device: torch.device, output_dir: Path
) -> None:
    storage = args.storage or str(output_dir / "study.journal")
    images = load_training_images(setting)  # decoded once; the workers read the cache
    default = default_hparams(round((1 - HELD_OUT) * len(images)))
    fit_width(default, len(images.classes), setting.max_params)
    print(f"study {args.study_name}: {args.trials} trials in {storage}", flush=True)
    try:
        finished = study.tune(
            functools.partial(make_objective, setting),
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
            default_params=asdict(default),
            setting=asdict(setting) | {"sampler": args.sampler, "pruner": args.pruner},
            fresh=args.fresh,
        )
    except KeyboardInterrupt:
        write_study(study.load_study(storage, args.study_name), output_dir)
        raise
    write_study(finished, output_dir)
    if tuning_report.best_trial(finished) is None:
        raise cli.UserError(
            f"no trial is complete, see the reasons in {output_dir / 'trials.csv'}; raise --trials "
            "or --timeout, or choose --pruner none"
        )


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Tune, train the best and the default configuration, report."""
    args = parse_args(argv)
    device = cli.pick_device(args.device)
    cli.check_name(args.dataset, data.DATASETS, "data set")
    for name in args.configurations:
        cli.check_name(name, ("default", "tuned"), "configuration")
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # for the workers
    output_dir = prepare_output(args.output_dir, args.study_name, args.fresh)
    data_dir = None if args.data_dir is None else str(args.data_dir.resolve())
    setting = Setting(
        dataset=args.dataset,
        data_dir=data_dir,
        image_size=args.image_size,
        flip=args.flip,
        num_images=args.num_images,
        epochs=args.tune_epochs,
        max_params=args.max_params,
        seed=args.seed,
    )
    results.write_json(output_dir / "environment.json", results.environment())
    if args.stage in ("tune", "all"):
        run_study(setting, args, device, output_dir)
        print(output_dir / "trials.csv")
    if args.stage in ("final", "all"):
        prepare_backend()
        images = load_training_images(setting)
        split = data.ACCURACY_SPLIT[args.dataset]
        test_set = data.load_images(args.dataset, split, args.data_dir, args.image_size)
        default = default_hparams(round((1 - HELD_OUT) * len(images)))
        default = fit_width(default, len(images.classes), args.max_params)
        chosen = {
            name: default if name == "default" else read_best(output_dir / "best_params.json")
            for name in args.configurations
        }
        task = make_task(images, args.flip, device)
        seeds = range(args.seed, args.seed + args.repeats)
        compiled = args.compile and device.type == "cuda"
        rows = run_final(chosen, task, test_set, args.final_epochs, seeds, compiled, output_dir)
        tuning_report.draw_final(rows, output_dir)
        results.print_table(tuning_report.summarize(rows), tuning_report.SHOWN)
        print(output_dir / "final.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
