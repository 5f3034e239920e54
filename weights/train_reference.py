"""Train the small reference ViTs of `weights/`, which make every accuracy reproducible offline.

    python -m weights.train_reference --model vit_digits           # a CPU, about a minute
    python -m weights.train_reference --model vit_tiny_imagenet    # one H100, six minutes

From 256 images per class vit_tiny_imagenet reaches 56.7 % top-1 on the 10,000 labelled validation
images. A ViT learns little from so few, a convolutional network much more: so a small residual
network learns from the labels first, and the ViT learns from it, both looking at the same augmented
view (Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent"). 5 % of
the training images are held out to compare recipes by; the test images are looked at once, at the
end.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import tqdm

from utils import cli, data, models, training
from utils.data import ImageSet, Preprocessing
from utils.evaluation import accuracy

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
    temperature: float = 2.0  # softens both sides' probabilities in the distillation
    label_weight: float = 0.1  # of the labels, beside the teacher's probabilities
    guide_weight: float = 1.0  # of the agreement with the teacher's feature map

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.architecture["image_size"], MEAN, STD)


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
    images: Tensor, labels: Tensor, classes: int, size: int, strength: Augmentation
) -> tuple[Tensor, Tensor]:
    """uint8 `[N, 3, H, W]`, labels `[N]` -> float `[N, 3, size, size]`, targets `[N, classes]`."""
    n, device = len(images), images.device
    maps = training.random_affine(n, strength.crop_area, strength.rotation, strength.flip, device)
    x = training.warp(images.float().div_(255), maps, size)
    if strength.colour:
        x = training.random_colour(x, strength.colour)
    mean, std = (training.channels(values, device) for values in (MEAN, STD))
    x = x.clamp_(0, 1).sub_(mean).div_(std)
    weights = training.mixing_weights(n, size, strength.mixup, strength.cutmix, device)
    x, targets = training.mix(x, F.one_hot(labels, classes).float(), weights)
    boxes = training.random_boxes(training.uniform((n,), 0.02, 0.33, device), size)
    boxes &= torch.rand(n, 1, 1, 1, device=device) < strength.erase
    return x.masked_fill(boxes, 0), targets


def calm_down(strength: Augmentation) -> Augmentation:
    """Views close to the real images, for the last epochs: less noise in the labels."""
    return replace(strength, mixup=0, cutmix=0, erase=0, crop_area=max(strength.crop_area, 0.5))


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
        narrow = width
        for wide in (width, 2 * width, 4 * width, 8 * width):
            layers.append(PreActivationBlock(narrow, wide, stride=wide // narrow))
            layers.append(PreActivationBlock(wide, wide, stride=1))
            narrow = wide
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
class Task:
    """What both phases share; the images lie on the device."""

    recipe: Recipe
    train: ImageSet
    held_out: ImageSet

    @property
    def device(self) -> torch.device:
        return self.train.images.device


def make_optimizer(module: nn.Module, phase: Phase) -> torch.optim.Optimizer:
    """Weight decay acts on matrices and kernels, not on biases, norms and position embeddings."""
    exempt = ("pos_embed", "vit.pos_embed")
    groups = param_groups_weight_decay(module, phase.weight_decay, no_weight_decay_list=exempt)
    device = groups[0]["params"][0].device
    rate = torch.zeros((), device=device)  # a tensor, so that a CUDA graph reads each step's value
    on_gpu = device.type == "cuda"
    if phase.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, fused=on_gpu)
    return torch.optim.AdamW(groups, lr=rate, fused=on_gpu, capturable=on_gpu)


def make_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    phase: Phase,
    loss: Loss,
    task: Task,
    calm: bool,
) -> Callable[[Tensor], Tensor]:
    """One optimisation step: indices of a batch `[N]` -> its loss, without waiting for a GPU."""
    recipe, images, on_gpu = task.recipe, task.train, task.device.type == "cuda"
    strength = calm_down(recipe.augmentation) if calm else recipe.augmentation
    size = recipe.architecture["image_size"]
    forward = torch.compile(module) if on_gpu else module

    def step(batch: Tensor) -> Tensor:
        pixels, labels = images.images[batch], data.labels_of(images)[batch]
        x, targets = augment(pixels, labels, len(images.classes), size, strength)
        x = x.to(memory_format=training.memory_format(task.device))
        # On a CPU bf16 is seldom faster.
        with torch.autocast(task.device.type, torch.bfloat16, enabled=on_gpu):
            value = loss(forward(x), x, targets)
        value.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), phase.clip_norm)
        if on_gpu:  # fused optimizers leave out a step marked so; GradScaler relies on it too
            vars(optimizer)["found_inf"] = norm.isfinite().logical_not().float()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    if not on_gpu:
        return step
    return training.capture(
        step, torch.randperm(len(images), device=task.device)[: phase.batch_size]
    )


def train_phase(
    name: str, module: nn.Module, phase: Phase, loss: Loss, task: Task
) -> tuple[Any, dict[str, Any]]:
    """Train for the phase's epochs; return the module with averaged weights, and facts about it."""
    begin = time.perf_counter()
    module.to(task.device).to(memory_format=training.memory_format(task.device)).train()
    ema = ModelEmaV3(module, decay=phase.ema_decay, use_warmup=True)
    optimizer = make_optimizer(module, phase)
    # Both before the first update: recording a step makes three, which change nothing at rate zero.
    kinds = {False, phase.calm > 0}
    step_of = {calm: make_step(module, optimizer, phase, loss, task, calm) for calm in kinds}
    count = len(task.train)
    steps = max(1, count // phase.batch_size)  # in an epoch, all with full batches
    all_steps, warmup = phase.epochs * steps, phase.warmup * steps
    bar = tqdm(range(phase.epochs), desc=name, unit="epoch", disable=None)
    for epoch in bar:
        step = step_of[epoch >= (1 - phase.calm) * phase.epochs]
        batches = torch.randperm(count, device=task.device).split(phase.batch_size)[:steps]
        total = torch.zeros((), device=task.device)
        for i, batch in enumerate(batches, start=epoch * steps):
            rate = training.warmup_cosine(i, all_steps, warmup, phase.learning_rate)
            for group in optimizer.param_groups:
                group["lr"].fill_(rate)
            total += step(batch)
            ema.update(module, step=i)
        if not math.isfinite(total):  # waits for the device, once in an epoch
            raise cli.UserError(f"the loss is {float(total)}: lower the recipe's learning rate")
        bar.set_postfix_str(f"loss {float(total) / steps:.3f}")
    top1, _ = accuracy(lambda x: ema.module(x)[0], task.held_out, task.recipe.preprocessing)
    minutes = (time.perf_counter() - begin) / 60
    facts = {"epochs": phase.epochs, "held_out_top1": round(top1, 2), "minutes": round(minutes, 2)}
    return ema.module, {f"{name}_{key}": value for key, value in facts.items()}


def train_reference(task: Task) -> tuple[nn.Module, dict[str, Any]]:
    """Train the teacher, if there is one, then the ViT; return it on the device, and facts."""
    recipe, classes = task.recipe, len(task.train.classes)
    loss = label_loss(recipe.label_smoothing)
    guide: nn.Module = nn.Identity()
    facts: dict[str, Any] = {}
    if recipe.teacher is not None:
        teacher = Teacher(recipe.teacher_width, classes)
        guide = nn.Linear(recipe.architecture["width"], teacher.head.in_features)
        teacher, facts = train_phase("teacher", teacher, recipe.teacher, loss, task)
        on_gpu = task.device.type == "cuda"
        loss = distillation_loss(torch.compile(teacher) if on_gpu else teacher, recipe)
    vit = models.build_reference_vit(
        **recipe.architecture, num_classes=classes, drop_path=recipe.drop_path
    )
    student, more = train_phase("student", Student(vit, guide), recipe.student, loss, task)
    return student.vit, facts | more


# --- the command line -----------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add, names = parser.add_argument, models.REFERENCE_MODELS
    add("--model", choices=names, default=names[0], help="what to train")
    add("--data-dir", type=Path, help="folder of the data set; data/<dataset> if not given")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    add("--seed", type=cli.seed, default=0, help="of everything random but the held-out images")
    add("--output-dir", type=Path, default=models.WEIGHTS_DIR, help="for weights and card")
    quick = {"model": "vit_digits", "output_dir": Path("results/train_reference")}
    return cli.parse_quick(parser, argv, quick)


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    recipe = shorten(RECIPES[args.model]) if args.quick else RECIPES[args.model]
    device = cli.pick_device(args.device)
    path = cli.make_output_dir(args.output_dir) / f"{args.model}.safetensors"
    cli.seed_everything(args.seed)
    training.prepare_backend(device)

    load = functools.partial(
        data.load_images, recipe.dataset, data_dir=args.data_dir, seed=args.seed, fewer=True
    )
    number = QUICK_IMAGES if args.quick else None
    train_set = load("train", num_images=number)
    test_set = load(data.ACCURACY_SPLIT[recipe.dataset], num_images=number)
    train, held_out = data.hold_out(data.to_device(train_set, device), recipe.held_out)
    vit, facts = train_reference(Task(recipe, train, held_out))

    models.round_to_half(vit)
    top1, _ = accuracy(vit.eval(), data.to_device(test_set, device), recipe.preprocessing)
    architecture = recipe.architecture | {"num_classes": len(test_set.classes)}
    facts |= {"architecture": architecture, "top1": round(top1, 2), "recipe": asdict(recipe)}
    facts |= {"seed": args.seed, "training_images": len(train), "held_out_images": len(held_out)}
    models.write_checkpoint(path, vit, recipe.preprocessing, test_set, facts)
    print(f"top-1 {top1:.2f} % of {len(test_set)} {test_set.split} images; wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
