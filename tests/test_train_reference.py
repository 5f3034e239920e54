"""Training the reference models: augmentation, losses, short runs, and the weights as committed."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from utils.cli import UserError
from utils.data import ROOT, ImageSet, Preprocessing, hold_out, load_images, preprocess
from utils.models import (
    REFERENCE_MODELS,
    WEIGHTS_DIR,
    ModelSource,
    build_reference_vit,
    load_model,
    sample_logits,
    sha256_of,
)
from weights import train_reference as tr

NOTHING = tr.Augmentation(False, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
TINY_IMAGENET = Path(os.environ.get("TINY_IMAGENET_DIR", ROOT / "data" / "tiny-imagenet"))
SIZE_LIMIT_BYTES = {"vit_tiny_imagenet": 22_000_000, "vit_digits": 1_000_000}


# --- augmentation ---------------------------------------------------------------------------------


def test_augment_switched_off_is_the_preprocessing_of_evaluation() -> None:
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    x, targets = tr.augment(images, torch.tensor([2, 0, 1]), 3, 64, NOTHING)
    expected = preprocess(images, Preprocessing(64, tr.MEAN, tr.STD))
    torch.testing.assert_close(x, expected, atol=1e-3, rtol=0)
    assert targets.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]


def test_augment_keeps_every_value_finite_and_targets_summing_to_one() -> None:
    recipe = tr.RECIPES["vit_tiny_imagenet"]
    images = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)
    x, targets = tr.augment(images, torch.arange(64) % 5, 5, 64, recipe.augmentation)
    assert x.isfinite().all()
    assert x.std() > 0.1
    torch.testing.assert_close(targets.sum(1), torch.ones(64))


def test_erasing_sets_a_square_to_the_mean() -> None:
    images = torch.full((16, 3, 64, 64), 255, dtype=torch.uint8)
    labels = torch.zeros(16, dtype=torch.long)
    x, _ = tr.augment(images, labels, 1, 64, replace(NOTHING, erase=1.0))
    erased = x.eq(0).float().mean((1, 2, 3))
    assert (erased > 0.01).all()
    assert (erased < 0.35).all()


def test_calm_views_are_close_to_the_images() -> None:
    calm = tr.calm_down(tr.Augmentation(crop_area=0.2, mixup=0.5))
    assert (calm.mixup, calm.cutmix, calm.erase, calm.crop_area) == (0, 0, 0, 0.5)
    assert tr.calm_down(tr.Augmentation(crop_area=0.7)).crop_area == 0.7


# --- losses, optimiser, networks ------------------------------------------------------------------


def test_distillation_loss_adds_up() -> None:
    logits, tokens = torch.randn(4, 5), torch.randn(4, 6, 8)
    targets = F.one_hot(torch.tensor([0, 1, 2, 3]), 5).float()
    recipe = replace(tr.RECIPES["vit_tiny_imagenet"], label_weight=0.0)

    def loss_of(recipe: tr.Recipe, student_logits: Tensor, student_tokens: Tensor) -> float:
        loss = tr.distillation_loss(lambda _: (logits, tokens), recipe)
        return loss((student_logits, student_tokens), torch.empty(0), targets).item()

    assert loss_of(recipe, logits + 3, 2 * tokens) == pytest.approx(0, abs=1e-5)
    assert loss_of(recipe, logits, -tokens) == pytest.approx(2 * recipe.guide_weight, abs=1e-5)
    other, t = torch.randn(4, 5), recipe.temperature
    p, q = (logits / t).softmax(1), (other / t).softmax(1)
    expected = t * t * (p * (p / q).log()).sum(1).mean().item()
    assert loss_of(recipe, other, tokens) == pytest.approx(expected, abs=1e-4)
    hard = replace(recipe, label_weight=0.5, label_smoothing=0.0)
    expected = 0.5 * F.cross_entropy(logits, targets.argmax(1)).item()
    assert loss_of(hard, logits, tokens) == pytest.approx(expected, abs=1e-4)


def test_weight_decay_spares_vectors_and_position_embeddings() -> None:
    recipe = tr.RECIPES["vit_digits"]
    vit = build_reference_vit(**recipe.architecture, num_classes=10)
    spared, decayed = tr.make_optimizer(vit, recipe.student).param_groups
    assert decayed["weight_decay"] == recipe.student.weight_decay
    assert spared["weight_decay"] == 0
    exempt = {id(p) for p in spared["params"]}
    for name, parameter in vit.named_parameters():
        assert (id(parameter) in exempt) == (parameter.ndim == 1 or name == "pos_embed"), name


def test_teacher_and_student_see_the_same_grid() -> None:
    x = torch.randn(2, 3, 64, 64)
    recipe = tr.RECIPES["vit_tiny_imagenet"]
    teacher = tr.Teacher(8, 5)
    vit = build_reference_vit(**recipe.architecture | {"depth": 1}, num_classes=5)
    student = tr.Student(vit, nn.Linear(recipe.architecture["width"], 64))
    assert [tuple(y.shape) for y in teacher(x)] == [(2, 5), (2, 64, 64)]
    assert [tuple(y.shape) for y in student(x)] == [(2, 5), (2, 64, 64)]


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    recipe = tr.RECIPES["vit_digits"]
    task = tr.Task(recipe, *hold_out(load_images("digits", "train", num_images=100), 0.1))
    vit = build_reference_vit(**recipe.architecture, num_classes=10)
    with pytest.raises(UserError, match="lower the recipe's learning rate"):
        tr.train_phase(
            "student",
            tr.Student(vit, nn.Identity()),
            recipe.student,
            lambda output, _, __: output[0].sum() * float("nan"),
            task,
        )


# --- whole runs -----------------------------------------------------------------------------------


def test_trainings_of_one_seed_are_equal_and_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    phase = replace(
        tr.RECIPES["vit_digits"].student, epochs=8, warmup=1, learning_rate=1e-2, calm=0.2
    )
    small = {"image_size": 8, "patch_size": 2, "width": 48, "depth": 1, "heads": 2}
    recipe = replace(tr.RECIPES["vit_digits"], student=phase, architecture=small)
    task = tr.Task(recipe, *hold_out(load_images("digits", "train", num_images=500), 0.2))
    threads, states = torch.get_num_threads(), []
    rates: set[float] = set()
    torch.set_num_threads(1)

    def watch(module: nn.Module, optimizer: torch.optim.Optimizer, *rest: Any) -> Any:
        rates.update(float(group["lr"]) for group in optimizer.param_groups)
        return make_step(module, optimizer, *rest)

    make_step = tr.make_step
    monkeypatch.setattr(tr, "make_step", watch)
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        vit, facts = tr.train_reference(task)
        states.append(torch.cat([value.flatten() for value in vit.state_dict().values()]))
        assert facts["student_epochs"] == 8
        assert facts["student_held_out_top1"] > 30  # of ten classes
    torch.set_num_threads(threads)
    assert states[0].equal(states[1])
    assert not states[0].equal(states[2])
    assert rates == {0.0}  # recording a step on a GPU trains nothing


def test_quick_run_with_teacher_writes_a_model_and_leaves_weights_alone(
    tiny_imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sha256_of(WEIGHTS_DIR / "vit_tiny_imagenet.safetensors")
    monkeypatch.chdir(tmp_path)
    arguments = ["--quick", "--device", "cpu", "--data-dir", str(tiny_imagenet)]
    assert tr.main([*arguments, "--model", "vit_tiny_imagenet"]) == 0
    weights = tmp_path / "results/train_reference/vit_tiny_imagenet.safetensors"
    card = json.loads(weights.with_suffix(".json").read_text())
    assert card["sha256"] == sha256_of(weights)
    assert (card["training_images"], card["held_out_images"], card["n_images"]) == (9, 3, 12)
    assert (card["teacher_epochs"], card["student_epochs"]) == (1, 1)
    state = load_file(weights)
    assert {v.dtype for v in state.values()} == {torch.float16, torch.int64}  # int64: counters
    assert not any("guide" in name for name in state)
    assert sha256_of(WEIGHTS_DIR / "vit_tiny_imagenet.safetensors") == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "resnet"],
        ["--seed", "first"],
        ["--data-dir", "/nonexistent"],
        ["--no-such-flag"],
    ],
)
def test_bad_values_are_one_line_errors(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tr.main(["--output-dir", str(tmp_path / "o"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


# --- the weights as committed ---------------------------------------------------------------------


def card_of(name: str) -> dict[str, Any]:
    return json.loads((WEIGHTS_DIR / f"{name}.json").read_text())


def top1(name: str, images: ImageSet) -> float:
    preprocessing = tr.RECIPES[name].preprocessing
    return tr.accuracy(load_model(ModelSource(name)).module, images, preprocessing)[0]


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_committed_weights_give_the_logits_of_their_card(name: str) -> None:
    card, model = card_of(name), load_model(ModelSource(name))
    logits = sample_logits(model.module, model.preprocessing.input_size)
    expected = torch.tensor(card["sample_logits"])
    torch.testing.assert_close(torch.tensor(logits), expected, atol=2e-3, rtol=0)
    assert (WEIGHTS_DIR / f"{name}.safetensors").stat().st_size < SIZE_LIMIT_BYTES[name]
    assert model.preprocessing == tr.RECIPES[name].preprocessing


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_card_names_the_recipe_of_the_code(name: str) -> None:
    assert shared(card_of(name)["recipe"], json.loads(json.dumps(asdict(tr.RECIPES[name]))))


def shared(card: Any, code: Any) -> bool:
    """Does the card agree with the code wherever the code says something?"""
    if not isinstance(code, dict):
        return card == code
    return all(shared(card[key], value) for key, value in code.items())


def test_digits_accuracy_is_that_of_its_card() -> None:
    images = load_images("digits", "test")
    card = card_of("vit_digits")
    assert len(images) == card["n_images"]
    assert top1("vit_digits", images) == pytest.approx(card["top1"], abs=0.005)
    assert card["top1"] >= 98


@pytest.mark.skipif(
    not (TINY_IMAGENET / "wnids.txt").is_file(), reason="needs the Tiny-ImageNet images"
)
def test_tiny_imagenet_accuracy_is_that_of_its_card() -> None:
    images = load_images("tiny-imagenet", "val", TINY_IMAGENET)
    card = card_of("vit_tiny_imagenet")
    assert len(images) == card["n_images"] == 10_000
    assert top1("vit_tiny_imagenet", images) == pytest.approx(card["top1"], abs=0.1)
