"""Part 2: the network, the training loop, the study and the command line."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
import torch
from torch import nn

import part2_tune as part2
from utils import data, study
from utils.cli import UserError
from utils.data import ROOT, ImageSet, Preprocessing, hold_out, load_images, preprocess
from utils.models import Checkpoint, round_to_half, sample_logits
from utils.training import Muon

CPU = torch.device("cpu")
SMALL = part2.HParams(width=8, depth1=1, depth2=1, depth3=1, batch_size=32)
TINY_RUN = ["--dataset", "digits", "--device", "cpu", "--threads", "1"]
TINY_RUN += ["--train-images", "200", "--trials", "2", "--tune-epochs", "1", "--final-epochs", "1"]
TINY_RUN += ["--repeats", "1", "--max-params", "100000", "--pruner", "none"]


def digits_task(num_images: int = 300) -> part2.Task:
    return part2.make_task(load_images("digits", "train", num_images=num_images), False, CPU)


def two_class_task(images: torch.Tensor) -> part2.Task:
    """A task of uint8 images `[N, 3, S, S]`, whose classes take turns."""
    labels = torch.arange(len(images)) % 2
    return part2.make_task(ImageSet("x", "train", images, labels, ("a", "b")), True, CPU)


# --- the network and its search space -------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 32, 96])
@pytest.mark.parametrize("depths", [(0, 1, 1), (2, 3, 3), (0, 3, 1)])
@pytest.mark.parametrize("size", [8, 32, 33])
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("whiten", [False, True])
def test_network_shapes_and_parameter_count(width, depths, size, pool, whiten):
    network = part2.SmallCNN(width, depths, 0.1, 7, pool, whiten)
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


def test_fit_width_keeps_what_fits_and_else_takes_the_widest_that_does():
    wanted = part2.HParams(width=96, depth1=2, depth2=3, depth3=3)
    assert part2.fit_width(wanted, 100, 100_000_000) == wanted
    fitted = part2.fit_width(wanted, 100, 5_000_000)
    assert fitted == replace(wanted, width=fitted.width)
    assert part2.count_parameters(fitted, 100) <= 5_000_000
    assert part2.count_parameters(replace(fitted, width=fitted.width + 8), 100) > 5_000_000
    with pytest.raises(UserError, match="--max-params 100"):
        part2.fit_width(wanted, 100, 100)


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


def test_presets_fit_the_limit_and_the_number_of_images():
    few = load_images("digits", "train", num_images=200)
    for name in part2.PRESETS:
        limit = 9_000_000 if name == "sprint" else 5_000_000
        assert part2.count_parameters(part2.PRESETS[name], 100) <= limit
        fitted = part2.preset(name, few, 80_000)
        assert fitted.batch_size == (128 if name == "sprint" else 64)
        assert part2.count_parameters(fitted, 10) <= 80_000
        width, batch_size = fitted.width, fitted.batch_size
        assert fitted == replace(part2.PRESETS[name], width=width, batch_size=batch_size)
    assert set(part2.FINAL_EPOCHS) == {*part2.PRESETS, "tuned"}


def test_search_space_holds_the_default_and_respects_its_bounds():
    sizes = part2.batch_sizes_for(45_000)
    assert sizes == [256, 512, 1024]
    default = part2.HParams()
    trial = optuna.trial.FixedTrial(asdict(default))
    assert part2.suggest(trial, sizes) == default
    for name, distribution in trial.distributions.items():
        assert distribution._contains(distribution.to_internal_repr(getattr(default, name)))
    numeric: dict[str, Any] = {
        name: distribution
        for name, distribution in trial.distributions.items()
        if not isinstance(distribution, optuna.distributions.CategoricalDistribution)
    }
    bounds = {name: (found.low, found.high) for name, found in numeric.items()}
    assert bounds == {
        "width": (48, 96),
        "depth1": (0, 2),
        "depth2": (1, 3),
        "depth3": (1, 3),
        "dropout": (0.0, 0.2),
        "learning_rate": (0.2, 2.5),
        "cutmix": (0.3, 0.7),
    }
    deepest = {name: getattr(part2.DEEPEST, name) for name in ("depth1", "depth2", "depth3")}
    assert deepest == {name: bounds[name][1] for name in deepest}
    assert part2.batch_sizes_for(100) == [32, 64, 128]


# --- training -------------------------------------------------------------------------------------


def test_task_measures_the_channels():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[0, 0] = 255
    task = part2.make_task(
        ImageSet("x", "train", images, torch.tensor([0, 1]), ("a", "b")), True, CPU
    )
    assert task.mean == (0.5, 0.0, 0.0)
    assert task.std == (0.5, 0.01, 0.01)  # a constant channel is not divided by zero


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("whiten", [False, True])
def test_every_parameter_has_one_optimizer_and_vectors_do_not_decay(name, whiten):
    hparams = replace(SMALL, optimizer=name, whiten=whiten)
    network = part2.start_network(hparams, 10, CPU, 0)
    optimizers = part2.make_optimizers(network, hparams)
    groups = [group for optimizer, _ in optimizers for group in optimizer.param_groups]
    trained = [p for group in groups for p in group["params"]]
    assert len(trained) == len({id(p) for p in trained})
    ids = {id(p) for p in trained}
    fixed = [name for name, p in network.named_parameters() if id(p) not in ids]
    assert fixed == (["features.0.weight"] if whiten else [])
    decay = {id(p): group.get("weight_decay") for group in groups for p in group["params"]}
    assert all(decay[id(p)] == 0 for p in network.parameters() if p.ndim == 1)
    assert decay[id(network.head.weight)] == part2.WEIGHT_DECAYS[name]
    assert isinstance(optimizers[0][0], Muon) == (name == "muon")
    assert optimizers[0][1] == pytest.approx(part2.PEAK_RATES[name] / 4)  # batches of 32
    if name == "muon":
        assert optimizers[1][1] == pytest.approx(0.2 / 4)
        changed = replace(hparams, rate_beside_muon=0.4)
        assert part2.make_optimizers(network, changed)[1][1] == pytest.approx(0.4 / 4)


def test_augment_without_mixing_is_a_crop_of_the_image():
    task = digits_task(20)
    padded = part2.augmentation.pad_for_crops(task.images.images, 0)
    unflipped, hparams = torch.zeros(20, dtype=torch.bool), replace(SMALL, cutmix=0.0)
    x, targets = part2.augment(padded, torch.arange(5), unflipped, task, hparams)
    how = Preprocessing(task.size, task.mean, task.std)
    x = part2.augmentation.normalize(x, *task.statistics)
    torch.testing.assert_close(x, preprocess(task.images.images[:5], how))
    assert targets.argmax(1).equal(data.labels_of(task.images)[:5])


def test_cutmix_targets_follow_the_pixels():
    torch.manual_seed(0)
    images = torch.zeros(64, 3, 8, 8, dtype=torch.uint8)
    images[32:] = 255
    labels = torch.arange(64) // 32
    task = part2.make_task(ImageSet("x", "train", images, labels, ("a", "b")), True, CPU)
    padded = part2.augmentation.pad_for_crops(images, 1)
    mirrored, hparams = torch.rand(64) < 0.5, replace(SMALL, cutmix=1.0)
    x, targets = part2.augment(padded, torch.randperm(64), mirrored, task, hparams)
    share_of_white = (x > 0).float().mean((1, 2, 3))
    torch.testing.assert_close(targets[:, 1], share_of_white)
    assert ((targets > 0) & (targets < 1)).any()


def test_colours_change_by_image_and_no_more_than_they_may():
    torch.manual_seed(0)
    images = torch.full((64, 3, 8, 8), 100, dtype=torch.uint8)
    task = two_class_task(images)
    padded = part2.augmentation.pad_for_crops(images, 1)
    hparams = replace(SMALL, cutmix=0.0, colour=0.3)
    x, _ = part2.augment(padded, torch.arange(64), torch.rand(64) < 0.5, task, hparams)
    brightness = x[:, 0, 0, 0] / (100 / 255)  # of a grey image nothing else changes
    torch.testing.assert_close(x, brightness.view(-1, 1, 1, 1).expand_as(x) * 100 / 255)
    assert 0.7 <= brightness.min() < 0.75
    assert 1.25 < brightness.max() <= 1.3


def test_half_are_mirrored_at_random_or_in_turn():
    torch.manual_seed(0)
    mirrored = torch.zeros(200, dtype=torch.bool)
    part2.choose_mirrored(mirrored, 0, alternate=True)
    first = mirrored.clone()
    assert first.float().mean() == pytest.approx(0.5, abs=0.1)
    part2.choose_mirrored(mirrored, 1, alternate=True)
    assert mirrored.equal(~first)
    part2.choose_mirrored(mirrored, 2, alternate=False)
    assert (mirrored == first).float().mean() == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize("flip", [False, True])
def test_training_mirrors_in_turn_from_epoch_to_epoch(flip, monkeypatch):
    hparams = replace(SMALL, batch_size=10, alternate=True)
    task = replace(digits_task(20), flip=flip)
    seen = []

    def make_step(network, optimizers, hparams, task, mirrored, compiled):
        def step(batch: torch.Tensor) -> torch.Tensor:
            seen.append(mirrored.tolist())
            return torch.ones(())

        return step

    monkeypatch.setattr(part2, "make_step", make_step)
    list(part2.train(part2.start_network(hparams, 10, CPU, 0), hparams, task, 3))
    assert seen[0] == seen[1] == seen[4] == seen[5]
    assert seen[2] == seen[3] == [flip and not mirrored for mirrored in seen[0]]
    assert any(seen[0]) == flip


def one_loss(hparams: part2.HParams, mirrored: torch.Tensor) -> float:
    """The loss of the first step on the first 64 digits, before anything is learned."""
    task, network = digits_task(64), part2.start_network(hparams, 10, CPU, 0)
    optimizers = part2.make_optimizers(network, hparams)
    return float(part2.make_step(network, optimizers, hparams, task, mirrored, False)(ORDER))


ORDER = torch.arange(64)
UNFLIPPED = torch.zeros(64, dtype=torch.bool)


def test_the_loss_of_a_step_is_that_of_smoothed_labels_and_mirrored_images():
    hparams = replace(SMALL, cutmix=0.0, shift=0.0, label_smoothing=0.2)
    task, network = digits_task(64), part2.start_network(hparams, 10, CPU, 0)
    how = Preprocessing(task.size, task.mean, task.std)
    x, labels = preprocess(task.images.images, how), data.labels_of(task.images)
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

    monkeypatch.setattr(part2.augmentation, "pad_for_crops", pad)
    images = torch.zeros(4, 3, size, size, dtype=torch.uint8)
    task = two_class_task(images)
    hparams = replace(SMALL, shift=shift)
    network = part2.start_network(hparams, 2, CPU, 0)
    optimizers = part2.make_optimizers(network, hparams)
    part2.make_step(network, optimizers, hparams, task, torch.zeros(4, dtype=torch.bool), False)
    assert paddings == [pixels]


def test_a_whitened_network_keeps_its_first_kernels_and_trains_the_rest():
    torch.manual_seed(0)
    task = two_class_task(torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8))
    hparams = replace(SMALL, whiten=True, pool=True, cutmix=0.0)
    network = part2.start_network(hparams, 2, CPU, 0)
    before = {name: p.clone() for name, p in network.named_parameters()}
    list(part2.train(network, hparams, task, 2))
    after = dict(network.named_parameters())
    first = after["features.0.weight"]
    x = preprocess(task.images.images, Preprocessing(task.size, task.mean, task.std))
    assert first.equal(part2.whitening_kernels(x, 16))
    assert not first.requires_grad
    assert all(not p.equal(before[name]) for name, p in after.items())
    groups = part2.make_optimizers(network, hparams)
    muon = [p for group in groups[0][0].param_groups for p in group["params"]]
    kernels = [p for name, p in after.items() if p.ndim == 4 and name != "features.0.weight"]
    assert {id(p) for p in muon} == {id(p) for p in kernels}


def test_a_whitened_network_is_saved_and_loaded(tmp_path: Path):
    hparams = replace(SMALL, whiten=True, pool=True)
    network = part2.start_network(hparams, 10, CPU, 0)
    part2.set_whitening(network, digits_task())
    test_set = load_images("digits", "test", num_images=50)
    how = Preprocessing(8, (0.5,) * 3, (0.3,) * 3)
    architecture = part2.architecture_of(hparams, 10)
    state = part2.models.round_to_half(network)
    checkpoint = part2.models.Checkpoint(state, architecture, how, 10.0)
    path = tmp_path / "best.safetensors"
    part2.models.write_checkpoint(path, checkpoint, network, test_set, {}, CPU)
    loaded = part2.load_checkpoint(path)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(loaded.module.eval()(x), network.eval()(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_replays_of_a_compiled_step_draw_new_crops_and_follow_the_mirrored_on_a_gpu():
    gpu = torch.device("cuda", 0)
    task = part2.make_task(load_images("digits", "train", num_images=64), False, gpu)
    batch, mirrored, losses = ORDER.to(gpu), UNFLIPPED.to(gpu), {}
    for shift in (1 / 4, 0.0):
        hparams = replace(SMALL, batch_size=64, cutmix=0.0, shift=shift)
        network = part2.start_network(hparams, 10, gpu, 0)
        optimizers = part2.make_optimizers(network, hparams)  # their rates are still zero
        step = part2.make_step(network, optimizers, hparams, task, mirrored, compiled=True)
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
    hparams = replace(SMALL, batch_size=8, small_share=0.5)
    sizes = []

    def make_step(network, optimizers, hparams, task, mirrored, compiled):
        def step(batch: torch.Tensor) -> torch.Tensor:
            sizes.append(task.size)
            return torch.ones(())

        return step

    monkeypatch.setattr(part2, "make_step", make_step)
    list(part2.train(part2.start_network(hparams, 2, CPU, 0), hparams, task, 3))
    assert sizes == [24] * 8 + [32] * 7


@pytest.mark.parametrize(
    ("averaging", "kept"),
    # Of 0, then 1, 2, 3, 4: the last; the same, as less than a step is one; halfway in each step.
    [(0.0, 4.0), (0.01, 4.0), (0.5, 3.0625)],
)
def test_an_average_of_the_weights_is_kept(averaging, kept, monkeypatch):
    task = two_class_task(torch.zeros(16, 3, 8, 8, dtype=torch.uint8))
    hparams = replace(SMALL, batch_size=8, averaging=averaging)
    network = part2.start_network(hparams, 2, CPU, 0)
    numbers = [t for t in network.state_dict().values() if t.is_floating_point()]
    before = [t.clone() for t in numbers]

    def step(batch: torch.Tensor) -> torch.Tensor:
        for t in numbers:
            t += 1
        return torch.ones(())

    monkeypatch.setattr(part2, "make_step", lambda *_: step)
    for done in part2.train(network, hparams, task, 2):
        change = kept if done.epoch == 2 else 2.0
        for t, fresh in zip(numbers, before, strict=True):
            torch.testing.assert_close(t, fresh + change)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_training_learns_digits_and_follows_its_seed(optimizer):
    task, hparams = (
        digits_task(),
        replace(SMALL, optimizer=optimizer, cutmix=0.0, learning_rate=2.0),
    )
    states, losses = [], []
    for _ in range(2):
        network = part2.start_network(hparams, 10, CPU, seed=1)
        epochs = list(part2.train(network, hparams, task, 8))
        assert [done.epoch for done in epochs] == list(range(1, 9))
        assert [e.seconds for e in epochs] == sorted(e.seconds for e in epochs)
        losses.append([epoch.loss for epoch in epochs])
        states.append(network.state_dict())
    assert losses[0] == losses[1]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    assert losses[0][-1] < 0.85 * losses[0][0]
    test_set = load_images("digits", "test")
    assert part2.evaluate(network, test_set, task, half=False)["top1_percent"] > 40


def test_peak_and_end_of_the_learning_rate(monkeypatch):
    task, network = digits_task(320), part2.start_network(SMALL, 10, CPU, 0)
    rates = []
    optimizers = part2.make_optimizers(network, SMALL)
    rate = optimizers[0][0].param_groups[0]["lr"]

    def step(batch: torch.Tensor) -> torch.Tensor:
        assert len(batch) == 32
        rates.append(float(rate))
        return torch.ones(())

    monkeypatch.setattr(part2, "make_optimizers", lambda *_: optimizers)
    monkeypatch.setattr(part2, "make_step", lambda *_: step)
    list(part2.train(network, SMALL, task, 5))
    assert len(rates) == 50
    assert max(rates) == pytest.approx(part2.PEAK_RATES["muon"] / 4)  # batches of 32
    assert rates.index(max(rates)) in (9, 10)  # after a fifth of the steps
    assert rates[-1] < 0.01 * max(rates)


# --- trials ---------------------------------------------------------------------------------------

SETTING = part2.Setting("s", "digits", None, 32, 200, False, max_params=100_000, threads=1, seed=0)


def one_trial(monkeypatch, default: bool, losses=(1.0, 1.0, 1.0)) -> optuna.trial.FrozenTrial:
    """Run one trial of a study whose pruner always wants to prune."""
    train_set, held_out = hold_out(SETTING.load("train"), 0.1)
    task = part2.make_task(train_set, False, CPU)
    epochs = [part2.Epoch(i, loss, i, 0.0) for i, loss in enumerate(losses, 1)]
    monkeypatch.setattr(part2, "train", lambda *_: iter(epochs))
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda self: True)
    whole = optuna.create_study(direction="maximize")
    hparams = asdict(part2.HParams(batch_size=64))
    whole.enqueue_trial(hparams, user_attrs={"default": True} if default else {})
    whole.optimize(lambda trial: part2.run_trial(SETTING, 3, task, held_out, trial), n_trials=1)
    return whole.trials[-1]


def test_the_default_trial_is_not_pruned_the_others_are(monkeypatch):
    first = one_trial(monkeypatch, default=True)
    assert first.state.name == "COMPLETE"
    assert first.value == first.intermediate_values[3]
    assert [done["epoch"] for done in first.user_attrs["history"]] == [1, 2, 3]
    assert first.user_attrs["parameters"] <= 100_000
    later = one_trial(monkeypatch, default=False)
    assert later.state.name == "PRUNED"
    assert list(later.intermediate_values) == [1]


def test_a_loss_that_is_not_finite_ends_the_trial(monkeypatch):
    trial = one_trial(monkeypatch, default=True, losses=(1.0, math.inf, 1.0))
    assert trial.state.name == "FAIL"
    assert len(trial.user_attrs["history"]) == 2


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("part2")
    assert part2.main(["--quick", "--output-dir", str(folder)]) == 0
    return folder / "quick"


def test_quick_run_writes_everything(quick: Path):
    trials = pd.read_csv(quick / "trials.csv")
    assert len(trials) == part2.QUICK["trials"]
    assert set(trials.state) <= {"complete", "pruned"}
    assert trials.state[0] == "complete"
    default = part2.HParams(batch_size=part2.batch_sizes_for(1437)[1])
    searched = set(part2.search_space([64])) - {"width"}  # which --max-params narrows
    assert all(trials[name][0] == getattr(default, name) for name in searched)
    assert (trials.parameters <= part2.QUICK["max_params"]).all()
    history = pd.read_csv(quick / "history.csv")
    assert tuple(history.columns) == part2.tuning_report.HISTORY_COLUMNS
    assert history.groupby("trial").size().tolist() == trials.epochs.tolist()
    best = json.loads((quick / "best_params.json").read_text())
    complete = trials[trials.state == "complete"].set_index("trial").held_out_top1_percent
    finalists = pd.read_csv(quick / "finalists.csv")
    assert tuple(finalists.columns) == part2.tuning_report.FINALIST_COLUMNS
    assert finalists.trial.tolist() == complete.nlargest(2).index.tolist()
    assert finalists.trial_top1_percent.tolist() == complete.nlargest(2).tolist()
    winner = max(finalists.to_dict("records"), key=lambda row: row["held_out_top1_percent"])
    assert best["trial"] == winner["trial"]
    assert best["held_out_top1_percent"] == winner["held_out_top1_percent"]
    assert best["epochs"] == part2.QUICK["final_epochs"]
    assert best["hparams"] == json.loads(winner["hparams"])
    final = pd.read_csv(quick / "final.csv")
    assert tuple(final.columns) == part2.tuning_report.FINAL_COLUMNS
    assert sorted(zip(final.configuration, final.seed, strict=True)) == [
        ("default", 0),
        ("default", 1),
        ("tuned", 0),
        ("tuned", 1),
    ]
    assert (final.top1_percent > 80).all()
    assert final.final_loss.nunique() == 4  # each seed is another training
    for name in ("optimization_history.png", "learning_curves.png", "final.png"):
        assert (quick / name).read_bytes().startswith(b"\x89PNG")
    assert "libraries" in json.loads((quick / "environment.json").read_text())


def test_the_saved_network_is_that_of_the_first_tuned_training(quick: Path):
    model = part2.load_checkpoint(quick / "best.safetensors")
    card = json.loads((quick / "best.json").read_text())
    assert sample_logits(model.module, 8) == card["sample_logits"]
    test_set = load_images("digits", "test")
    how = model.preprocessing
    task = part2.Task(test_set, how.mean, how.std, False)
    top1 = part2.evaluate(model.module, test_set, task, half=False)["top1_percent"]
    assert top1 == pytest.approx(card["top1"], abs=0.005)
    final = pd.read_csv(quick / "final.csv").set_index(["configuration", "seed"])
    assert top1 == pytest.approx(final.top1_percent["tuned", 0])
    assert model.classes == test_set.classes
    assert (
        card["hyperparameters"] == json.loads((quick / "best_params.json").read_text())["hparams"]
    )


def test_the_study_continues_and_final_trainings_replace_the_last_ones(quick: Path, capsys):
    trials = (quick / "trials.csv").read_bytes()
    before = {name: (quick / name).read_bytes() for name in ("environment.json", "trials.csv")}
    command = ["--quick", "--output-dir", str(quick.parent)]
    flags = ["--final-epochs", "1", "--repeats", "1"]
    assert part2.main([*command, *flags]) == 0
    assert (quick / "trials.csv").read_bytes() == trials
    final = pd.read_csv(quick / "final.csv")
    assert final.configuration.tolist() == ["default", "tuned"]
    assert final.epochs.tolist() == [1, 1]
    assert {name: (quick / name).read_bytes() for name in before} == before  # no new trial
    capsys.readouterr()

    best = (quick / "best_params.json").read_bytes()
    other = [*command, "--stage", "tune", "--tune-epochs", "1", "--trials", "2"]
    assert part2.main(other) == 2  # another setting
    assert "made with epochs 4, now it is 1" in capsys.readouterr().err
    assert (quick / "trials.csv").read_bytes() == trials
    assert (quick / "best_params.json").read_bytes() == best
    assert part2.main([*other, "--fresh", "--train-images", "5"]) == 2
    assert (quick / "final.csv").exists()  # nothing is deleted before the images are good
    assert part2.main([*other, "--fresh"]) == 0
    assert len(pd.read_csv(quick / "trials.csv")) == 2
    assert not (quick / "final.csv").exists()


def test_fresh_deletes_nothing_when_the_storage_cannot_be_opened(tmp_path: Path, capsys):
    assert part2.main([*TINY_RUN, "--stage", "tune", "--output-dir", str(tmp_path)]) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    flags = ["--fresh", "--storage", "foo://bar", "--output-dir", str(tmp_path)]
    assert part2.main([*TINY_RUN, *flags]) == 2
    assert "storage foo://bar cannot be used" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_finished_finalists_outlive_an_interruption(tmp_path: Path, monkeypatch):
    hparams = asdict(part2.HParams(batch_size=64))
    whole = optuna.create_study(direction="maximize")
    for i in range(3):
        attributes = {"hparams": hparams | {"dropout": i / 10}}
        whole.add_trial(optuna.trial.create_trial(value=50.0 + i, user_attrs=attributes))

    def interrupted(function, jobs, places):
        assert [job[1].dropout for job in jobs] == [0.2, 0.1, 0.0]
        columns = {"top1_percent": 70.0, "parameters": 7, "train_seconds": 1.0}
        yield {}, (columns, [], None)
        yield {"status": "failed", "reason": "why"}, None
        raise KeyboardInterrupt

    def interrupted_at_once(function, jobs, places):
        raise KeyboardInterrupt
        yield

    (tmp_path / "finalists.csv").write_text("of an earlier run")
    monkeypatch.setattr(part2, "run_jobs", interrupted_at_once)
    with pytest.raises(KeyboardInterrupt):
        part2.run_finalists(SETTING, whole, 3, 9, CPU, tmp_path)
    assert (tmp_path / "finalists.csv").read_text() == "of an earlier run"
    monkeypatch.setattr(part2, "run_jobs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        part2.run_finalists(SETTING, whole, 3, 9, CPU, tmp_path)
    table = pd.read_csv(tmp_path / "finalists.csv")
    assert table.status.tolist() == ["ok", "failed"]
    best = json.loads((tmp_path / "best_params.json").read_text())
    assert (best["trial"], best["epochs"], best["held_out_top1_percent"]) == (2, 9, 70.0)


def test_a_configuration_of_another_data_set_is_not_trained(quick: Path, image_folder, capsys):
    flags = ["--dataset", "folder", "--data-dir", str(image_folder), "--image-size", "16"]
    flags += ["--stage", "final", "--study-name", "quick", "--device", "cpu"]
    assert part2.main([*flags, "--output-dir", str(quick.parent)]) == 2
    assert "found on digits" in capsys.readouterr().err


def test_a_training_that_fails_is_a_row_and_the_others_go_on(tmp_path: Path, monkeypatch):
    good, bad = part2.HParams(width=8, batch_size=64), part2.HParams(width=8, optimizer="none")
    chosen = {"default": bad, "tuned": good}
    epochs = {"default": 1, "tuned": 1}
    rows = part2.run_final(SETTING, chosen, epochs, 1, False, CPU, {"who": "me"}, tmp_path)
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert "none" in rows[0]["reason"]
    table = pd.read_csv(tmp_path / "final.csv")
    assert table.status.tolist() == ["failed", "ok"]
    assert table.top1_percent.isna().tolist() == [True, False]
    assert (tmp_path / "best.safetensors").exists()
    assert json.loads((tmp_path / "final_environment.json").read_text()) == {"who": "me"}
    assert [row["trainings"] for row in part2.tuning_report.summarize(rows)] == [1]


def test_a_named_study_has_a_folder_of_its_own(tmp_path: Path):
    flags = ["--study-name", "random", "--sampler", "random", "--output-dir", str(tmp_path)]
    assert part2.main([*TINY_RUN, *flags, "--configurations", "tuned"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["random"]
    final = pd.read_csv(tmp_path / "random" / "final.csv")
    assert final.configuration.tolist() == ["tuned"]
    assert json.loads((tmp_path / "random" / "best_params.json").read_text())["study"] == "random"


@pytest.mark.parametrize(("flags", "epochs"), [([], (145, 21)), (["--final-epochs", "2"], (2, 2))])
def test_a_preset_has_its_own_number_of_epochs(flags, epochs, tmp_path: Path, monkeypatch):
    asked: dict[str, int] = {}

    def run_final(setting, chosen, epochs, *_):
        asked.update({name: epochs[name] for name in chosen})
        return []

    monkeypatch.setattr(part2, "run_final", run_final)
    command = ["--dataset", "digits", "--stage", "final", "--configurations", "deep,fast"]
    part2.main([*command, "--device", "cpu", "--output-dir", str(tmp_path), *flags])
    assert asked == dict(zip(("deep", "fast"), epochs, strict=True))


def test_held_out_images_are_not_trained_on():
    task, held_out = part2.load_task(SETTING, False, CPU)
    assert (len(task.images), len(held_out)) == (180, 20)
    trained = {image.numpy().tobytes() for image in task.images.images}
    everything = {image.numpy().tobytes() for image in SETTING.load("train").images}
    apart = {image.numpy().tobytes() for image in held_out.images}
    assert not trained & apart
    assert trained | apart == everything


def test_final_trainings_that_all_lack_something_are_no_success(tmp_path: Path, monkeypatch):
    def too_little_memory(function, jobs, places):
        return [({"status": "unavailable", "reason": "out of memory"}, None) for _ in jobs]

    monkeypatch.setattr(part2, "run_jobs", too_little_memory)
    flags = ["--stage", "final", "--configurations", "default", "--output-dir", str(tmp_path)]
    assert part2.main([*TINY_RUN, *flags]) == 1
    assert pd.read_csv(tmp_path / "final.csv").status.tolist() == ["unavailable"]


def test_a_best_configuration_must_fit_these_classes_and_the_limit(quick: Path):
    path, setting = quick / "best_params.json", replace(SETTING, max_params=150_000)
    classes = setting.load("train").classes
    assert part2.read_tuned(path, setting, classes).width >= 8
    with pytest.raises(UserError, match="other classes"):
        part2.read_tuned(path, setting, classes[:-1])
    with pytest.raises(UserError, match="--max-params is 1000: raise it"):
        part2.read_tuned(path, replace(setting, max_params=1000), classes)


def test_images_that_are_not_square_are_refused(monkeypatch):
    images = ImageSet(
        "digits", "train", torch.zeros(4, 3, 8, 9).byte(), torch.tensor([0, 1, 0, 1]), ("a", "b")
    )
    monkeypatch.setattr(part2.data, "load_images", lambda *_: images)
    with pytest.raises(UserError, match="8x9 pixels"):
        part2.load_checked(SETTING, tuned=True)


def test_default_alone_needs_no_study(tmp_path: Path):
    flags = ["--stage", "final", "--configurations", "default", "--output-dir", str(tmp_path)]
    assert part2.main([*TINY_RUN, *flags]) == 0
    assert len(pd.read_csv(tmp_path / "final.csv")) == 1


def test_own_images_are_tuned_on(image_folder: Path, tmp_path: Path):
    flags = ["--dataset", "folder", "--data-dir", str(image_folder), "--image-size", "16"]
    flags += ["--trials", "2", "--tune-epochs", "1", "--final-epochs", "1", "--repeats", "1"]
    flags += ["--device", "cpu", "--max-params", "100000", "--output-dir", str(tmp_path / "out")]
    assert part2.main(flags) == 0
    model = part2.load_checkpoint(tmp_path / "out" / "best.safetensors")
    assert model.classes == ("ant", "cat", "dog")
    assert model.preprocessing.input_size == 16


def test_sigterm_keeps_what_is_finished_and_the_next_run_goes_on(tmp_path: Path):
    flags = [*TINY_RUN, "--stage", "tune", "--workers", "2", "--output-dir", str(tmp_path)]
    command = [sys.executable, "part2_tune.py", *flags]
    process = subprocess.Popen([*command, "--trials", "500"], cwd=ROOT, stderr=subprocess.PIPE)
    journal, name = tmp_path / "study.journal", part2.STUDY_NAME
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if journal.exists() and journal.read_bytes().count(b'"state":1') >= 4:
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"Traceback" not in errors
    trials = study.load_study(str(journal), name).trials
    assert not [trial for trial in trials if trial.state.name == "RUNNING"]
    finished = sum(trial.state.name == "COMPLETE" for trial in trials)
    assert finished >= 3
    started = sum(trial.state.name != "WAITING" for trial in trials)
    assert len(pd.read_csv(tmp_path / "trials.csv")) == started
    assert part2.main([*flags, "--trials", str(finished + 2)]) == 0
    trials = study.load_study(str(journal), name).trials
    assert sum(map(study.is_finished, trials)) == finished + 2


@pytest.mark.parametrize(
    "flags",
    [
        ["--stage", "deploy"],
        ["--dataset", "cifar10"],
        ["--dataset", "folder", "--data-dir", "/nonexistent"],
        ["--image-size", "0"],
        ["--train-images", "-3"],
        ["--train-images", "99999"],
        ["--trials", "0"],
        ["--trials", "many"],
        ["--workers", "0"],
        ["--timeout", "nan"],
        ["--tune-epochs", "0"],
        ["--sampler", "grid"],
        ["--pruner", "all"],
        ["--storage", "nosuchdb://host/name"],
        ["--study-name", "a/b"],
        ["--study-name", ""],
        ["--max-params", "10"],
        ["--final-epochs", "1.5"],
        ["--repeats", "0"],
        ["--configurations", "best"],
        ["--configurations", ","],
        ["--device", "tpu"],
        ["--device", "cuda"],
        ["--threads", "0"],
        ["--threads", "1000000"],
        ["--seed", "-1"],
        ["--output-dir", "/proc/none"],
        ["--stage", "final"],  # without a study
        ["--stage", "final", "--fresh"],
        ["--study-name", ".."],
        ["--train-images", "10"],  # one of each class
        ["--learning-rate", "1"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, tmp_path: Path, capsys):
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert part2.main([*TINY_RUN, "--output-dir", str(tmp_path), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert not list(tmp_path.glob("*.csv"))


@pytest.mark.parametrize("damage", ["missing", "card", "weights", "other"])
def test_checkpoints_that_are_not_usable(damage, tmp_path: Path):
    network = part2.start_network(SMALL, 10, CPU, 0)
    architecture = part2.architecture_of(SMALL, 10)
    how = Preprocessing(8, (0.5,) * 3, (0.25,) * 3)
    checkpoint = Checkpoint(round_to_half(network), architecture, how, 9.0)
    path = tmp_path / "net.safetensors"
    row = {"seed": 0, "epochs": 1, "train_images": 30, "train_seconds": 1.0, "hparams": "{}"}
    part2.save_network(path, checkpoint, SETTING, row, CPU)
    assert json.loads(path.with_suffix(".json").read_text())["hardware"] == "CPU"
    assert isinstance(part2.load_checkpoint(path).module, nn.Module)
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
        part2.load_checkpoint(path)


@pytest.mark.skipif("CIFAR100_DIR" not in os.environ, reason="set CIFAR100_DIR to real images")
def test_the_committed_network_reproduces_its_accuracy():
    path = ROOT / "weights" / "smallcnn_cifar100.safetensors"
    model = part2.load_checkpoint(path)
    test_set = load_images("cifar100", "test", Path(os.environ["CIFAR100_DIR"]))
    task = part2.Task(test_set, model.preprocessing.mean, model.preprocessing.std, False)
    top1 = part2.evaluate(model.module, test_set, task, half=False)["top1_percent"]
    assert top1 == json.loads(path.with_suffix(".json").read_text())["top1"]
