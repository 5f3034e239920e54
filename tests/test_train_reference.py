"""Training the reference models: augmentation, schedule, resuming, and the weights as committed."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from utils import train_reference as tr
from utils.cli import UserError
from utils.data import ROOT, ImageSet, Preprocessing, hold_out, load_images, preprocess
from utils.models import REFERENCE_MODELS, WEIGHTS_DIR, load_model, sample_logits, sha256_of

CPU = torch.device("cpu")
NOTHING = tr.Augmentation(False, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
TINY_IMAGENET = Path(os.environ.get("TINY_IMAGENET_DIR", ROOT / "data" / "tiny-imagenet"))
SIZE_LIMIT_BYTES = {"vit_tiny_imagenet": 22_000_000, "vit_digits": 1_000_000}


# --- augmentation ---------------------------------------------------------------------------------


def test_augment_switched_off_is_the_preprocessing_of_evaluation():
    recipe = tr.RECIPES["vit_tiny_imagenet"]
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    x, targets = tr.augment(images, torch.tensor([2, 0, 1]), 3, recipe, NOTHING)
    expected = preprocess(images, Preprocessing(64, tr.MEAN, tr.STD))
    torch.testing.assert_close(x, expected, atol=1e-3, rtol=0)
    assert targets.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]


def test_augment_keeps_every_value_finite_and_targets_summing_to_one():
    recipe = tr.RECIPES["vit_tiny_imagenet"]
    images = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)
    x, targets = tr.augment(images, torch.arange(64) % 5, 5, recipe, recipe.augmentation)
    assert x.isfinite().all()
    assert x.std() > 0.1
    torch.testing.assert_close(targets.sum(1), torch.ones(64))


def test_erasing_sets_a_square_to_the_mean():
    recipe = tr.RECIPES["vit_tiny_imagenet"]
    images = torch.full((16, 3, 64, 64), 255, dtype=torch.uint8)
    how = replace(NOTHING, erase=1.0)
    x, _ = tr.augment(images, torch.zeros(16, dtype=torch.long), 1, recipe, how)
    erased = x.eq(0).float().mean((1, 2, 3))
    assert (erased > 0.01).all()
    assert (erased < 0.35).all()


# --- schedule, losses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "expected"), [(1000.0, 30), (40.0, 14), (float("inf"), 30), (-5.0, 10)]
)
def test_fit_epochs(left, expected):
    assert tr.fit_epochs(30, 10, left, 10.0) == expected


def test_last_epochs_are_calm():
    phase = tr.RECIPES["vit_tiny_imagenet"].student
    assert [phase.is_calm(epoch, 20) for epoch in (0, 17, 18, 19)] == [False, False, True, True]
    calm = tr.calm_down(tr.Augmentation(crop_area=0.2, mixup=0.5))
    assert (calm.mixup, calm.cutmix, calm.erase, calm.crop_area) == (0, 0, 0, 0.5)
    assert tr.calm_down(tr.Augmentation(crop_area=0.7)).crop_area == 0.7


def test_distillation_loss_adds_up():
    logits, tokens = torch.randn(4, 5), torch.randn(4, 6, 8)
    targets = F.one_hot(torch.tensor([0, 1, 2, 3]), 5).float()
    recipe = replace(tr.RECIPES["vit_tiny_imagenet"], label_weight=0.0)

    def loss_of(recipe, student_logits, student_tokens):
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


def test_weight_decay_spares_vectors_and_position_embeddings():
    phase = tr.RECIPES["vit_digits"].student
    recipe = tr.RECIPES["vit_digits"]
    vit = tr.models.build_reference_vit(**recipe.architecture, num_classes=10)
    decayed, spared = tr.make_optimizer(vit, phase).param_groups
    assert decayed["weight_decay"] == phase.weight_decay
    assert spared["weight_decay"] == 0
    exempt = {id(p) for p in spared["params"]}
    for name, parameter in vit.named_parameters():
        assert (id(parameter) in exempt) == (parameter.ndim == 1 or name == "pos_embed"), name


def test_teacher_and_student_see_the_same_grid():
    x = torch.randn(2, 3, 64, 64)
    recipe = tr.RECIPES["vit_tiny_imagenet"]
    teacher = tr.Teacher(8, 5)
    vit = tr.models.build_reference_vit(**recipe.architecture | {"depth": 1}, num_classes=5)
    student = tr.Student(vit, nn.Linear(recipe.architecture["width"], 64))
    assert [tuple(y.shape) for y in teacher(x)] == [(2, 5), (2, 64, 64)]
    assert [tuple(y.shape) for y in student(x)] == [(2, 5), (2, 64, 64)]


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    images = load_images("digits", "train", num_images=100)
    train, held_out = hold_out(images, 0.1)
    recipe = tr.RECIPES["vit_digits"]
    setting = tr.Setting(recipe, train, held_out, 0, tmp_path)
    with pytest.raises(UserError, match="lower the learning rate"):
        tr.train_phase(
            "student",
            setting,
            recipe.student,
            tr.Student(
                tr.models.build_reference_vit(**recipe.architecture, num_classes=10), nn.Identity()
            ),
            lambda output, _, __: output[0].sum() * float("nan"),
            60.0,
        )


# --- whole runs -----------------------------------------------------------------------------------


def digits_command(folder: Path, *extra: str) -> list[str]:
    return [
        *("--model", "vit_digits", "--device", "cpu", "--num-images", "140"),
        *("--output-dir", str(folder / "out"), "--checkpoint-dir", str(folder / "checkpoints")),
        *extra,
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "utils.train_reference", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_killed_run_continues_and_ends_as_if_it_had_not_been(tmp_path):
    arguments = digits_command(tmp_path / "killed", "--epochs", "30")
    victim = start(arguments)
    assert victim.stdout is not None
    line = victim.stdout.readline()  # printed after the checkpoint is written
    assert line.startswith("student 10/30")
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/out/vit_digits.safetensors").exists()

    second = start(arguments)
    printed, _ = second.communicate(timeout=120)
    assert second.returncode == 0
    assert "after epoch 10 of 30" in printed or "after epoch 20 of 30" in printed
    assert "student 10/30" not in printed
    assert not list((tmp_path / "killed/checkpoints/vit_digits").glob("*"))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert tr.main(digits_command(tmp_path / "whole", "--epochs", "30")) == 0
    torch.set_num_threads(threads)
    resumed, whole = (
        load_file(tmp_path / name / "out/vit_digits.safetensors") for name in ("killed", "whole")
    )
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_time_limit_plans_fewer_epochs(tmp_path):
    arguments = digits_command(tmp_path, "--epochs", "5000", "--max-minutes", "0.05")
    assert tr.main(arguments) == 0
    card = json.loads((tmp_path / "out/vit_digits.json").read_text())
    assert 2 <= card["student_epochs"] < 500
    assert card["student_best_epoch"] <= card["student_epochs"]


def test_checkpoint_of_another_recipe_is_not_continued(tmp_path, capsys):
    folder = tmp_path / "checkpoints" / "vit_digits"
    folder.mkdir(parents=True)
    torch.save({"key": "another"}, folder / "student.pt")
    assert tr.main(digits_command(tmp_path, "--epochs", "1")) == 0
    assert "belongs to another recipe" in capsys.readouterr().out


def test_quick_run_with_teacher_writes_a_model_and_leaves_weights_alone(tiny_imagenet, tmp_path):
    before = sha256_of(WEIGHTS_DIR / "vit_tiny_imagenet.safetensors")
    folder = tmp_path / "checkpoints"
    arguments = ["--quick", "--device", "cpu", "--data-dir", str(tiny_imagenet)]
    assert tr.main([*arguments, "--checkpoint-dir", str(folder)]) == 0
    weights = folder / "vit_tiny_imagenet" / "vit_tiny_imagenet.safetensors"
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
        ["--epochs", "0"],
        ["--max-minutes", "0"],
        ["--max-minutes", "soon"],
        ["--num-images", "1e3"],
        ["--data-dir", "/nonexistent"],
        ["--no-such-flag"],
    ],
)
def test_bad_values_are_one_line_errors(arguments, tmp_path, capsys):
    folders = ["--output-dir", str(tmp_path / "o"), "--checkpoint-dir", str(tmp_path / "c")]
    assert tr.main([*folders, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


# --- the weights as committed ---------------------------------------------------------------------


def card_of(name: str) -> dict:
    return json.loads((WEIGHTS_DIR / f"{name}.json").read_text())


def top1(name: str, images: ImageSet) -> float:
    model = load_model(name)
    return tr.top1_percent(model.module, images, model.preprocessing.input_size)


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_committed_weights_give_the_logits_of_their_card(name):
    card, model = card_of(name), load_model(name)
    logits = sample_logits(model.module, model.preprocessing.input_size)
    expected = torch.tensor(card["sample_logits"])
    torch.testing.assert_close(torch.tensor(logits), expected, atol=2e-3, rtol=0)
    assert (WEIGHTS_DIR / f"{name}.safetensors").stat().st_size < SIZE_LIMIT_BYTES[name]
    assert model.preprocessing.mean == tr.MEAN
    assert model.preprocessing.std == tr.STD


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_card_names_the_recipe_of_the_code(name):
    recipe = json.loads(json.dumps(tr.dataclasses.asdict(tr.RECIPES[name])))
    assert card_of(name)["recipe"] == recipe


def test_digits_accuracy_is_that_of_its_card():
    images = load_images("digits", "test")
    card = card_of("vit_digits")
    assert len(images) == card["n_images"]
    assert top1("vit_digits", images) == pytest.approx(card["top1"], abs=0.005)
    assert card["top1"] >= 98


@pytest.mark.skipif(
    not (TINY_IMAGENET / "wnids.txt").is_file(), reason="needs the Tiny-ImageNet images"
)
def test_tiny_imagenet_accuracy_is_that_of_its_card():
    images = load_images("tiny-imagenet", "val", TINY_IMAGENET)
    card = card_of("vit_tiny_imagenet")
    assert len(images) == card["n_images"] == 10_000
    assert top1("vit_tiny_imagenet", images) == pytest.approx(card["top1"], abs=0.1)
