"""Batched augmentation in exact small cases, the schedule against PyTorch's, Muon's definition."""

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from utils import training
from utils.training import (
    Muon,
    as_kernel,
    as_matrix,
    capture,
    channels,
    crop_and_flip,
    mix,
    mixing_weights,
    orthogonalize,
    pad_for_crops,
    prepare_backend,
    random_affine,
    random_boxes,
    random_colour,
    warmup_cosine,
    warp,
    whitening_kernels,
)

CPU = torch.device("cpu")

# --- augmentation ---------------------------------------------------------------------------------


def ramp(n: int = 1, size: int = 4) -> torch.Tensor:
    return torch.arange(n * 3 * size * size).float().view(n, 3, size, size)


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ([[1, 0, 0], [0, 1, 0]], lambda x: x),
        ([[-1, 0, 0], [0, 1, 0]], lambda x: x.flip(3)),
        ([[0, 1, 0], [-1, 0, 0]], lambda x: x.rot90(-1, (2, 3))),
        ([[1, 0, 0.5], [0, 1, 0]], lambda x: x[..., [1, 2, 3, 3]]),  # one pixel; reflected
    ],
)
def test_warp_moves_pixels_exactly(matrix, expected):
    x = ramp()
    warped = warp(x, torch.tensor([matrix]).float(), 4)
    torch.testing.assert_close(warped, expected(x), atol=1e-3, rtol=0)


def test_random_affine_does_nothing_when_switched_off():
    identity = torch.eye(2, 3).expand(8, 2, 3)
    assert torch.equal(random_affine(8, 1.0, 0.0, False, CPU), identity)


def test_random_affine_crops_inside_the_image_and_flips_half():
    torch.manual_seed(0)
    affine = random_affine(4000, 0.25, 0.0, True, CPU)
    width, height = affine[:, 0, 0], affine[:, 1, 1]
    assert (width.abs() + affine[:, 0, 2].abs() <= 1 + 1e-5).all()
    assert (height + affine[:, 1, 2].abs() <= 1 + 1e-5).all()
    area = width.abs() * height
    assert area.max() <= 1
    assert area.min() > 0.24
    assert (width < 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert affine[:, 0, 1].eq(0).all()  # no rotation


@pytest.mark.parametrize(
    ("brightness", "contrast", "saturation", "expected"),
    [
        (1, 1, 1, lambda x: x),
        (2, 1, 1, lambda x: 2 * x),
        (1, 0, 1, lambda x: x.mean((1, 2, 3), keepdim=True).expand_as(x)),
        (1, 1, 0, lambda x: x.mean(1, keepdim=True).expand_as(x)),
    ],
)
def test_colour_factors(brightness, contrast, saturation, expected, monkeypatch):
    factors = torch.tensor([brightness, contrast, saturation]).float().view(3, 1, 1, 1, 1)
    monkeypatch.setattr(training, "uniform", lambda shape, *_: factors.expand(shape))
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(random_colour(x, 1.0), expected(x))


def test_random_boxes_are_squares_of_the_share_asked_for():
    torch.manual_seed(0)
    boxes = random_boxes(torch.tensor([0.0, 0.25, 1.0, 0.1]), 8)
    assert boxes.shape == (4, 1, 8, 8)
    assert boxes.sum((1, 2, 3)).tolist() == [0, 16, 64, 9]
    rows = boxes[1, 0].any(1).nonzero()
    assert rows.max() - rows.min() == 3  # contiguous


def test_mixing_weights_by_kind():
    torch.manual_seed(0)
    untouched = mixing_weights(50, 8, 0.0, 0.0, CPU)
    mixup = mixing_weights(50, 8, 1.0, 0.0, CPU)
    cutmix = mixing_weights(50, 8, 0.0, 1.0, CPU)
    assert untouched.eq(1).all()
    assert (mixup.amax((1, 2, 3)) == mixup.amin((1, 2, 3))).all()
    assert mixup.unique().numel() == 50
    assert set(cutmix.unique().tolist()) == {0.0, 1.0}


def test_mix_blends_images_and_targets_alike():
    x = torch.tensor([1.0, 5.0]).view(2, 1, 1, 1).expand(2, 3, 2, 2)
    weights = torch.ones(2, 1, 2, 2)
    weights[0, 0, 0, 0] = 0  # a quarter of the first image comes from the second
    mixed, targets = mix(x, torch.eye(2), weights)
    assert mixed[0, 0].tolist() == [[5, 1], [1, 1]]
    assert mixed[1].eq(5).all()
    assert targets.tolist() == [[0.75, 0.25], [0, 1]]


def test_padding_mirrors_the_borders():
    images = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3).expand(2, 3, 3, 3)
    padded = pad_for_crops(images, 1)
    assert padded.shape == (2, 5, 5, 3)
    assert padded.dtype == torch.uint8
    assert padded[1, 0, :, 2].tolist() == [4, 3, 4, 5, 4]
    assert torch.equal(padded[:, 1:4, 1:4].permute(0, 3, 1, 2), images)


def test_crops_are_windows_of_the_chosen_images_mirrored_as_told():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8)
    padded = pad_for_crops(images, 2)
    chosen = torch.tensor([3, 1]).repeat(400)
    mirrored = torch.tensor([False, True, False, False])
    crops = crop_and_flip(padded, chosen, 6, mirrored)
    assert crops.shape == (800, 3, 6, 6)
    assert crops.is_contiguous(memory_format=torch.channels_last)
    seen = set()
    whole = padded.permute(0, 3, 1, 2)
    for crop, index in zip(crops, chosen.tolist(), strict=True):
        (place,) = [
            (y, x, flip)
            for y in range(5)
            for x in range(5)
            for flip in (False, True)
            if torch.equal(crop.flip(2) if flip else crop, whole[index, :, y : y + 6, x : x + 6])
        ]
        seen.add(place[:2])
        assert place[2] == mirrored[index]
    assert len(seen) == 25


def test_crops_without_padding_and_flip_are_the_images():
    images = torch.randint(0, 256, (3, 3, 5, 5), dtype=torch.uint8)
    unchanged = torch.zeros(3, dtype=torch.bool)
    crops = crop_and_flip(pad_for_crops(images, 0), torch.tensor([2, 0]), 5, unchanged)
    assert torch.equal(crops, images[[2, 0]])


def test_values_of_channels_broadcast_over_images():
    mean, std = (channels(values, CPU) for values in ((0.5, 1.0), (0.25, 2.0)))
    assert ((torch.ones(1, 2, 1, 1) - mean) / std).flatten().tolist() == [2.0, 0.0]


# --- schedule, Muon, whitening, CUDA graphs -------------------------------------------------------


def test_warmup_cosine_agrees_with_torch_schedulers():
    steps, warmup, peak = 50, 8, 0.3
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    reference = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup),
        ],
        milestones=[warmup],
    )
    for step in range(steps):
        ours = warmup_cosine(step, steps, warmup, peak)
        assert ours == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_orthogonalized_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    x = torch.randn(3, 16, 144)
    values = torch.linalg.svdvals(orthogonalize(x, iterations=5).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_orthogonalizing_keeps_the_directions():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 72)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    cosine = torch.cosine_similarity(orthogonalize(x, 5).float().flatten(), (u @ vh).flatten(), 0)
    assert cosine > 0.98


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_kernels_become_matrices_and_back(memory_format):
    kernel = torch.randn(6, 4, 3, 3).to(memory_format=memory_format)
    matrix = as_matrix(kernel)
    assert matrix.shape == (6, 36)
    assert matrix[2, :4].equal(kernel[2, :, 0, 0])
    assert torch.equal(as_kernel(matrix.clone(), kernel), kernel)


def test_muon_steps_have_the_length_of_the_learning_rate_and_keep_the_kernels_length():
    torch.manual_seed(0)
    kernels = [nn.Parameter(torch.randn(8, 4, 3, 3)) for _ in range(2)]
    kernels.append(nn.Parameter(torch.randn(16, 8, 3, 3)))
    optimizer = Muon(kernels, torch.tensor(0.0), momentum=0.9)
    for kernel in kernels:
        kernel.grad = torch.randn_like(kernel)
    optimizer.update()  # at learning rate zero only the length changes
    for kernel in kernels:
        assert kernel.norm().item() == pytest.approx(len(kernel) ** 0.5, rel=1e-5)
    before = [kernel.detach().clone() for kernel in kernels]
    optimizer.param_groups[0]["lr"].fill_(0.1)
    optimizer.update()
    for kernel, old in zip(kernels, before, strict=True):
        relative = (kernel - old).norm() / old.norm()
        assert relative.item() == pytest.approx(0.1, rel=0.25)


def test_muon_descends():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(4, 2, 3, 3))
    target = torch.randn(4, 2, 3, 3)
    target *= 2 / target.norm()
    optimizer = Muon([kernel], torch.tensor(0.1), momentum=0.6)
    losses = []
    for _ in range(60):
        loss = (kernel - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.update()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[1]


def test_muon_treats_kernels_of_one_shape_each_by_itself():
    torch.manual_seed(0)
    start, gradients = torch.randn(2, 8, 4, 3, 3), torch.randn(2, 8, 4, 3, 3)
    together = [nn.Parameter(x.clone()) for x in start]
    alone = [nn.Parameter(x.clone()) for x in start]
    optimizers = [Muon(together, torch.tensor(0.1), 0.9)]
    optimizers += [Muon([kernel], torch.tensor(0.1), 0.9) for kernel in alone]
    for _ in range(3):
        for kernels in (together, alone):
            for kernel, gradient in zip(kernels, gradients, strict=True):
                kernel.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.update()
    for first, second in zip(together, alone, strict=True):
        torch.testing.assert_close(first, second, atol=1e-2, rtol=1e-2)  # bf16 products


class FakeStream:
    def __init__(self, device: object = None) -> None: ...

    def wait_stream(self, other: "FakeStream") -> None: ...


class FakeGraph:
    def replay(self) -> None: ...


def fake_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that record nothing: a replay returns what the recording returned."""
    for name, fake in {
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "CUDAGraph": FakeGraph,
        "stream": contextlib.nullcontext,
        "graph": lambda graph, stream: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def test_a_captured_step_keeps_the_memory_that_its_graph_reads(monkeypatch):
    class Images:
        """Stands for a tensor that only the step refers to."""

    images = Images()
    alive = weakref.ref(images)

    def step(batch: torch.Tensor, images: Images = images) -> torch.Tensor:
        return torch.ones(())

    fake_cuda_graphs(monkeypatch)
    replay = capture(step, torch.arange(4))
    del step, images
    gc.collect()
    assert alive() is not None
    assert replay(torch.zeros(4, dtype=torch.int64)) == 1


def test_a_training_on_another_gpu_makes_it_the_current_one(monkeypatch: pytest.MonkeyPatch):
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    for device in ("cpu", "cuda", "cuda:1"):
        prepare_backend(torch.device(device), threads=torch.get_num_threads())
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_trains_like_the_plain_one():
    results = []
    for captured in (False, True):
        images = torch.linspace(0, 1, 64 * 8, device="cuda").view(64, 8)
        weight = torch.zeros(8, device="cuda", requires_grad=True)
        rate = torch.zeros((), device="cuda")
        run = make_linear_step(images, weight, rate)
        if captured:
            run = capture(run, torch.arange(64, device="cuda"))
        del images
        rate.fill_(0.1)
        for _ in range(20):
            torch.rand(64, 8, device="cuda")  # would overwrite memory set free
            run(torch.arange(64, device="cuda"))
        results.append(weight.detach())
    torch.testing.assert_close(*results)


def make_linear_step(images: torch.Tensor, weight: torch.Tensor, rate: torch.Tensor):
    def step(batch: torch.Tensor) -> torch.Tensor:
        loss = (images[batch] @ weight - 1).square().mean()
        loss.backward()
        with torch.no_grad():
            assert weight.grad is not None
            weight.sub_(rate * weight.grad)
        weight.grad = None
        return loss.detach()

    return step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_a_captured_module_may_go_and_takes_images_from_the_host():
    module = torch.nn.Linear(512, 512).cuda()
    x = torch.rand(4, 8, 512)
    expected = module(x.cuda()).cpu()
    replay = capture(module, x[0].cuda())
    del module
    gc.collect()
    filled = [torch.full((512, 512), 7.0, device="cuda") for _ in range(20)]
    for images, logits in zip(x, expected, strict=True):
        for given in (images.cuda(), images.pin_memory()):
            torch.testing.assert_close(replay(given).cpu(), logits, rtol=1e-4, atol=1e-4)
    assert all(bool((t == 7).all()) for t in filled)


def test_warmup_never_exceeds_the_peak():
    for warmup in (0.0, 0.2, 1.5, 3.0):
        rates = [warmup_cosine(step, 6, warmup, 0.3) for step in range(6)]
        assert max(rates) <= 0.3
        assert rates[-1] < 0.15


def test_whitened_patches_are_decorrelated():
    torch.manual_seed(0)
    smooth = nn.functional.avg_pool2d(torch.randn(50, 3, 20, 20), 3, stride=1)
    x = smooth + smooth.mean(1, keepdim=True)
    kernels = whitening_kernels(x, 6)
    assert kernels.shape == (12, 3, 3, 3)
    torch.testing.assert_close(kernels[6:], -kernels[:6])
    responses = nn.functional.conv2d(x, kernels[:6]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(
        responses @ responses.T / responses.shape[1], torch.eye(6), atol=0.05, rtol=0
    )


def test_compiled_muon_updates_like_muon():
    """As torch.compile traces it, without the code generator, which wants a C++ compiler."""
    results = []
    for compiled, rate in ((False, 0.1), (True, 0.1), (False, 0.0)):
        torch.manual_seed(0)
        kernels = [nn.Parameter(torch.randn(4, 4, 3, 3)) for _ in range(2)]
        optimizer = Muon(kernels, torch.tensor(rate), momentum=0.9)
        update: Any = optimizer.update
        if compiled:
            update = torch.compile(optimizer.update, dynamic=False, backend="aot_eager")
        for _ in range(3):
            for kernel in kernels:
                kernel.grad = torch.randn_like(kernel)
            update()
        results.append(torch.stack([kernel.detach() for kernel in kernels]))
    eager, fused, unmoved = results
    torch.testing.assert_close(fused, eager, atol=5e-3, rtol=0)  # its products are in bf16
    assert (eager - unmoved).abs().max() > 0.05
