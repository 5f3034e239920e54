"""What training loops share: augmentation by the batch, a schedule, Muon, a step as a CUDA graph.

Augmentation is a few tensor operations on the batch's device, each image with its own numbers.
Images are float `[N, C, H, W]` unless a function says otherwise. Nothing waits for the device, so
that a whole training step can be recorded as a CUDA graph.
"""

import functools
import gc
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- augmentation: geometry -----------------------------------------------------------------------


def uniform(shape: tuple[int, ...], low: float, high: float, device: torch.device) -> Tensor:
    return torch.rand(shape, device=device) * (high - low) + low


@functools.cache  # copied to the device once: a copy in every step would wait for the device
def channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Per-channel values as `[1, C, 1, 1]`, to normalise with."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


def change_bytes(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of float images, from 0 to 255, to uint8 ones, in parts to save memory."""
    return torch.cat([change(part.float()).round().byte() for part in images.split(10_000)])


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 `[N, C, H, W]` -> `[N, C, size, size]`, antialiased."""
    smaller = functools.partial(F.interpolate, size=(size, size), mode="bilinear", antialias=True)
    return change_bytes(images, smaller)


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


# --- augmentation: colour and mixtures ------------------------------------------------------------


def random_colour(x: Tensor, change: float) -> Tensor:
    """Scale each image's brightness, contrast and saturation by 1 - `change` to 1 + `change`."""
    factors = uniform((3, len(x), 1, 1, 1), 1 - change, 1 + change, x.device)
    brightness, contrast, saturation = factors
    x = x * brightness
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True), x, contrast)
    return torch.lerp(x.mean(1, keepdim=True), x, saturation)


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


# --- the step -------------------------------------------------------------------------------------


def memory_format(device: torch.device) -> torch.memory_format:
    """The layout of images and kernels that a device's convolutions are fastest with."""
    # Not on CPUs: oneDNN chooses for itself, and with torch 2.14 a channels-last convolution from 3
    # to 8 channels corrupted the heap in its backward pass (AVX-512, 64x64 images).
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def prepare_backend(
    device: torch.device, threads: int | None = None, benchmark: bool = True
) -> None:
    """Set up PyTorch in this process; fp32 stays true fp32, as accuracies are reported in it.

    Args:
        device: becomes the current one, if it is a GPU with an index: streams and graphs are its.
        threads: of the CPU; left as they are if None.
        benchmark: let cuDNN try its kernels, which takes seconds for every new shape.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = benchmark
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if threads is not None:
        torch.set_num_threads(threads)


def warmup_cosine(step: int, steps: int, warmup_steps: float, peak: float) -> float:
    """Learning rate of a step, counted from 0: linear up to `peak`, then cosine down to zero."""
    if step < warmup_steps:
        return peak * min(1.0, (step + 1) / warmup_steps)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def capture(step: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """Record a step as a CUDA graph: it replays at one launch instead of several hundred.

    `step` takes a tensor like `example`, the indices of a batch or images, and returns a tensor,
    which every replay overwrites. It runs three times before the recording: a training step should
    do so at learning rate zero, or on weights that are restored. A replay also takes its tensor
    from pinned host memory.
    """
    gc.collect()  # an old graph that ends later would free workspaces of this stream
    batch, side = example.clone(), _capture_stream(example.device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compile, choose kernels, allocate
            step(batch)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        value = step(batch)
    return functools.partial(_replay, graph, batch, value, step)


@functools.cache  # cuBLAS keeps a workspace for every stream it has met
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _replay(
    graph: torch.cuda.CUDAGraph,
    batch: Tensor,
    value: Tensor,
    step: Callable[[Tensor], Tensor],  # kept, not called: the graph reads the memory it refers to
    chosen: Tensor,
) -> Tensor:
    batch.copy_(chosen, non_blocking=True)
    graph.replay()
    return value


WHITENING_FLOOR = 1e-2  # variance, of pixels of unit variance, below which a component is damped


def whitening_kernels(x: Tensor, components: int) -> Tensor:
    """Kernels whose responses to the 3x3 patches of images are decorrelated and of unit variance.

    Patch whitening as by Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU". Components
    with little variance, all but 9 in grey images, respond weakly: they would be amplified noise.

    Args:
        x: images, float `[N, C, H, W]`, normalised to mean 0 and deviation 1 in each channel.
        components: principal components of the patches to use, the largest first; at most 9 C.

    Returns:
        `[2 components, C, 3, 3]`: each kernel, then each once more with the other sign.
    """
    moments = torch.zeros((), dtype=torch.double, device=x.device)
    for part in x.split(100):  # patches take nine times the memory of their images
        patches = F.unfold(part, 3).transpose(1, 2).flatten(0, 1)
        moments = moments + (patches.T @ patches).double()
    number = len(x) * (x.shape[2] - 2) * (x.shape[3] - 2)
    values, vectors = torch.linalg.eigh(moments / number)
    scaled = (vectors / (values + WHITENING_FLOOR).sqrt()).T.flip(0)[:components]
    return torch.cat([scaled, -scaled]).to(x.dtype).unflatten(1, (x.shape[1], 3, 3))


# --- Muon -----------------------------------------------------------------------------------------

# Quintic whose iteration drives singular values towards 1 (Jordan et al. 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for the kernels of convolutions.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks". As each kernel
    is followed by a normalisation, its length means nothing: it is kept at the square root of its
    output channels, so that the learning rate is the relative length of a step and weight decay
    has no role. Kernels of one shape are orthogonalised together, and the learning rate may be a
    tensor: both for CUDA graphs, which torch.optim.Muon (matrices only) does not serve.

    Args:
        parameters: kernels `[out, in, height, width]`.
        lr: learning rate, a 0-d tensor on their device.
        momentum: Nesterov momentum.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: Tensor, momentum: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        for kernels in group_by_shape(self.param_groups[0]["params"]):
            # One buffer for all of a shape; made here, as a compiled update sees no first call.
            buffer = torch.zeros_like(torch.stack([as_matrix(k.detach()) for k in kernels]))
            self.state[kernels[0]]["momentum"] = buffer

    @torch.no_grad()
    def update(self) -> None:
        """An optimiser's `step` without its hooks: torch.compile takes it whole."""
        (group,) = self.param_groups
        momentum = group["momentum"]
        for kernels in group_by_shape(group["params"]):
            gradients = torch.stack([as_matrix(k.grad) for k in kernels if k.grad is not None])
            velocity = self.state[kernels[0]]["momentum"].mul_(momentum).add_(gradients)
            steps = orthogonalize(gradients.add(velocity, alpha=momentum)).float() * -group["lr"]
            norms = torch._foreach_norm(kernels)
            scales = [len(k) ** 0.5 / norm for k, norm in zip(kernels, norms, strict=True)]
            torch._foreach_mul_(kernels, scales)
            changes = [as_kernel(step, k) for step, k in zip(steps, kernels, strict=True)]
            torch._foreach_add_(kernels, changes)


def group_by_shape(kernels: Iterable[Tensor]) -> list[list[Tensor]]:
    alike: dict[torch.Size, list[Tensor]] = {}
    for kernel in kernels:
        alike.setdefault(kernel.shape, []).append(kernel)
    return list(alike.values())


def as_matrix(kernel: Tensor) -> Tensor:
    """`[out, in, height, width]` -> `[out, height * width * in]`: a view if channels-last."""
    return kernel.permute(0, 2, 3, 1).flatten(1)


def as_kernel(matrix: Tensor, like: Tensor) -> Tensor:
    """The inverse of `as_matrix`, for a kernel shaped `like` this one."""
    out, channels, height, width = like.shape
    return matrix.view(out, height, width, channels).permute(0, 3, 1, 2)


def orthogonalize(x: Tensor, iterations: int = 3) -> Tensor:
    """Bring the singular values of matrices `[N, rows, columns]` near 1, in bf16.

    A Newton-Schulz iteration; rows must not outnumber columns for it to be cheap.
    """
    a, b, c = NEWTON_SCHULZ
    x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
