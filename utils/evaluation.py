"""Predictions, accuracy, and the paired comparison of a candidate with its baseline."""

from collections.abc import Callable, Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from utils.data import ImageSet, Preprocessing, labels_of, preprocess

ACCURACY_COLUMNS = (
    "num_images",
    "top1_percent",
    "top5_percent",
    "top1_full_head_percent",
    "top1_difference_points",
    "top1_difference_low_points",
    "top1_difference_high_points",
    "agreement_percent",
    "logit_cosine",
)


@torch.no_grad()
def predict(
    call: Callable[[Tensor], Tensor],
    images: Tensor,
    preprocessing: Preprocessing,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Run uint8 images `[N, 3, H, W]` through `call`; float32 logits `[N, C]` on the CPU.

    Every batch has exactly `batch_size` images (the last one is filled up with repeats, whose
    logits are dropped), so that a compiled model never meets a new shape.
    """
    logits = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padding = batch_size - len(batch)
        full = torch.cat([batch, batch[-1:].expand(padding, -1, -1, -1)]) if padding else batch
        output = torch.as_tensor(call(preprocess(full, preprocessing, device)))
        logits.append(output[: len(batch)].float().cpu())
    return torch.cat(logits)


def accuracy(
    call: Callable[[Tensor], Tensor], images: ImageSet, preprocessing: Preprocessing
) -> tuple[float, float]:
    """Top-1 and top-5 in percent of `call` on labelled images, on their device, single view."""
    batch_size, device = min(1000, len(images)), images.images.device
    logits = predict(call, images.images, preprocessing, batch_size, device)
    labels = labels_of(images).cpu()
    return percent(logits.argmax(1) == labels), percent(top_k_correct(logits, labels, 5))


def accuracy_row(
    logits: Tensor, baseline: Tensor, labels: Tensor | None, class_logits: Sequence[int] | None
) -> dict[str, float | None]:
    """One row of ACCURACY_COLUMNS.

    Args:
        logits, baseline: `[N, C]` of the candidate and of the baseline, over the same images.
        labels: int64 `[N]`, or None.
        class_logits: which logit stands for each class of the labels; None if accuracy means
            nothing, which leaves the accuracy columns empty.
    """
    row: dict[str, float | None] = dict.fromkeys(ACCURACY_COLUMNS)
    row["num_images"] = len(logits)
    row["logit_cosine"] = centred_cosine(logits, baseline)
    chosen = slice(None) if class_logits is None else class_logits
    scored, scored_baseline = logits[:, chosen], baseline[:, chosen]
    row["agreement_percent"] = percent(scored.argmax(1) == scored_baseline.argmax(1))
    if labels is None or class_logits is None:
        return row
    correct, correct_baseline = (x.argmax(1) == labels for x in (scored, scored_baseline))
    row["top1_percent"] = percent(correct)
    row["top5_percent"] = percent(top_k_correct(scored, labels, 5))
    if len(class_logits) < logits.shape[1]:
        row["top1_full_head_percent"] = percent(
            logits.argmax(1) == torch.tensor(class_logits)[labels]
        )
    if logits is not baseline:  # the baseline's difference to itself is no measurement
        names = ("points", "low_points", "high_points")
        for name, value in zip(names, paired_difference(correct, correct_baseline), strict=True):
            row[f"top1_difference_{name}"] = value
    return row


def percent(correct: Tensor) -> float:
    """Share of True in a bool tensor, in percent."""
    return 100 * int(correct.sum()) / correct.numel()  # exact: a mean's rounding would show


def top_k_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Bool `[N]`: is the label among the k largest of logits `[N, C]`?"""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).any(dim=1)


def centred_cosine(logits: Tensor, baseline: Tensor) -> float:
    """Mean over images of the cosine similarity of the logits, each centred over its classes.

    A shift common to all classes changes no prediction and no probability, so it is taken out. One
    or two logits have no angle but 0 and 180 degrees: those of all images make one vector.
    """
    x, y = logits.double(), baseline.double()
    if x.shape[1] > 1:
        x, y = (t - t.mean(dim=1, keepdim=True) for t in (x, y))
    if x.shape[1] <= 2:
        x, y = x.reshape(1, -1), y.reshape(1, -1)
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=1)
    return cosine.masked_fill((x == y).all(1), 1.0).mean().item()  # constant logits have no angle


def paired_difference(correct: Tensor, correct_baseline: Tensor) -> tuple[float, float, float]:
    """Difference of two accuracies on the same images in percentage points, and its 95 % interval.

    The interval is Bonett and Price's (2012), a Wald interval with one pseudo-observation in each
    discordant cell, recommended for paired proportions by Fagerland, Lydersen and Laake (2014,
    Statistics in Medicine 33). It does not shrink to nothing when no prediction changed.

    Args:
        correct, correct_baseline: bool `[N]`, candidate and baseline.
    """
    n = len(correct)
    gained = int((correct & ~correct_baseline).sum())
    lost = int((~correct & correct_baseline).sum())
    p_gained, p_lost = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre = p_gained - p_lost
    z = NormalDist().inv_cdf(0.975)
    half = z * ((p_gained + p_lost - centre**2) / (n + 2)) ** 0.5
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return 100 * (gained - lost) / n, 100 * low, 100 * high
