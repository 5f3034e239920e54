"""Train the small reference ViTs of `weights/`, which make every accuracy reproducible offline.

    python -m utils.train_reference --model vit_digits           # a CPU, about a minute
    python -m utils.train_reference --model vit_tiny_imagenet    # one H100, six minutes

From 256 images per class vit_tiny_imagenet reaches 56.7 % top-1 on the 10,000 labelled validation
images. A ViT learns little from so few, a convolutional network much more: so a small residual
network learns from the labels first, and the ViT learns from it, both looking at the same augmented
view (Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent"). 5 % of
the training images are held out and choose the epoch; the test images are looked at once, at the
end. A killed run continues from its last checkpoint.
"""

import argparse
import dataclasses
import functools
import hashlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from utils import augmentation, cli, models
from utils.cli import UserError
from utils.data import (
    ACCURACY_SPLIT,
    ImageSet,
    Preprocessing,
    hold_out,
    labels_of,
    load_images,
    take_subset,
    to_device,
)
from utils.evaluation import percent, predict
from utils.files import replacing
from utils.training import capture, memory_format, prepare_backend, warmup_cosine

QUICK_IMAGES = 300
MEAN, STD = models.IMAGENET_MEAN, models.IMAGENET_STD


# --- recipes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """How a training batch is distorted; 0 switches a distortion off."""

    flip: bool = True  # mirror half of the images left-right
    crop_area: float = 0.35  # least share of the image's area that a random crop keeps
    rotation: float = 10.0  # degrees, at most, either way
    colour: float = 0.4  # largest relative change of brightness, contrast and saturation
    mixup: float = 0.2  # share of the images that are blended with another
    cutmix: float = 0.5  # share of the images that take a square from another
    erase: float = 0.1  # share of the images that lose a square


@dataclass(frozen=True)
class Phase:
    """Hyperparameters of one training run: the teacher's or the student's."""

    epochs: int
    optimizer: str  # "adamw", or "sgd" with Nesterov momentum
    learning_rate: float  # peak
    weight_decay: float
    batch_size: int = 512  # images
    warmup: int = 5  # epochs of linear warm-up before the cosine
    calm: float = 0.1  # last share of the epochs, whose views are close to the real images
    ema_decay: float = 0.999  # per step; approached gradually
    clip_norm: float = 1.0  # largest norm of the gradient
    evaluate_every: int = 10  # epochs between held-out evaluations, each with a checkpoint

    def is_calm(self, epoch: int, epochs: int) -> bool:
        return epoch >= (1 - self.calm) * epochs


@dataclass(frozen=True)
class Recipe:
    """All that decides what a model becomes, apart from the seed."""

    dataset: str
    architecture: dict[str, int]  # arguments of `build_reference_vit`; sizes in pixels
    student: Phase
    teacher: Phase | None = None  # None: the student learns from the labels alone
    augmentation: Augmentation = Augmentation()
    drop_path: float = 0.1  # rate of stochastic depth in the student's last block
    label_smoothing: float = 0.05
    held_out: float = 0.05  # share of each class's training images
    teacher_width: int = 64  # channels of its first stage
    teacher_share: float = 0.47  # of --max-minutes
    temperature: float = 2.0  # softens both sides' probabilities in the distillation
    label_weight: float = 0.1  # of the labels, beside the teacher's probabilities
    guide_weight: float = 1.0  # of the agreement with the teacher's feature map


RECIPES = {
    "vit_tiny_imagenet": Recipe(
        dataset="tiny-imagenet",
        architecture={"image_size": 64, "patch_size": 8, "width": 384, "depth": 6, "heads": 6},
        teacher=Phase(57, "sgd", learning_rate=0.4, weight_decay=5e-4, clip_norm=5.0),
        student=Phase(74, "adamw", learning_rate=1e-3, weight_decay=0.05, warmup=6),
    ),
    "vit_digits": Recipe(
        dataset="digits",
        architecture={"image_size": 32, "patch_size": 8, "width": 96, "depth": 4, "heads": 3},
        student=Phase(40, "adamw", learning_rate=2e-3, weight_decay=0.05, batch_size=64),
        augmentation=Augmentation(
            flip=False, crop_area=0.7, colour=0, mixup=0.2, cutmix=0, erase=0
        ),
    ),
}


def shorten(recipe: Recipe) -> Recipe:
    """The same steps in little time: one epoch of small batches, with a narrow teacher."""
    student = replace(recipe.student, epochs=1, batch_size=64)
    teacher = recipe.teacher and replace(recipe.teacher, epochs=1, batch_size=64)
    return replace(recipe, student=student, teacher=teacher, teacher_width=8)


# --- augmentation ---------------------------------------------------------------------------------


def augment(
    images: Tensor, labels: Tensor, classes: int, recipe: Recipe, how: Augmentation
) -> tuple[Tensor, Tensor]:
    """uint8 `[N, 3, H, W]`, labels `[N]` -> float `[N, 3, S, S]`, targets `[N, classes]`."""
    n, size, device = len(images), recipe.architecture["image_size"], images.device
    maps = augmentation.random_affine(n, how.crop_area, how.rotation, how.flip, device)
    x = augmentation.warp(images.float().div_(255), maps, size)
    if how.colour:
        x = augmentation.random_colour(x, how.colour)
    mean, std = (augmentation.channels(values, device) for values in (MEAN, STD))
    x = augmentation.normalize(x.clamp_(0, 1), mean, std)
    weights = augmentation.mixing_weights(n, size, how.mixup, how.cutmix, device)
    x, targets = augmentation.mix(x, F.one_hot(labels, classes).float(), weights)
    boxes = augmentation.random_boxes(augmentation.uniform((n,), 0.02, 0.33, device), size)
    boxes &= torch.rand(n, 1, 1, 1, device=device) < how.erase
    return x.masked_fill(boxes, 0), targets


# --- teacher and student: images -> (logits [N, classes], tokens [N, T, channels]) ----------------

Output = tuple[Tensor, Tensor]
Loss = Callable[[Output, Tensor, Tensor], Tensor]  # of output, images, targets


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, "Identity Mappings")."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(narrow)
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.shortcut = None
        if narrow != wide:
            self.shortcut = nn.Conv2d(narrow, wide, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(y)
        return skip + self.conv2(F.relu(self.norm2(self.conv1(y))))


class Teacher(nn.Module):
    """ResNet-18 that sees small images at full resolution first; its 8x8 map is the tokens."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
        for i, wide in enumerate((width, 2 * width, 4 * width, 8 * width)):
            layers.append(
                PreActivationBlock(wide if i == 0 else wide // 2, wide, 1 if i == 0 else 2)
            )
            layers.append(PreActivationBlock(wide, wide, 1))
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(8 * width), nn.ReLU())
        self.head = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Output:
        tokens = self.layers(x).flatten(2).transpose(1, 2)
        return self.head(tokens.mean(1)), tokens


class Student(nn.Module):
    """The ViT, with a projection of its tokens to the teacher's channels for training only."""

    def __init__(self, vit: Any, guide: nn.Module) -> None:
        super().__init__()
        self.vit, self.guide = vit, guide

    def forward(self, x: Tensor) -> Output:
        tokens = self.vit.forward_features(x)
        return self.vit.forward_head(tokens), self.guide(tokens)


def label_loss(smoothing: float) -> Loss:
    return lambda output, _, targets: F.cross_entropy(output[0], targets, label_smoothing=smoothing)


def distillation_loss(teach: Callable[[Tensor], Output], recipe: Recipe) -> Loss:
    """The teacher's probabilities and feature map of the same view, and a little of the labels.

    Its map, matched place by place, hands on the convolutional network's sense of locality
    (Li et al. 2022, "Locality Guidance for Improving Vision Transformers on Tiny Datasets").
    """
    from_labels = label_loss(recipe.label_smoothing)

    def loss(output: Output, images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits, teacher_tokens = teach(images)
        student, teacher = (
            F.log_softmax(logits.float() / recipe.temperature, dim=1)
            for logits in (output[0], teacher_logits)
        )
        soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        guide = 1 - F.cosine_similarity(output[1].float(), teacher_tokens.float(), dim=2).mean()
        return (
            recipe.temperature**2 * soft
            + recipe.guide_weight * guide
            + recipe.label_weight * from_labels(output, images, targets)
        )

    return loss


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What both phases share; the images lie on the device."""

    recipe: Recipe
    train: ImageSet
    held_out: ImageSet
    seed: int
    checkpoints: Path

    @property
    def device(self) -> torch.device:
        return self.train.images.device

    @property
    def key(self) -> str:
        """A name for all that a checkpoint must agree with."""
        text = f"{self.recipe} {self.seed} {len(self.train)} {self.device.type}"
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Run:
    """What a checkpoint holds: all that is needed to go on as if nothing had happened."""

    module: nn.Module
    ema: ModelEmaV3
    optimizer: torch.optim.Optimizer
    epochs: int  # planned
    epoch: int = 0  # finished
    seconds: float = 0.0  # spent
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # averaged weights
    best_epoch: int = 0
    best_top1: float = -1.0  # percent of the held-out images

    def save(self, path: Path, key: str) -> None:
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        parts |= {name: parts[name].state_dict() for name in ("module", "ema", "optimizer")}
        with replacing(path) as temporary:
            torch.save(parts | {"key": key}, temporary)

    def load(self, path: Path, key: str) -> None:
        """Take up the checkpoint if there is one and it belongs to the same recipe and images."""
        if not path.is_file():
            return
        device = next(self.module.parameters()).device
        parts = torch.load(path, map_location=device, weights_only=True)
        if parts.pop("key") != key:
            print(f"note: {path} belongs to another recipe and is replaced")
            return
        for name in ("module", "ema", "optimizer"):
            getattr(self, name).load_state_dict(parts.pop(name))
        vars(self).update(parts)
        print(f"continuing {path} after epoch {self.epoch} of {self.epochs}", flush=True)


def make_optimizer(module: nn.Module, phase: Phase) -> torch.optim.Optimizer:
    """Weight decay acts on matrices and kernels, not on biases, norms and position embeddings."""
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": phase.weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, parameter in module.named_parameters():
        exempt = parameter.ndim < 2 or name.endswith("pos_embed")
        groups[exempt]["params"].append(parameter)
    device = groups[0]["params"][0].device
    rate = torch.zeros((), device=device)  # a tensor, so that a CUDA graph reads each step's value
    on_gpu = device.type == "cuda"
    if phase.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, fused=on_gpu)
    return torch.optim.AdamW(groups, lr=rate, fused=on_gpu, capturable=on_gpu)


def fit_epochs(wanted: int, finished: int, seconds_left: float, seconds_per_epoch: float) -> int:
    """How many epochs in all, of those wanted, the time left allows at the measured speed."""
    return int(min(wanted, finished + max(0.0, seconds_left) / seconds_per_epoch))


def calm_down(how: Augmentation) -> Augmentation:
    """Views close to the real images, for the last epochs: less noise in the labels."""
    return replace(how, mixup=0, cutmix=0, erase=0, crop_area=max(how.crop_area, 0.5))


def train_phase(
    name: str, setting: Setting, phase: Phase, module: nn.Module, loss: Loss, seconds: float
) -> Run:
    """Train for the phase's epochs, or for fewer if `seconds` do not allow all.

    A checkpoint of the same setting is continued, or taken as it is when it was finished.
    """
    ema = ModelEmaV3(module, decay=phase.ema_decay, use_warmup=True)
    run = Run(module, ema, make_optimizer(module, phase), phase.epochs)
    run.load(setting.checkpoints / f"{name}.pt", setting.key)
    make = functools.cache(functools.partial(make_step, run, setting, phase, loss))
    first, seconds_before = run.epoch + 1, 0.0  # the first epoch compiles: it is not measured
    clock = time.perf_counter()
    bar = tqdm(total=run.epochs, initial=run.epoch, desc=name, unit="epoch", disable=None)
    while run.epoch < run.epochs:
        if run.epoch > first:
            speed = (run.seconds - seconds_before) / (run.epoch - first)
            run.epochs = fit_epochs(phase.epochs, run.epoch, seconds - run.seconds, speed)
        # Each epoch has its own seed, so that a resumed run does what it would have done anyway.
        torch.manual_seed(setting.seed * 100_003 + run.epoch)
        mean_loss = train_epoch(run, setting, phase, make(phase.is_calm(run.epoch, run.epochs)))
        run.epoch += 1
        due = run.epoch % phase.evaluate_every == 0 or run.epoch >= run.epochs
        top1 = choose_best(run, setting) if due else None
        run.seconds += time.perf_counter() - clock
        clock = time.perf_counter()
        if run.epoch == first:
            seconds_before = run.seconds
        bar.total = run.epochs
        bar.update()
        if top1 is not None:
            run.save(setting.checkpoints / f"{name}.pt", setting.key)
            bar.set_postfix_str(f"held-out {top1:.1f} %")
            facts = f"loss {mean_loss:.3f}, held-out {top1:.2f} %, {run.seconds:.0f} s"
            tqdm.write(f"{name} {run.epoch}/{run.epochs}: {facts}")
    bar.close()
    return run


def make_step(
    run: Run, setting: Setting, phase: Phase, loss: Loss, calm: bool
) -> Callable[[Tensor], Tensor]:
    """One optimisation step: indices of a batch `[N]` -> its loss, without waiting for a GPU."""
    recipe, data, on_gpu = setting.recipe, setting.train, setting.device.type == "cuda"
    how = calm_down(recipe.augmentation) if calm else recipe.augmentation
    forward = torch.compile(run.module) if on_gpu else run.module

    def step(batch: Tensor) -> Tensor:
        images, labels = data.images[batch], labels_of(data)[batch]
        x, targets = augment(images, labels, len(data.classes), recipe, how)
        x = x.to(memory_format=memory_format(setting.device))
        # On a CPU bf16 is seldom faster.
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=on_gpu):
            value = loss(forward(x), x, targets)
        value.backward()
        norm = nn.utils.clip_grad_norm_(run.module.parameters(), phase.clip_norm)
        if on_gpu:  # fused optimizers leave out a step marked so; GradScaler relies on it too
            vars(run.optimizer)["found_inf"] = norm.isfinite().logical_not().float()
        run.optimizer.step()
        run.optimizer.zero_grad()
        return value.detach()

    if not on_gpu:
        return step
    return capture(step, torch.randperm(len(data), device=setting.device)[: phase.batch_size])


def train_epoch(
    run: Run, setting: Setting, phase: Phase, step: Callable[[Tensor], Tensor]
) -> float:
    """One pass over the shuffled images in full batches; waits for the device only at its end."""
    run.module.train()
    count = len(setting.train)
    steps = max(1, count // phase.batch_size)
    batches = torch.randperm(count, device=setting.device).split(phase.batch_size)[:steps]
    total = torch.zeros((), device=setting.device)
    for i, batch in enumerate(batches, start=run.epoch * steps):
        rate = warmup_cosine(i, run.epochs * steps, phase.warmup * steps, phase.learning_rate)
        for group in run.optimizer.param_groups:
            group["lr"].fill_(rate)
        total += step(batch)
        run.ema.update(run.module, step=i)
    if not math.isfinite(total):
        raise UserError(f"the loss is {float(total)}: lower the learning rate of the recipe")
    return float(total) / steps


def choose_best(run: Run, setting: Setting) -> float:
    """Top-1 of the averaged weights on the held-out images; the best weights so far are kept."""
    size = setting.recipe.architecture["image_size"]
    top1 = top1_percent(lambda x: run.ema.module(x)[0], setting.held_out, size)
    if top1 >= run.best_top1:
        run.best = {name: value.clone() for name, value in run.ema.module.state_dict().items()}
        run.best_epoch, run.best_top1 = run.epoch, top1
    return top1


def top1_percent(call: Callable[[Tensor], Tensor], images: ImageSet, size: int) -> float:
    """Accuracy of `call` (normalised images `[N, 3, size, size]` -> logits) in fp32."""
    how = Preprocessing(size, MEAN, STD)
    logits = predict(call, images.images, how, min(500, len(images)), images.images.device)
    return percent(logits.argmax(1) == labels_of(images).cpu())


def train_teacher(setting: Setting, phase: Phase, seconds: float) -> tuple[Teacher, Run]:
    torch.manual_seed(setting.seed)
    teacher = Teacher(setting.recipe.teacher_width, len(setting.train.classes))
    teacher.to(setting.device).to(memory_format=memory_format(setting.device))
    loss = label_loss(setting.recipe.label_smoothing)
    run = train_phase("teacher", setting, phase, teacher, loss, seconds)
    teacher.load_state_dict(run.best)
    return teacher.eval().requires_grad_(False), run


def train_student(setting: Setting, teacher: Teacher | None, seconds: float) -> tuple[Any, Run]:
    """Train the ViT with the teacher, or from the labels alone; return it with its best weights."""
    torch.manual_seed(setting.seed)  # the same start whether or not the teacher was just trained
    recipe, classes = setting.recipe, len(setting.train.classes)
    vit = models.build_reference_vit(
        **recipe.architecture, num_classes=classes, drop_path=recipe.drop_path
    )
    loss = label_loss(recipe.label_smoothing)
    guide: nn.Module = nn.Identity()
    if teacher is not None:
        on_gpu = setting.device.type == "cuda"
        loss = distillation_loss(torch.compile(teacher) if on_gpu else teacher, recipe)
        guide = nn.Linear(recipe.architecture["width"], teacher.head.in_features)
    student = Student(vit, guide)
    student.to(setting.device).to(memory_format=memory_format(setting.device))
    run = train_phase("student", setting, recipe.student, student, loss, seconds)
    student.load_state_dict(run.best)
    return student.vit, run


# --- the result -----------------------------------------------------------------------------------


def describe_run(name: str, run: Run) -> dict[str, Any]:
    return {
        f"{name}_epochs": run.epoch,
        f"{name}_best_epoch": run.best_epoch,
        f"{name}_held_out_top1": round(run.best_top1, 2),
        f"{name}_minutes": round(run.seconds / 60, 2),
    }


def round_and_score(
    vit: nn.Module, recipe: Recipe, test_set: ImageSet, device: torch.device
) -> models.Checkpoint:
    """Round the weights to fp16 and look at the test images, once, in fp32."""
    state = models.round_to_half(vit)
    size = recipe.architecture["image_size"]
    top1 = top1_percent(vit.eval(), to_device(test_set, device), size)
    shape = recipe.architecture | {"num_classes": len(test_set.classes)}
    return models.Checkpoint(state, shape, Preprocessing(size, MEAN, STD), top1)


def minutes(text: str) -> float:
    """Argument type: a number above 0."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return float(text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add, number, names = parser.add_argument, cli.positive_int, models.REFERENCE_MODELS
    add("--model", choices=names, default=names[0], help="what to train")
    add("--data-dir", type=Path, help="folder of the data set; data/<dataset> if not given")
    add("--num-images", type=number, help="training images, class-balanced; all if not given")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    add("--epochs", type=number, help="of the student; the recipe's if not given")
    add("--seed", type=int, default=0, help="of everything random but the held-out images")
    add("--max-minutes", type=minutes, default=math.inf, help="of training: may plan fewer epochs")
    add("--output-dir", type=Path, help="for weights and card; weights/ if not given")
    add("--checkpoint-dir", type=Path, default=Path("results/train_reference"), help="for resuming")
    add("--quick", action="store_true", help="few images, one epoch; keeps out of weights/")
    return parser.parse_args(argv)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    recipe = shorten(RECIPES[args.model]) if args.quick else RECIPES[args.model]
    if args.epochs:
        recipe = replace(recipe, student=replace(recipe.student, epochs=args.epochs))
    device = cli.pick_device(args.device)
    checkpoints = cli.make_output_dir(args.checkpoint_dir / args.model)
    default_dir = checkpoints if args.quick else models.WEIGHTS_DIR
    path = cli.make_output_dir(args.output_dir or default_dir) / f"{args.model}.safetensors"
    cli.seed_everything(args.seed)
    prepare_backend(device)

    train_set = load_images(recipe.dataset, "train", args.data_dir, num_images=args.num_images)
    test_set = load_images(recipe.dataset, ACCURACY_SPLIT[recipe.dataset], args.data_dir)
    if args.quick:
        train_set, test_set = (
            take_subset(images, min(len(images), QUICK_IMAGES), args.seed)
            for images in (train_set, test_set)
        )
    train, held_out = hold_out(to_device(train_set, device), recipe.held_out)
    setting = Setting(recipe, train, held_out, args.seed, checkpoints)
    facts: dict[str, Any] = {"seed": args.seed}
    facts |= {"training_images": len(train), "held_out_images": len(held_out)}
    teacher, seconds = None, 60 * args.max_minutes
    if recipe.teacher is not None:
        teacher, run = train_teacher(setting, recipe.teacher, recipe.teacher_share * seconds)
        facts |= describe_run("teacher", run)
        seconds -= run.seconds
    vit, run = train_student(setting, teacher, seconds)
    facts |= describe_run("student", run)

    checkpoint = round_and_score(vit, recipe, test_set, device)
    network = models.build_reference_vit(**checkpoint.architecture)
    facts |= {"recipe": dataclasses.asdict(recipe)}
    models.write_checkpoint(path, checkpoint, network, test_set, facts, device)
    for file in checkpoints.glob("*.pt"):
        file.unlink()
    print(f"top-1 {checkpoint.top1:.2f} % of {len(test_set)} {test_set.split} images; wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
