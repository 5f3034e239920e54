"""Augmentation as a few tensor operations a batch, on its device, each image with its own numbers.

Images are float `[N, C, H, W]` unless a function says otherwise. Nothing waits for the device, so
that a whole training step can be recorded as a CUDA graph.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform(shape: tuple[int, ...], low: float, high: float, device: torch.device) -> Tensor:
    return torch.rand(shape, device=device) * (high - low) + low


@functools.cache  # copied to the device once: a copy in every step would wait for the device
def channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Per-channel values as `[1, C, 1, 1]`, to normalise with."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def normalize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Subtract each channel's mean and divide by its deviation, both from `channels`, in place."""
    return x.sub_(mean).div_(std)


# --- geometry -------------------------------------------------------------------------------------


def change_bytes(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of float images to uint8 ones, a part at a time to save memory.

    What it returns is rounded, and has to lie between 0 and 255.
    """
    return torch.cat([change(part.float()).round().byte() for part in images.split(10_000)])


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 `[N, C, H, W]` -> `[N, C, size, size]`, antialiased."""
    how = functools.partial(F.interpolate, size=(size, size), mode="bilinear", antialias=True)
    return change_bytes(images, how)


def pad_for_crops(images: Tensor, padding: int) -> Tensor:
    """uint8 `[N, C, H, W]` -> `[N, H + 2 padding, W + 2 padding, C]`, mirrored at the borders."""
    padded = change_bytes(images, lambda part: F.pad(part, (padding,) * 4, "reflect"))
    return padded.permute(0, 2, 3, 1).contiguous()


def crop_and_flip(padded: Tensor, chosen: Tensor, size: int, mirrored: Tensor) -> Tensor:
    """Random crops of the `chosen` images `[N]` of `pad_for_crops`.

    Args:
        mirrored: bool, for each image of `padded`: mirror it left-right.

    Returns their pixels, uint8 `[N, C, size, size]` in channels-last memory, by one gather.
    """
    n, device = len(chosen), padded.device
    offsets = torch.randint(0, padded.shape[1] - size + 1, (2, n, 1), device=device)
    rows, columns = offsets + torch.arange(size, device=device)
    columns = torch.where(mirrored[chosen][:, None], columns.flip(1), columns)
    pixels = padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
    return pixels.permute(0, 3, 1, 2)


def random_affine(
    n: int, crop_area: float, rotation: float, flip: bool, device: torch.device
) -> Tensor:
    """Random crop, flip and rotation as maps `[N, 2, 3]` from output to input coordinates.

    Crops as by Szegedy et al. 2015: area from `crop_area` to 1, aspect ratio from 3/4 to 4/3.
    `rotation` is in degrees, at most, either way.
    """
    area = uniform((n,), crop_area, 1, device)
    stretch = torch.exp(uniform((n,), -0.5, 0.5, device) * math.log(4 / 3) * (crop_area < 1))
    width, height = ((area.sqrt() * s).clamp(max=1) for s in (stretch, 1 / stretch))
    x0, y0 = ((1 - side) * uniform((n,), -1, 1, device) for side in (width, height))
    if flip:
        width = width * torch.randint(0, 2, (n,), device=device).mul_(2).sub_(1)
    angle = uniform((n,), -1, 1, device) * math.radians(rotation)
    cos, sin = angle.cos(), angle.sin()
    rows = [width * cos, -width * sin, x0, height * sin, height * cos, y0]
    return torch.stack(rows, dim=1).view(n, 2, 3)


def warp(x: Tensor, affine: Tensor, size: int) -> Tensor:
    """Resample `[N, C, H, W]` through the maps `[N, 2, 3]` into `[N, C, size, size]`."""
    grid = F.affine_grid(affine, [len(x), x.shape[1], size, size], align_corners=False)
    return F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


# --- colour and mixtures --------------------------------------------------------------------------


def change_colour(x: Tensor, factors: Tensor) -> Tensor:
    """Scale each image's brightness, contrast and saturation by `factors` `[3, N]`."""
    brightness, contrast, saturation = factors.view(3, -1, 1, 1, 1)
    x = x * brightness
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast)
    return torch.lerp(x.mean(1, keepdim=True), x, saturation)


def random_colour(x: Tensor, change: float) -> Tensor:
    """Change each image's brightness, contrast and saturation by random shares up to `change`."""
    factors = uniform((3, len(x)), 1 - change, 1 + change, x.device)
    return change_colour(x, factors)


def random_boxes(area: Tensor, size: int) -> Tensor:
    """Shares of the area `[N]` -> `[N, 1, S, S]`, True in a random square that lies inside."""
    side = (area.sqrt() * size).round()
    corners = (torch.rand(2, len(area), device=area.device) * (size - side + 1)).floor()
    position = torch.arange(size, device=area.device)
    after = position >= corners[..., None]
    rows, columns = after & (position < (corners + side)[..., None])
    return rows[:, None, :, None] & columns[:, None, None, :]


def mixing_weights(n: int, size: int, mixup: float, cutmix: float, device: torch.device) -> Tensor:
    """Each pixel's weight of the image itself, `[N, 1, S, S]`; its partner has the rest.

    A share `mixup` of the images gets one weight everywhere (Zhang et al. 2018, "mixup"), a share
    `cutmix` 0 in a square (Yun et al. 2019, "CutMix"), the others 1.
    """
    kind, share = torch.rand(2, n, 1, 1, 1, device=device)
    cut = 1 - random_boxes(share.flatten(), size).float()
    return torch.where(kind < mixup, share, torch.where(kind < mixup + cutmix, cut, 1.0))


def mix(x: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Blend each image and its target with those of its neighbour; batches come shuffled."""
    share = weights.mean((1, 2, 3))[:, None]
    # Tensor.roll would copy channels-last images into another layout.
    partners, partner_targets = (torch.cat([t[-1:], t[:-1]]) for t in (x, targets))
    return torch.lerp(partners, x, weights), torch.lerp(partner_targets, targets, share)
