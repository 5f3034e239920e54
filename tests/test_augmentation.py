"""Batched augmentation: exact small cases."""

import pytest
import torch

from utils.augmentation import (
    change_colour,
    channels,
    crop_and_flip,
    mix,
    mixing_weights,
    normalize,
    pad_for_crops,
    random_affine,
    random_boxes,
    warp,
)

CPU = torch.device("cpu")


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


def test_colour_factors():
    x = torch.rand(2, 3, 4, 4)
    one = torch.ones(2)
    change = change_colour
    torch.testing.assert_close(change(x, torch.stack([one, one, one])), x)
    torch.testing.assert_close(change(x, torch.stack([2 * one, one, one])), 2 * x)
    flat = x.mean((1, 2, 3), keepdim=True).expand_as(x)
    torch.testing.assert_close(change(x, torch.stack([one, 0 * one, one])), flat)
    grey = x.mean(1, keepdim=True).expand_as(x)
    torch.testing.assert_close(change(x, torch.stack([one, one, 0 * one])), grey)


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


def test_normalize_by_channel():
    x = torch.ones(1, 2, 1, 1)
    mean, std = (channels(values, x.device) for values in ((0.5, 1.0), (0.25, 2.0)))
    assert normalize(x, mean, std).flatten().tolist() == [2.0, 0.0]
