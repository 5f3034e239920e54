"""Tables and figures of a study, on studies made by hand."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial
from scipy import stats

from utils import tuning_report
from utils.cli import UserError

NAMES = ("x", "noise")


@dataclass
class Example:
    x: float = 1.0
    noise: float = 2.0


def make_study(complete: int) -> optuna.Study:
    """Trials whose value is 50 + 10 x, a pruned one, a failed one and a waiting one."""
    study = optuna.create_study(direction="maximize", study_name="made")
    study.set_user_attr("setting", {"dataset": "digits"})
    space: dict[str, Any] = dict.fromkeys(NAMES, FloatDistribution(0, 1))
    for i in range(complete):
        params = {"x": i / complete, "noise": (i * 7 % complete) / complete}
        value = 50 + 10 * params["x"]
        study.add_trial(
            create_trial(
                params=params,
                distributions=space,
                value=value,
                intermediate_values={1: value - 1, 2: value},
                user_attrs={
                    "hparams": params,
                    "parameters": 123,
                    "history": [
                        {"epoch": n, "loss": 3 - n, "seconds": n, "setup_seconds": 0.5}
                        for n in (1, 2)
                    ],
                },
            )
        )
    pruned = create_trial(state=TrialState.PRUNED, value=40.0, intermediate_values={1: 40.0})
    failed = create_trial(state=TrialState.FAIL, user_attrs={"reason": "out of memory"})
    study.add_trials([pruned, failed])
    study.enqueue_trial({"x": 0.5})
    return study


def test_tables_of_a_study(tmp_path: Path):
    tuning_report.write_study(make_study(30), NAMES, tmp_path)
    trials = pd.read_csv(tmp_path / "trials.csv")
    assert tuple(trials.columns) == (*tuning_report.TRIAL_COLUMNS, *NAMES)
    assert trials.state.tolist() == ["complete"] * 30 + ["pruned", "fail"]
    assert trials.reason.tolist()[-1] == "out of memory"
    assert trials.epochs.tolist() == [2] * 30 + [0, 0]
    assert trials.train_seconds[0] == 2
    history = pd.read_csv(tmp_path / "history.csv")
    assert len(history) == 61
    assert history.loss.tolist()[:2] == [2, 1]
    best = json.loads((tmp_path / "best_params.json").read_text())
    assert best["trial"] == 29
    assert best["dataset"] == "digits"
    importances = pd.read_csv(tmp_path / "importances.csv")
    assert importances.hyperparameter[0] == "x"
    assert importances.importance[0] > 0.6
    assert (importances.complete_trials == 30).all()
    for name in tuning_report.FIGURES[:4]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_few_complete_trials_have_no_importances(tmp_path: Path):
    tuning_report.write_study(make_study(24), NAMES, tmp_path)
    assert pd.read_csv(tmp_path / "importances.csv").empty
    assert not (tmp_path / "importances.png").exists()


def test_without_a_complete_trial_there_is_a_table_and_no_best_configuration(tmp_path: Path):
    tuning_report.write_study(make_study(0), NAMES, tmp_path)
    assert len(pd.read_csv(tmp_path / "trials.csv")) == 2
    assert not (tmp_path / "best_params.json").exists()


def test_finalists_decide_before_trials(tmp_path: Path):
    (tmp_path / "finalists.csv").write_text("")
    (tmp_path / "best_params.json").write_text("theirs")
    tuning_report.write_study(make_study(3), NAMES, tmp_path)
    assert (tmp_path / "best_params.json").read_text() == "theirs"


def test_the_best_finalist_is_the_best_configuration(tmp_path: Path):
    study = make_study(3)
    trials = tuning_report.best_trials(study, 2)
    assert [trial.value for trial in trials] == sorted(
        (trial.value for trial in study.trials if trial.value is not None), reverse=True
    )[:2]
    rows: list[dict[str, Any]] = [
        {"trial": trial.number, "status": "ok", "epochs": 9, "held_out_top1_percent": top1}
        for trial, top1 in zip(trials, (70.0, 71.0), strict=True)
    ]
    tuning_report.write_finalists(rows, trials, study, tmp_path)
    best = json.loads((tmp_path / "best_params.json").read_text())
    assert (best["trial"], best["held_out_top1_percent"], best["epochs"]) == (
        trials[1].number,
        71.0,
        9,
    )
    rows[1] = {"trial": trials[1].number, "status": "failed"}
    tuning_report.write_finalists(rows, trials, study, tmp_path)
    assert json.loads((tmp_path / "best_params.json").read_text())["trial"] == trials[0].number
    rows[0] = {"trial": trials[0].number, "status": "failed"}
    tuning_report.write_finalists(rows, trials, study, tmp_path)  # the study's best remains
    assert json.loads((tmp_path / "best_params.json").read_text())["trial"] == trials[0].number
    assert pd.read_csv(tmp_path / "finalists.csv").status.tolist() == ["failed", "failed"]


def test_configurations_compete_once():
    study = make_study(2)
    study.add_trial(study.trials[1])
    assert [trial.number for trial in tuning_report.best_trials(study, 9)] == [1, 0]


def final_rows(*top1: float | None) -> list[dict[str, Any]]:
    common = {"study": "s", "configuration": "tuned", "parameters": 7, "epochs": 2}
    common["train_seconds"] = 1.5
    return [
        common
        | {"seed": i, "status": "failed" if value is None else "ok"}
        | ({} if value is None else {"top1_percent": value})
        for i, value in enumerate(top1)
    ]


def test_summary_is_the_t_interval_of_what_succeeded():
    (row,) = tuning_report.summarize(final_rows(80.0, None, 81.0, 80.4))
    assert row["trainings"] == 3
    assert row["top1_percent_mean"] == pytest.approx(80.4667, abs=1e-4)
    low, high = stats.t.interval(0.95, 2, row["top1_percent_mean"], stats.sem([80, 81, 80.4]))
    assert (row["top1_percent_low"], row["top1_percent_high"]) == pytest.approx((low, high))
    (pair,) = tuning_report.summarize(final_rows(80.0, 81.0))
    assert pair["top1_percent_sd"] > 0
    assert pair["top1_percent_low"] is None
    assert tuning_report.summarize(final_rows(None)) == []


def test_final_table_and_figure(tmp_path: Path):
    tuning_report.write_final(final_rows(80.0, None), [], tmp_path)
    table = pd.read_csv(tmp_path / "final.csv")
    assert tuple(table.columns) == tuning_report.FINAL_COLUMNS
    assert table.top1_percent.isna().tolist() == [False, True]
    summary = pd.read_csv(tmp_path / "final_summary.csv")
    assert tuple(summary.columns) == tuning_report.SUMMARY_COLUMNS
    assert summary.top1_percent_mean.tolist() == [80.0]
    assert (tmp_path / "final.png").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"dataset": "digits", "hparams": {"x": 1.0}}', "damaged"),
        ('{"dataset": "digits", "hparams": {"x": 1.0, "noise": "loud"}}', "damaged"),
        ('{"dataset": "cifar100", "hparams": {"x": 1.0, "noise": 2.0}}', "found on cifar100"),
        (
            '{"dataset": "digits", "classes": "def", "hparams": {"x": 1.0, "noise": 2.0}}',
            "found on other classes",
        ),
    ],
)
def test_best_configurations_that_are_not_usable(text, message, tmp_path: Path):
    path = tmp_path / "best_params.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        tuning_report.read_best(path, "digits", "abc", Example(), ["x", "noise"])


def test_best_configuration_is_read_back(tmp_path: Path):
    tuning_report.write_study(make_study(3), NAMES, tmp_path)
    path = tmp_path / "best_params.json"
    best = tuning_report.read_best(path, "digits", "abc", Example(), ["x", "noise"])
    assert best == {"x": 2 / 3, "noise": pytest.approx((2 * 7 % 3) / 3)}


def test_a_best_configuration_from_before_a_field_existed_gets_its_default(tmp_path: Path):
    path = tmp_path / "best_params.json"
    path.write_text('{"dataset": "digits", "hparams": {"x": 1.0}}')
    best = tuning_report.read_best(path, "digits", "abc", Example(noise=0.5), ["x"])
    assert best == {"x": 1.0, "noise": 0.5}


def test_deleting_results_spares_the_storage(tmp_path: Path):
    for name in ("final.csv", "best.safetensors", "importances.png", "study.journal", "mine.txt"):
        (tmp_path / name).touch()
    tuning_report.delete_results(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"study.journal", "mine.txt"}
