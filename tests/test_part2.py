"""Part 2: the network, the budget of a training, the three stages and the command line."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
from torch import nn

import part2_tune as part2
from tests.study_objectives import InlineWorker
from utils import data, models, study, training
from utils.cli import UserError
from utils.data import ROOT, ImageSet, load_images, preprocess
from utils.evaluation import accuracy
from utils.training import Muon

CPU = torch.device("cpu")
SMALL = part2.HParams(width=8, depth1=1, depth2=1, depth3=1, batch_size=32)
TINY_RUN = ["--dataset", "digits", "--device", "cpu", "--threads", "1", "--train-images", "200"]
TINY_RUN += ["--train-seconds", "0.2", "--trials", "3", "--finalists", "2", "--finalist-seeds", "2"]
TINY_RUN += ["--repeats", "2", "--max-params", "200000", "--study-name", "tiny"]
TINY_RUN += ["--sampler", "random", "--tolerance", "1000"]


def digits_task(num_images: int = 300) -> part2.Task:
    return part2.make_task(load_images("digits", "train", num_images=num_images), False, CPU)


def two_class_task(images: torch.Tensor) -> part2.Task:
    """A task of uint8 images `[N, 3, S, S]`, whose classes take turns."""
    labels = torch.arange(len(images)) % 2
    return part2.make_task(ImageSet("x", "train", images, labels, ("a", "b")), True, CPU)


class Clock:
    """A clock that only stands for the time that steps take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost_s: Callable[[int, int], float]):
        """`cost_s`: of a step, from the images' side and the number of the step since the start."""
        self.now, self.steps, self.cost_s = 0.0, 0, cost_s
        self.sizes: list[int] = []
        monkeypatch.setattr(part2, "make_step", self.make_step)

    def __call__(self) -> float:
        return self.now

    def make_step(self, *arguments: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        size = arguments[-1].size

        def step(batch: torch.Tensor) -> torch.Tensor:
            self.now += self.cost_s(size, self.steps)
            self.steps += 1
            self.sizes.append(size)
            return torch.ones(())

        return step


def load_network(path: Path) -> models.LoadedModel:
    return models.load_model(models.ModelSource(str(path), network=part2.SmallCNN))


# --- the network and its search space -------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 32, 96])
@pytest.mark.parametrize("depths", [(0, 1, 1), (2, 3, 3), (0, 3, 1)])
@pytest.mark.parametrize("size", [8, 32, 33])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("whiten", [False, True])
def test_network_shapes_and_parameter_count(width, depths, size, pool, whiten):
    network = part2.SmallCNN(width, depths, 7, pool, whiten)
    x = torch.randn(2, 3, size, size)
    assert network(x).shape == (2, 7)
    first, white = 2 if whiten else 0, 32
    sides = [size]
    for _ in range(3):
        sides.append(sides[-1] // 2 if pool else (sides[-1] + 1) // 2)
    half, quarter = sides[whiten + 1 : whiten + 3]
    assert network.features[: first + 2 + depths[0]](x).shape == (2, 2 * width, half, half)
    assert network.features(x).shape == (2, 4 * width, quarter, quarter)
    stages = [width, 2 * width, 4 * width]
    inputs = [white if whiten else 3, *stages[:2]]
    kernels = sum(9 * n * w for n, w in zip(inputs, stages, strict=True)) + whiten * 27 * white
    kernels += sum(2 * d * 9 * w * w for d, w in zip(depths, stages, strict=True))
    norms = sum((1 + 2 * d) * 2 * w for d, w in zip(depths, stages, strict=True))
    assert sum(p.numel() for p in network.parameters()) == kernels + norms + 7 * (4 * width + 1)


def test_residual_blocks_pass_positive_input_through_before_training():
    x = torch.rand(2, 8, 4, 4) + 10  # where SiLU is the identity
    torch.testing.assert_close(part2.ResidualBlock(8)(x), x, atol=1e-3, rtol=0)


def test_pooling_takes_the_largest_before_the_normalisation():
    layer = part2.ConvNormAct(1, 1, pool=True)
    conv = layer[0]
    assert isinstance(conv, nn.Conv2d)
    nn.init.dirac_(conv.weight)
    layer.eval()
    nn.init.constant_(layer.get_parameter("2.weight"), -1)  # else the order would not show
    x = torch.tensor([[1.0, -4.0, 2.0], [3.0, 2.0, 9.0]]).view(1, 1, 2, 3)
    expected = nn.functional.silu(torch.tensor(-3.0)).view(1, 1, 1, 1)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=0)


def test_the_committed_network_with_an_earlier_card_loads():
    path = ROOT / "weights" / "smallcnn_cifar100.safetensors"
    model = load_network(path)
    card = json.loads(path.with_suffix(".json").read_text())
    assert "dropout" in card["architecture"]
    found = models.sample_logits(model.module, 32)
    assert torch.tensor(found).allclose(torch.tensor(card["sample_logits"]), atol=1e-3)


def test_search_space_is_that_of_the_configurations_and_holds_the_default():
    space = part2.search_space(50_000)
    default = asdict(part2.HParams())
    assert set(space) == set(default)
    # Raises if it is outside.
    optuna.trial.create_trial(value=0.0, params=default, distributions=dict(space))
    bounds = {name: (d.low, d.high) for name, d in space.items() if hasattr(d, "low")}
    assert bounds == {
        "width": (32, 160),
        "depth1": (0, 4),
        "depth2": (0, 6),
        "depth3": (0, 4),
        "learning_rate": (0.4, 3.0),
        "batch_size": (256, 1536),
        "cutmix": (0.0, 0.9),
        "colour": (0.0, 0.5),
        "shift": (0.0, 0.125),
        "label_smoothing": (0.0, 0.4),
        "rate_beside_muon": (0.1, 1.6),
        "small_share": (0.0, 0.7),
        "averaging": (0.0, 0.12),
    }
    assert [part2.smallest_batch(n) for n in (100, 1437, 45_000, 50_000)] == [32, 32, 256, 256]


def test_what_is_too_large_is_repaired_at_every_corner_of_the_space():
    space = part2.search_space(50_000)
    shapes = {
        name: (space[name].low, space[name].high)
        for name in ("width", "depth1", "depth2", "depth3")
    }
    repaired = 0
    for *corner, whiten in product(*shapes.values(), (False, True)):
        drawn = part2.HParams(**dict(zip(shapes, corner, strict=True)), whiten=whiten)
        found = part2.repair(drawn, 100, 5_000_000)
        assert part2.count_parameters(found, 100) <= 5_000_000
        changed: dict[str, Any] = {
            name: getattr(found, name)
            for name in shapes
            if getattr(found, name) != getattr(drawn, name)
        }
        assert replace(drawn, **changed) == found
        repaired += bool(changed)
        if part2.count_parameters(drawn, 100) <= 5_000_000:
            assert not changed
        if "depth2" in changed:  # the last stage's blocks go first
            assert found.depth3 == 0
        if "width" in changed:
            assert found.depth2 == found.depth3 == 0
    assert repaired > 8
    smallest = part2.HParams(width=32, depth1=0, depth2=0, depth3=0, whiten=True)
    fewest = part2.count_parameters(replace(smallest, whiten=False), 100)
    assert part2.repair(smallest, 100, fewest) == replace(smallest, whiten=False)
    with pytest.raises(UserError, match=f"the smallest network has {fewest}"):
        part2.repair(smallest, 100, fewest - 1)


def test_repair_takes_no_more_than_it_must():
    drawn = part2.HParams(width=128, depth1=2, depth2=4, depth3=3)
    found = part2.repair(drawn, 100, 5_000_000)
    assert found == replace(drawn, depth2=found.depth2, depth3=0)
    more = replace(found, depth2=found.depth2 + 1)
    assert part2.count_parameters(more, 100) > 5_000_000
    small = part2.repair(drawn, 10, 120_000)
    assert (small.width, small.depth2, small.depth3) == (32, 0, 0)
    with pytest.raises(UserError, match="--max-params 100: the smallest network has"):
        part2.repair(drawn, 10, 100)


def test_knobs_near_an_end_of_their_range_are_named():
    space = part2.search_space(50_000)
    middle: dict[str, Any] = {
        name: (d.low * d.high) ** 0.5 if d.log else (d.low + d.high) / 2
        for name, d in space.items()
        if hasattr(d, "low")
    }
    hparams = replace(part2.HParams(), **middle)
    assert part2.near_ends(hparams, space) == []
    ends: dict[str, Any] = {"cutmix": 0.82, "learning_rate": 0.46, "depth2": 0}
    found = part2.near_ends(replace(hparams, **ends), space)
    assert found == ["depth2 0 (0 to 6)", "learning_rate 0.46 (0.4 to 3)", "cutmix 0.82 (0 to 0.9)"]
    inside: dict[str, Any] = {"cutmix": 0.8, "learning_rate": 0.5}
    assert part2.near_ends(replace(hparams, **inside), space) == []


# --- training -------------------------------------------------------------------------------------


def test_task_measures_the_channels():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[0, 0] = 255
    task = two_class_task(images)
    assert task.mean == (0.5, 0.0, 0.0)
    assert task.std == (0.5, 0.01, 0.01)  # a constant channel is not divided by zero


@pytest.mark.parametrize("whiten", [False, True])
def test_every_parameter_has_one_optimizer_and_vectors_do_not_decay(whiten):
    hparams = replace(SMALL, whiten=whiten)
    network = part2.start_network(hparams, 10, digits_task(40), 0)
    (muon, muon_peak), (sgd, sgd_peak) = part2.make_optimizers(network, hparams, 32)
    assert isinstance(muon, Muon)
    groups = muon.param_groups + sgd.param_groups
    trained = [id(p) for group in groups for p in group["params"]]
    assert len(trained) == len(set(trained))
    fixed = [name for name, p in network.named_parameters() if id(p) not in trained]
    assert fixed == (["features.0.weight"] if whiten else [])
    kernels = [p for p in network.parameters() if p.ndim == 4 and p.requires_grad]
    inner = {id(p) for group in muon.param_groups for p in group["params"]}
    assert inner == {id(p) for p in (kernels if whiten else kernels[1:])}
    decay = {id(p): group["weight_decay"] for group in sgd.param_groups for p in group["params"]}
    assert all(decay[id(p)] == 0 for p in network.parameters() if p.ndim == 1)
    assert decay[id(network.head.weight)] == part2.WEIGHT_DECAY
    assert muon_peak == pytest.approx(part2.MUON_RATE / 4)  # batches of 32
    assert sgd_peak == pytest.approx(0.2 / 4)
    other = replace(hparams, rate_beside_muon=0.4, learning_rate=2.0)
    peaks = [peak for _, peak in part2.make_optimizers(network, other, 32)]
    assert peaks == pytest.approx([part2.MUON_RATE / 2, 0.4 / 2])


def test_augment_without_mixing_is_a_crop_of_the_image():
    task = digits_task(20)
    padded = training.pad_for_crops(task.images.images, 0)
    unflipped, hparams = torch.zeros(20, dtype=torch.bool), replace(SMALL, cutmix=0.0)
    x, targets = part2.augment(padded, torch.arange(5), unflipped, task, hparams)
    mean, std = (training.channels(values, CPU) for values in (task.mean, task.std))
    x = x.sub_(mean).div_(std)
    torch.testing.assert_close(x, preprocess(task.images.images[:5], task.preprocessing))
    assert targets.argmax(1).equal(data.labels_of(task.images)[:5])


def test_cutmix_targets_follow_the_pixels():
    torch.manual_seed(0)
    images = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    images[32:] = 255
    labels = torch.arange(64) // 32
    task = part2.make_task(ImageSet("x", "train", images, labels, ("a", "b")), True, CPU)
    padded = training.pad_for_crops(images, 1)
    mirrored, hparams = torch.rand(64) < 0.5, replace(SMALL, cutmix=1.0)
    x, targets = part2.augment(padded, torch.randperm(64), mirrored, task, hparams)
    share_of_white = (x > 0).float().mean((1, 2, 3))
    torch.testing.assert_close(targets[:, 1], share_of_white)
    assert ((targets > 0) & (targets < 1)).any()


def test_colours_change_by_image_and_no_more_than_they_may():
    torch.manual_seed(0)
    images = torch.full((64, 3, 8, 8), 100, dtype=torch.uint8)
    task = two_class_task(images)
    padded = training.pad_for_crops(images, 1)
    hparams = replace(SMALL, cutmix=0.0, colour=0.3)
    x, _ = part2.augment(padded, torch.arange(64), torch.rand(64) < 0.5, task, hparams)
    brightness = x[:, 0, 0, 0] / (100 / 255)  # of a grey image nothing else changes
    torch.testing.assert_close(x, brightness.view(-1, 1, 1, 1).expand_as(x) * 100 / 255)
    assert 0.7 <= brightness.min() < 0.75
    assert 1.25 < brightness.max() <= 1.3


@pytest.mark.parametrize("flip", [False, True])
def test_images_are_mirrored_in_turn_from_epoch_to_epoch(flip):
    torch.manual_seed(0)
    task = replace(digits_task(25), flip=flip)
    mirrored = torch.zeros(25, dtype=torch.bool)
    epochs: list[list[int]] = [[], [], []]
    states = []
    batches = part2.shuffled(task, 10, mirrored)
    for number in range(6):  # two whole batches an epoch
        epochs[number // 2] += next(batches).tolist()
        states.append(mirrored.tolist())
    assert all(len(set(seen)) == 20 for seen in epochs)
    assert epochs[0] != epochs[1]
    assert states[0] == states[1] == states[4] == states[5]
    assert states[2] == states[3] == [flip and not was for was in states[0]]
    assert any(states[0]) == flip


def one_loss(hparams: part2.HParams, mirrored: torch.Tensor) -> float:
    """The loss of the first step on the first 64 digits, before anything is learned."""
    task = digits_task(64)
    network = part2.start_network(hparams, 10, task, 0)
    optimizers = part2.make_optimizers(network, hparams, 64)
    return float(part2.make_step(network, optimizers, hparams, 64, mirrored, False, task)(ORDER))


ORDER = torch.arange(64)
UNFLIPPED = torch.zeros(64, dtype=torch.bool)


def test_the_loss_of_a_step_is_that_of_smoothed_labels_and_mirrored_images():
    hparams = replace(SMALL, cutmix=0.0, shift=0.0, label_smoothing=0.2)
    task = digits_task(64)
    network = part2.start_network(hparams, 10, task, 0)
    x = preprocess(task.images.images, task.preprocessing)
    labels = data.labels_of(task.images)
    for mirrored in (UNFLIPPED, ~UNFLIPPED):
        logits = network.train()(x.flip(3) if mirrored.all() else x)
        expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
        assert one_loss(hparams, mirrored) == pytest.approx(expected.item(), abs=1e-5)
    assert one_loss(hparams, UNFLIPPED) != pytest.approx(one_loss(hparams, ~UNFLIPPED), abs=1e-4)


@pytest.mark.parametrize(
    ("size", "shift", "pixels"),
    [(32, 1 / 8, 4), (32, 1 / 16, 2), (24, 1 / 16, 2), (8, 1 / 8, 1), (8, 1 / 16, 1), (8, 0.0, 0)],
)
def test_images_are_shifted_by_a_share_of_their_side(size, shift, pixels, monkeypatch):
    paddings: list[int] = []

    def pad(images: torch.Tensor, padding: int) -> torch.Tensor:
        paddings.append(padding)
        return images

    monkeypatch.setattr(part2.training, "pad_for_crops", pad)
    task, hparams = (
        two_class_task(torch.zeros(4, 3, size, size).byte()),
        replace(SMALL, shift=shift),
    )
    network = part2.start_network(hparams, 2, task, 0)
    optimizers = part2.make_optimizers(network, hparams, 4)
    part2.make_step(network, optimizers, hparams, 4, UNFLIPPED[:4], False, task)
    assert paddings == [pixels]


def test_a_whitened_network_keeps_its_first_kernels_and_trains_the_rest():
    torch.manual_seed(0)
    task = two_class_task(torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8))
    hparams = replace(SMALL, whiten=True, pool=True, cutmix=0.0)
    network = part2.start_network(hparams, 2, task, 0)
    before = {name: p.clone() for name, p in network.named_parameters()}
    part2.prepare_run(network, hparams, task, False)(4, 0.0)
    after = dict(network.named_parameters())
    first = after.pop("features.0.weight")
    x = preprocess(task.images.images, task.preprocessing)
    assert first.equal(training.whitening_kernels(x, 16))
    assert not first.requires_grad
    assert all(not p.equal(before[name]) for name, p in after.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_replays_of_a_compiled_step_draw_new_crops_and_follow_the_mirrored_on_a_gpu():
    gpu = torch.device("cuda", 0)
    task = part2.make_task(load_images("digits", "train", num_images=64), False, gpu)
    batch, mirrored, losses = ORDER.to(gpu), UNFLIPPED.to(gpu), {}
    for shift in (1 / 4, 0.0):
        hparams = replace(SMALL, batch_size=64, cutmix=0.0, shift=shift)
        network = part2.start_network(hparams, 10, task, 0)
        optimizers = part2.make_optimizers(network, hparams, 64)  # their rates are still zero
        step = part2.make_step(network, optimizers, hparams, 64, mirrored, True, task)
        losses[shift] = [float(step(batch)) for _ in range(6)]
    assert max(losses[1 / 4]) - min(losses[1 / 4]) > 1e-3
    assert max(losses[0.0]) - min(losses[0.0]) < 1e-3
    mirrored.fill_(True)
    assert abs(float(step(batch)) - losses[0.0][-1]) > 1e-3


@pytest.mark.parametrize(("size", "smaller"), [(32, 24), (64, 48), (28, 16), (16, 8), (8, 8)])
def test_small_images_keep_three_quarters_of_the_size(size, smaller):
    images = torch.full((2, 3, size, size), 200, dtype=torch.uint8)
    task = two_class_task(images)
    small = part2.shrink(task)
    assert small.images.images.equal(torch.full((2, 3, smaller, smaller), 200, dtype=torch.uint8))
    assert small.size == smaller
    assert replace(small, images=task.images) == task


def test_the_first_steps_see_small_images(monkeypatch):
    task = two_class_task(torch.zeros(40, 3, 32, 32, dtype=torch.uint8))
    hparams, clock = replace(SMALL, batch_size=8, small_share=0.5), Clock(monkeypatch, lambda *_: 1)
    network = part2.start_network(hparams, 2, task, 0)
    part2.prepare_run(network, hparams, task, False)(15, 0.5)
    assert clock.sizes == [24] * 8 + [32] * 7


@pytest.mark.parametrize(
    ("averaging", "kept"),
    # Of 0, then 1, 2, 3, 4: the last; the same, as less than a step is one; halfway in each step.
    [(0.0, 4.0), (0.01, 4.0), (0.5, 3.0625)],
)
def test_an_average_of_the_weights_is_kept(averaging, kept, monkeypatch):
    task = two_class_task(torch.zeros(16, 3, 8, 8, dtype=torch.uint8))
    hparams = replace(SMALL, batch_size=8, averaging=averaging)
    network = part2.start_network(hparams, 2, task, 0)
    numbers = [t for t in network.state_dict().values() if t.is_floating_point()]
    before = [t.clone() for t in numbers]

    def step(batch: torch.Tensor) -> torch.Tensor:
        for t in numbers:
            t += 1
        return torch.ones(())

    monkeypatch.setattr(part2, "make_step", lambda *_: step)
    part2.prepare_run(network, hparams, task, False)(4, 0.0)
    for t, fresh in zip(numbers, before, strict=True):
        torch.testing.assert_close(t, fresh + kept)


def test_peak_and_end_of_the_learning_rate(monkeypatch):
    task = digits_task(320)
    network = part2.start_network(SMALL, 10, task, 0)
    optimizers = part2.make_optimizers(network, SMALL, 32)
    rates = []

    def step(batch: torch.Tensor) -> torch.Tensor:
        assert len(batch) == 32
        rates.append([float(o.param_groups[-1]["lr"]) for o, _ in optimizers])
        return torch.ones(())

    monkeypatch.setattr(part2, "make_optimizers", lambda *_: optimizers)
    monkeypatch.setattr(part2, "make_step", lambda *_: step)
    part2.prepare_run(network, SMALL, task, False)(50, 0.0)
    assert len(rates) == 50
    for i, (_, peak) in enumerate(optimizers):
        of_one = [pair[i] for pair in rates]
        assert max(of_one) == pytest.approx(peak)
        assert of_one.index(max(of_one)) in (9, 10)  # after a fifth of the steps
        assert of_one[-1] < 0.01 * peak


def test_training_learns_digits_and_follows_its_seed(monkeypatch):
    monkeypatch.setattr(part2, "count_steps", lambda *_: 72)
    task, hparams = digits_task(), replace(SMALL, cutmix=0.0, learning_rate=2.0)
    states, losses = [], []
    for _ in range(2):
        network = part2.start_network(hparams, 10, task, seed=1)
        losses.append(part2.train(network, hparams, task, 1.0).loss)
        states.append(network.state_dict())
    assert losses[0] == losses[1]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    top1, top5 = accuracy(network.eval(), load_images("digits", "test"), task.preprocessing)
    assert 40 < top1 < top5


# --- the budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "whole_s", "small_s", "small_share"),
    [
        (8, 0.012, 0.007, 0.0),  # a GPU's
        (8, 0.003, 0.001, 0.5),
        (60, 0.007, 0.004, 0.7),
        (120, 1.7, 1.1, 0.3),  # a CPU's
        (2, 0.0301, 0.0301, 0.0),
    ],
)
def test_a_training_takes_its_seconds(seconds, whole_s, small_s, small_share, monkeypatch):
    """Every eleventh step takes 5 ms longer, as on a machine that does other things, too."""

    def cost_s(size: int, number: int) -> float:
        return (whole_s if size == 32 else small_s) + (0.005 if number % 11 == 0 else 0)

    task = two_class_task(torch.zeros(40, 3, 32, 32, dtype=torch.uint8))
    hparams = replace(SMALL, batch_size=8, small_share=small_share)
    clock = Clock(monkeypatch, cost_s)
    network = part2.start_network(hparams, 2, task, 0)
    done = part2.train(network, hparams, task, seconds, clock=clock)
    assert done.train_seconds == pytest.approx(seconds, rel=0.05)
    expected = seconds / (small_share * small_s + (1 - small_share) * whole_s + 0.005 / 11)
    assert done.steps == pytest.approx(expected, rel=0.05)
    assert done.setup_seconds < 0.25 * seconds
    small = sum(size == 24 for size in clock.sizes[-done.steps :])
    assert small == pytest.approx(small_share * done.steps, abs=1)


def test_timing_leaves_no_trace():
    """A training is the same whether its steps were timed before or not."""
    task, hparams = digits_task(), replace(SMALL, averaging=0.1)
    times = iter(range(10_000))
    states = []
    for seconds, count in ((8.0, part2.count_steps), (0.0, lambda *_: 8)):
        network = part2.start_network(hparams, 10, task, seed=1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(part2, "count_steps", count)
            done = part2.train(network, hparams, task, seconds, clock=lambda: float(next(times)))
        assert done.steps == 8
        states.append(network.state_dict() | {"random": torch.get_rng_state()})
    assert all(states[0][name].equal(states[1][name]) for name in states[0])


SETTING = part2.Setting("digits", None, 32, 200, False, 200_000, 1, 0, 8.0, 5.0, "a CPU")


@pytest.mark.parametrize(
    ("took_s", "objects"), [(7.55, True), (7.7, False), (8.3, False), (8.5, True)]
)
def test_a_training_off_its_budget_objects(took_s, objects, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(part2, "train", lambda *_: part2.Training(9, 1.5, took_s, 0.1))
    path = tmp_path / "default.safetensors"
    top1, columns, why = part2.run_training(SETTING, SMALL, 0, True, False, path, CPU)
    assert columns["steps"] == 9
    assert columns["train_seconds"] == took_s
    assert why == (f"{took_s:.2f} s of training, not 8" if objects else "")
    assert path.exists() != objects
    if objects:
        assert "top5_percent" not in columns
    else:
        assert 0 <= top1 <= columns["top5_percent"]


def test_a_training_off_its_budget_never_sees_the_test_images(monkeypatch):
    def look(*_: Any) -> tuple[float, float]:
        raise AssertionError("looked at")

    monkeypatch.setattr(part2, "train", lambda *_: part2.Training(9, 1.5, 16.0, 0.1))
    monkeypatch.setattr(part2.evaluation, "accuracy", look)
    top1, _, why = part2.run_training(SETTING, SMALL, 0, True, False, None, CPU)
    assert math.isnan(top1)
    assert why == "16.00 s of training, not 8"


def test_a_loss_that_is_not_finite_is_a_failure(monkeypatch):
    monkeypatch.setattr(part2, "train", lambda *_: part2.Training(9, float("nan"), 8.0, 0.1))
    with pytest.raises(FloatingPointError, match="the loss is nan after 9 steps"):
        part2.run_training(SETTING, SMALL, 0, False, False, None, CPU)


def test_held_out_images_are_not_trained_on():
    task, held_out = part2.load_task(SETTING, False, CPU)
    assert (len(task.images), len(held_out)) == (180, 20)
    trained = {image.numpy().tobytes() for image in task.images.images}
    everything = {image.numpy().tobytes() for image in SETTING.load("train").images}
    apart = {image.numpy().tobytes() for image in held_out.images}
    assert not trained & apart
    assert trained | apart == everything


def test_a_whitened_network_is_saved_and_loaded(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(part2, "count_steps", lambda *_: 3)
    hparams, path = replace(SMALL, whiten=True, pool=True), tmp_path / "best.safetensors"
    generous = replace(SETTING, tolerance=1000.0)
    top1, _, _ = part2.run_training(generous, hparams, 0, True, False, path, CPU)
    model = load_network(path)
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["hyperparameters"] == asdict(hparams)
    assert (card["training"]["seed"], card["training"]["steps"]) == (0, 3)
    task, test_set = part2.load_task(generous, True, CPU)
    assert accuracy(model.module, test_set, task.preprocessing)[0] == top1
    assert model.classes == test_set.classes


# --- the three stages, with trainings that cost nothing -------------------------------------------


class Trainings:
    """In the place of `run_training`: what was asked of it, and a value from a function."""

    def __init__(self, value: Callable[[part2.HParams, int, bool], float]) -> None:
        self.value = value
        self.asked: list[tuple[part2.HParams, int, bool]] = []
        self.stop_after = 1_000_000

    def __call__(
        self,
        setting: part2.Setting,
        hparams: part2.HParams,
        seed: int,
        final: bool,
        compiled: bool,
        save_as: Path | None,
        device: torch.device,
    ) -> tuple[float, dict[str, Any], str]:
        if len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append((hparams, seed, final))
        if save_as:
            save_as.write_text(json.dumps(asdict(hparams)))
            card = {"hyperparameters": asdict(hparams)}
            save_as.with_suffix(".json").write_text(json.dumps(card))
        columns = {"parameters": 7, "steps": 3, "train_seconds": 0.2, "device": "here"}
        return self.value(hparams, seed, final), columns, ""


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command with false trainings: `tune(trainings, "--trials", "4")`."""
    monkeypatch.setattr(study, "Worker", InlineWorker)
    monkeypatch.setattr(os, "fsync", lambda _: None)

    def run(trainings: Trainings, *flags: str) -> int:
        monkeypatch.setattr(part2, "run_training", trainings)
        return part2.main([*TINY_RUN, "--output-dir", str(tmp_path), *flags])

    return run


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / "tiny" / f"{name}.csv")


def by_luck(hparams: part2.HParams, seed: int, final: bool) -> float:
    """In trials a high CutMix wins, with new seeds a low one does; the default is the worst."""
    if hparams.cutmix == 0.5:
        return 40 + seed % 7 / 100
    sign = 1 if seed < part2.FINALIST_SEEDS else -1
    return 50 + sign * hparams.cutmix + seed % 7 / 100


def test_the_winner_is_the_finalist_with_the_highest_mean(tune, tmp_path: Path, capsys):
    trainings = Trainings(by_luck)
    assert tune(trainings, "--trials", "8") == 0
    output = capsys.readouterr().out
    assert "at most 18 trainings of 0.2 s (8 search, 6 finalists, 4 final)" in output
    trials, finalists = read(tmp_path, "trials"), read(tmp_path, "finalists")
    final, summary = read(tmp_path, "final"), read(tmp_path, "summary")
    assert trials.configuration[0] == "default"
    assert trials.status.tolist() == ["ok"] * 8
    assert list(trials) == list(finalists) == part2.COLUMNS["trials"]
    assert (list(final), list(summary)) == (part2.COLUMNS["final"], part2.COLUMNS["summary"])
    ranked = trials[trials.configuration != "default"].nlargest(2, "held_out_top1_percent")
    three = ["default", *ranked.configuration]
    first = part2.FINALIST_SEEDS
    assert list(zip(finalists.configuration, finalists.seed, strict=True)) == [
        (name, seed) for seed in (first, first + 1) for name in three
    ]
    assert not set(finalists.seed) & set(trials.seed)
    means = finalists.groupby("configuration").held_out_top1_percent.mean()
    assert means.idxmax() != ranked.configuration.iloc[0]  # or this would test nothing
    winner = json.loads(finalists[finalists.configuration == means.idxmax()].hparams.iloc[0])
    assert list(zip(final.configuration, final.seed, strict=True)) == [
        (name, seed) for seed in (0, 1) for name in ("default", "best")
    ]
    assert [json.loads(h) for h in final.hparams[final.configuration == "best"]] == [winner] * 2
    assert json.loads((tmp_path / "tiny/best.safetensors").read_text()) == winner
    assert [final for _, _, final in trainings.asked] == [False] * 14 + [True] * 4
    assert "near an end of their range" in output
    for name in ("trials.png", "final.png", "environment.json"):
        assert (tmp_path / "tiny" / name).exists()


def test_if_the_default_wins_it_is_trained_alone(tune, tmp_path: Path, capsys):
    trainings = Trainings(lambda hparams, *_: 50.0 - abs(hparams.cutmix - 0.5))
    assert tune(trainings) == 0
    assert "no finalist is better than the default" in capsys.readouterr().out
    final = read(tmp_path, "final")
    assert final.configuration.tolist() == ["default", "default"]
    assert (tmp_path / "tiny/default.safetensors").exists()
    assert not (tmp_path / "tiny/best.safetensors").exists()


def test_without_a_study_the_final_stage_trains_the_default(
    tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trainings = Trainings(by_luck)
    assert tune(trainings, "--stage", "finalists") == 2
    assert "tiny has no trials yet" in capsys.readouterr().err
    assert tune(trainings, "--stage", "final") == 0
    assert "there are no finalists" in capsys.readouterr().out
    default = part2.repair(part2.HParams(batch_size=64), 10, 200_000)
    assert trainings.asked == [(default, 0, True), (default, 1, True)]
    assert not (tmp_path / "tiny/trials.csv").exists()


@pytest.mark.parametrize("stop_after", [1, 3, 6, 9, 11])
def test_every_stage_goes_on_where_it_was_stopped(stop_after, tune, tmp_path: Path, capsys):
    trainings = Trainings(by_luck)
    trainings.stop_after = stop_after
    assert tune(trainings) == 130
    error = capsys.readouterr().err
    assert error.startswith("interrupted; kept: ")
    assert str(tmp_path / "study.journal") in error
    trainings.stop_after = 1_000_000
    assert tune(trainings) == 0
    # 3 trials, 2 seeds of 3 finalists, 2 seeds of 2 final ones; nothing twice.
    assert len(trainings.asked) == len(set(trainings.asked)) == 13
    assert tune(trainings) == 0
    assert len(trainings.asked) == 13


def test_more_trials_continue_the_study_and_its_comparison(tune, tmp_path: Path):
    trainings = Trainings(by_luck)
    assert tune(trainings) == 0
    assert tune(trainings, "--trials", "6", "--repeats", "3") == 0
    assert len(read(tmp_path, "trials")) == 6
    final = read(tmp_path, "final")
    assert sorted(set(final.configuration)) == ["best", "default"]
    assert (final.groupby("configuration").seed.nunique() == 3).all()
    (best,) = set(final.hparams[final.configuration == "best"])
    finalists = read(tmp_path, "finalists")
    means = finalists.groupby("hparams").held_out_top1_percent.mean()
    assert means.idxmax() == best


def test_the_network_of_an_earlier_winner_is_removed_or_replaced(tune, tmp_path: Path):
    def value(hparams: part2.HParams, seed: int, final: bool) -> float:
        mean = of_default if hparams.cutmix == 0.5 else 50 + scale * hparams.cutmix
        return mean + seed % 7 / 100

    saved = tmp_path / "tiny" / "best.safetensors"
    scale, of_default = 1, 40  # the highest CutMix wins
    assert tune(Trainings(value)) == 0
    first = saved.read_text()
    of_default = 1_000  # with another seed, the default
    assert tune(Trainings(value), "--finalist-seeds", "3", "--stage", "finalists") == 0
    assert saved.exists()
    assert tune(Trainings(value), "--stage", "final") == 0
    assert not saved.exists()
    assert not saved.with_suffix(".json").exists()
    scale = 100_000
    back = Trainings(value)
    assert tune(back, "--finalist-seeds", "4") == 0
    assert saved.read_text() == first
    # Only the first seed, as its network was lost; its accuracy counts once.
    assert [(asdict(h), seed) for h, seed, final in back.asked if final] == [(json.loads(first), 0)]
    final = read(tmp_path, "final")
    assert final[final.configuration == "best"].status.tolist() == ["retried", "ok", "ok"]


def test_a_network_that_was_deleted_is_trained_again(tune, tmp_path: Path, capsys):
    """And announced."""
    assert tune(Trainings(by_luck)) == 0
    (tmp_path / "tiny" / "best.safetensors").unlink()
    capsys.readouterr()
    again = Trainings(by_luck)
    assert tune(again) == 0
    assert "at most 1 trainings" in capsys.readouterr().out
    assert [(seed, final) for _, seed, final in again.asked] == [(0, True)]


def test_no_winner_is_chosen_before_all_finalists_are_trained(tune, capsys):
    trainings = Trainings(by_luck)
    trainings.stop_after = 5  # in the finalists
    assert tune(trainings) == 130
    capsys.readouterr()
    assert tune(Trainings(by_luck), "--stage", "final") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the finalists of tiny are not all trained")


def test_other_machines_may_have_the_network_or_still_train_finalists(tune, tmp_path, capsys):
    shared = ["--storage", f"sqlite:///{tmp_path}/study.db"]
    assert tune(Trainings(by_luck), *shared) == 0
    (tmp_path / "tiny" / "best.safetensors").unlink()
    again = Trainings(by_luck)
    assert tune(again, *shared) == 0
    assert again.asked == []
    with study.opened(shared[1]) as storage:
        study.open_study(storage, "tiny-finalists", {}).ask()  # RUNNING
    capsys.readouterr()
    assert tune(again, *shared, "--stage", "final") == 2
    assert "the finalists of tiny are not all trained" in capsys.readouterr().err


def test_the_announced_trainings_are_never_too_few(tune, capsys):
    def announced() -> int:
        return int(capsys.readouterr().out.partition("at most ")[2].split()[0])

    trainings = Trainings(by_luck)
    trainings.stop_after = 4  # in the finalists, which others may join after more trials
    assert tune(trainings) == 130
    capsys.readouterr()
    for flags in (["--trials", "9"], [], ["--finalist-seeds", "3"], ["--repeats", "3"], []):
        trainings = Trainings(by_luck)
        assert tune(trainings, *flags) == 0
        assert len(trainings.asked) <= announced()
    assert trainings.asked == []


def test_a_study_of_another_budget_or_device_is_refused_in_one_line(tune, monkeypatch, capsys):
    assert tune(Trainings(by_luck), "--stage", "search") == 0
    capsys.readouterr()
    assert tune(Trainings(by_luck), "--train-seconds", "0.3") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "made with train_seconds 0.2, now it is 0.3" in line
    other = part2.results.environment() | {"cpu": "another"}
    monkeypatch.setattr(part2.results, "environment", lambda **_: other)
    assert tune(Trainings(by_luck)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "now it is another, 1 threads" in line


@pytest.mark.parametrize(
    ("error", "code", "status", "reason"),
    [
        (ValueError("no such thing"), 1, "failed", "ValueError: no such thing"),
        (MemoryError("no room"), 0, "unavailable", "no room"),  # what a machine cannot do
    ],
)
def test_a_final_training_without_a_result_is_a_row_and_exit_code_1_if_it_failed(
    error: Exception, code: int, status: str, reason: str, tune, tmp_path: Path, capsys
):
    def troubled(hparams: part2.HParams, seed: int, final: bool) -> float:
        if final and seed == 1:
            raise error
        return 50.0

    assert tune(Trainings(troubled), "--stage", "final") == code
    final = read(tmp_path, "final")
    assert final.status.tolist() == ["ok", status]
    assert final.reason[1] == reason
    assert f"default, seed 1: {reason}" in capsys.readouterr().out


def test_the_same_command_again_repairs_what_failed(tune, tmp_path: Path):
    broken = True

    def troubled(hparams: part2.HParams, seed: int, final: bool) -> float:
        if final and seed == 1 and broken:
            raise ValueError("no such thing")
        return 50.0

    assert tune(Trainings(troubled), "--stage", "final") == 1
    broken = False
    again = Trainings(troubled)
    assert tune(again, "--stage", "final") == 0
    assert [seed for _, seed, _ in again.asked] == [1]
    final = read(tmp_path, "final")
    assert final.status.tolist() == ["ok", "retried", "ok"]
    assert read(tmp_path, "summary").trainings.tolist() == [2]


def test_a_finalist_with_a_missing_seed_can_win(tune, tmp_path: Path):
    def value(hparams: part2.HParams, seed: int, final: bool) -> float:
        if hparams.cutmix == 0.5:  # the default
            return 40.0
        if seed > part2.FINALIST_SEEDS:
            raise MemoryError("no room")
        return 50 + hparams.cutmix

    assert tune(Trainings(value)) == 0
    finalists = read(tmp_path, "finalists")
    assert finalists.status.tolist() == ["ok"] * 4 + ["unavailable"] * 2
    assert sorted(set(read(tmp_path, "final").configuration)) == ["best", "default"]


def test_the_best_of_a_table_of_trials_or_the_first_of_another_come_first(
    tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    trainings = Trainings(lambda hparams, *_: 50.0 + hparams.cutmix)
    assert tune(trainings, "--stage", "search", "--trials", "12") == 0
    trials = read(tmp_path, "trials").nlargest(8, "held_out_top1_percent")
    others = trials[trials.configuration != "default"]
    assert len(others) == 7  # the default comes first, and once
    best = [json.loads(text) for text in others.hparams]
    table = tmp_path / "tiny" / "best.csv"
    trials.drop(columns="held_out_top1_percent").to_csv(table, index=False)
    for start in (tmp_path / "tiny" / "trials.csv", table):
        again = Trainings(by_luck)
        name = f"of-{start.stem}"
        flags = ["--stage", "search", "--trials", "8", "--start", str(start), "--study-name", name]
        assert tune(again, *flags) == 0
        assert [asdict(hparams) for hparams, _, _ in again.asked[1:]] == best
        assert "--start" not in capsys.readouterr().out
        assert tune(again, *flags) == 0  # they are not queued twice
        assert "note: --start is not used" in capsys.readouterr().out
        assert len(again.asked) == 8


def test_the_presets_of_the_reports_can_begin_a_study():
    table = ROOT / "reports" / "data" / "part2_presets.csv"
    space = part2.search_space(50_000)
    presets = part2.read_start(str(table), space)
    assert [row["width"] for row in presets] == [64, 64, 128]
    assert presets[1]["small_share"] == 0.5
    few = part2.search_space(1_000)
    with pytest.raises(UserError, match=r"part2_presets.csv: .*batch_size"):
        part2.read_start(str(table), few)


@pytest.mark.parametrize(
    ("content", "reason"), [("hparams\n[1]\n", "list"), ("hparams\n", "no row")]
)
def test_a_start_that_holds_no_configurations(content: str, reason: str, tmp_path: Path):
    (tmp_path / "start.csv").write_text(content)
    with pytest.raises(UserError, match=f"start.csv: .*{reason}"):
        part2.read_start(str(tmp_path / "start.csv"), part2.search_space(50_000))


# --- the command line -----------------------------------------------------------------------------


def test_quick_run_in_real_processes(tmp_path: Path):
    """As a user starts it: `--quick`, only shorter."""
    command = [sys.executable, "part2_tune.py", "--quick", "--output-dir", str(tmp_path)]
    command += ["--train-seconds", "0.3", "--trials", "3", "--repeats", "1", "--tolerance", "1000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "digits-0.3s-gp"
    trials = pd.read_csv(folder / "trials.csv")
    assert trials.status.tolist() == ["ok"] * 3
    assert (trials.parameters <= part2.QUICK["max_params"]).all()
    assert (trials.steps > 0).all()
    assert (trials.num_images == 142).all()
    final = pd.read_csv(folder / "final.csv").set_index("configuration")
    assert (final.train_images == 1437).all()
    model = load_network(folder / "default.safetensors")
    test_set = load_images("digits", "test")
    top1, _ = accuracy(model.module, test_set, model.preprocessing)
    assert top1 == pytest.approx(final.top1_percent["default"])
    assert "libraries" in json.loads((folder / "environment.json").read_text())


def test_own_images_are_tuned_on(image_folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(study, "Worker", InlineWorker)
    flags = ["--dataset", "folder", "--data-dir", str(image_folder), "--image-size", "16"]
    flags += ["--train-seconds", "0.1", "--trials", "1", "--finalist-seeds", "1", "--threads", "1"]
    flags += ["--repeats", "1", "--tolerance", "10000", "--device", "cpu", "--max-params", "200000"]
    assert part2.main([*flags, "--output-dir", str(tmp_path / "out")]) == 0
    path = tmp_path / "out" / "folder-0.1s-gp" / "default.safetensors"
    model = load_network(path)
    assert model.classes == ("ant", "cat", "dog")
    assert model.preprocessing.input_size == 16


def test_images_that_are_not_square_are_refused(monkeypatch):
    images = torch.zeros(4, 3, 8, 9).byte()
    found = ImageSet("digits", "train", images, torch.tensor([0, 1, 0, 1]), ("a", "b"))
    monkeypatch.setattr(part2.data, "load_images", lambda *_: found)
    with pytest.raises(UserError, match="8x9 pixels"):
        part2.load_checked(SETTING)


@pytest.mark.parametrize(
    "flags",
    [
        ["--stage", "deploy"],
        ["--train-seconds", "0"],
        ["--train-seconds", "nan"],
        ["--trials", "0"],
        ["--trials", "many"],
        ["--sampler", "grid"],
        ["--start", "nowhere"],
        ["--start", "pyproject.toml"],
        ["--start", "reports/data/part2_costs.csv"],  # no column hparams
        ["--start", "reports/data/part2_final.csv"],  # batches for more images
        ["--finalists", "0"],
        ["--finalist-seeds", "-1"],
        ["--repeats", "0"],
        ["--tolerance", "-5"],
        ["--dataset", "cifar10"],
        ["--dataset", "folder", "--data-dir", "/nonexistent"],
        ["--image-size", "0"],
        ["--train-images", "-3"],
        ["--train-images", "99999"],
        ["--train-images", "10"],  # one of each class
        ["--max-params", "10"],
        ["--storage", "nosuchdb://host/name"],
        ["--storage", "FOLDER/notes.txt"],
        ["--study-name", "a/b"],
        ["--study-name", ""],
        ["--study-name", ".."],
        ["--study-name", "mine-final"],
        ["--stage", "final", "--start", "trials.csv"],
        ["--device", "tpu"],
        ["--device", "cuda"],
        ["--threads", "0"],
        ["--threads", "1000000"],
        ["--seed", "-1"],
        ["--output-dir", "/proc/none"],
        ["--learning-rate", "1"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, tune, tmp_path: Path, monkeypatch, capsys):
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(ROOT)
    (tmp_path / "notes.txt").write_text("no journal\n")
    flags = [flag.replace("FOLDER", str(tmp_path)) for flag in flags]
    assert tune(Trainings(by_luck), *flags) == 2
    assert (tmp_path / "notes.txt").read_text() == "no journal\n"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not list(tmp_path.rglob("*.csv"))


@pytest.mark.parametrize("damage", ["missing", "card", "weights", "other"])
def test_checkpoints_that_are_not_usable(damage, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(part2, "train", lambda *_: part2.Training(1, 1.0, 8.0, 0.0))
    path = tmp_path / "net.safetensors"
    part2.run_training(SETTING, SMALL, 0, True, False, path, CPU)
    assert load_network(path).trained
    card = path.with_suffix(".json")
    if damage == "missing":
        card.unlink()
    elif damage == "card":
        card.write_text("{")
    elif damage == "weights":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        card.write_text(card.read_text().replace('"depths"', '"heads"'))
    with pytest.raises(UserError, match=r"part2_tune\.py"):
        load_network(path)


@pytest.mark.skipif("CIFAR100_DIR" not in os.environ, reason="set CIFAR100_DIR to real images")
def test_the_committed_network_reproduces_its_accuracy():
    path = ROOT / "weights" / "smallcnn_cifar100.safetensors"
    model = load_network(path)
    test_set = load_images("cifar100", "test", Path(os.environ["CIFAR100_DIR"]))
    top1, _ = accuracy(model.module, test_set, model.preprocessing)
    assert top1 == json.loads(path.with_suffix(".json").read_text())["top1"]
