"""What the figures of Part 2 compute, and that they are drawn from the CSV files alone."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from reports import part2_figures as figures
from utils import tuning_report

TRIALS = pd.DataFrame(
    [
        ("smallcnn", 2, "complete", 60.0, 15),
        ("smallcnn", 0, "complete", 70.0, 15),
        ("smallcnn", 1, "pruned", 90.0, 3),
        ("smallcnn", 3, "complete", 72.0, 15),
        ("random", 0, "complete", 65.0, 15),
    ],
    columns=["study", "trial", "state", "held_out_top1_percent", "epochs"],
)

FINAL = pd.DataFrame(
    {
        "study": ["smallcnn", "smallcnn", "random"],
        "configuration": ["default", "tuned", "tuned"],
        "status": "ok",
        "top1_percent": [80.0, 81.0, 80.5],
        "parameters": 7,
        "epochs": 80,
        "train_seconds": 50.0,
    }
)


def test_the_best_so_far_is_a_complete_trial():
    line = figures.best_so_far(TRIALS[TRIALS.study == "smallcnn"])
    assert line.epochs.tolist() == [15, 18, 33, 48]
    assert line.best.tolist() == [70.0, 70.0, 70.0, 72.0]


def test_optimizers_are_compared_over_all_trials_of_a_study():
    trials = TRIALS.assign(optimizer=["muon", "muon", "sgd", "muon", "sgd"], batch_size=64)
    keys = trials[["study", "trial"]]
    history = pd.concat(
        [keys.assign(epoch=e, held_out_top1_percent=[10.0, 20, 30, 60, 50]) for e in (1, 3)]
    )
    found = figures.compare_optimizers(trials, history, 3).fillna(-1.0)
    names = ["study", "optimizer", "trials", "top1_percent_mean", "complete"]
    assert found[[*names, "complete_top1_percent_best"]].to_numpy().tolist() == [
        ["random", "sgd", 1, 50.0, 1, 65.0],
        ["smallcnn", "muon", 3, 30.0, 3, 72.0],
        ["smallcnn", "sgd", 1, 30.0, 0, -1.0],
    ]


def timed(seconds: list[float]) -> pd.DataFrame:
    """Trials that start at 0, 1, 2 … seconds and take so long."""
    starts = [f"2026-01-01T00:00:0{i}" for i in range(len(seconds))]
    return pd.DataFrame({"started": starts, "total_seconds": seconds})


def test_costs_of_a_study():
    trials = TRIALS.assign(**timed([1.0, 9.0, 3.0, 4.0, 2.0]))
    finalists = pd.DataFrame({"study": ["smallcnn"] * 2, "train_seconds": [5.0, 6.5]})
    first, other = figures.summarize_costs(trials, finalists).to_dict("records")
    assert first == {
        "study": "smallcnn",
        "trials": 4,
        "complete": 3,
        "pruned": 1,
        "fail": 0,
        "epochs": 48,
        "epochs_without_pruner": 60,
        "epochs_saved_percent": 20.0,
        "trials_seconds": 10.0,
        "finalists_seconds": 11.5,
    }
    assert other["trials_seconds"] == 2.0
    assert other["finalists_seconds"] == 0


def test_speed_of_several_workers():
    probe = timed([11.0, 5.0]).assign(workers=2, epochs=3, setup_seconds=[1.0, 0.5])
    (row,) = figures.compare_workers(probe).to_dict("records")
    assert row["seconds"] == 11.0
    assert row["setup_seconds"] == 1.0
    assert row["trials_per_minute"] == 10.9
    assert row["epochs_per_minute_after_setup"] == 36.0


FACTORS = pd.DataFrame(
    [("a", "rate", "1", "2"), ("a", "mirrored", "true", "false"), ("b", "rate", "1", "2")],
    columns=["design", "factor", "from", "to"],
)


def run(
    design: str, levels: dict[str, object], top1: float, status: str = "ok"
) -> dict[str, object]:
    about = {"design": design, "factors": json.dumps(levels), "status": status}
    return about | {"top1_percent": top1, "averaged_top1_percent": -top1}


RUNS = pd.DataFrame(
    [
        *(
            run("a", {"rate": rate, "mirrored": mirrored}, 70 + 2 * rate + 3 * mirrored + noise)
            for rate, mirrored, noise in (
                (1, True, 1),
                (2, True, -1),
                (1, False, -1),
                (2, False, 1),
            )
        ),
        run("b", {"rate": 1}, 50.0),
        run("b", {"rate": 2}, 51.5),
        run("b", {"rate": 2}, math.nan, status="failed"),
    ]
)


def test_effects_are_changes_from_the_first_to_the_second_level():
    found = figures.estimate_effects(FACTORS, RUNS)
    assert found.top1_effect.tolist() == [2.0, -3.0, 1.5]
    assert found.averaged_top1_effect.tolist() == [-2.0, 3.0, -1.5]
    assert found.trainings.tolist() == [4, 4, 2]
    # Four residuals of 1, one degree of freedom: a deviation of 2; two runs against two.
    assert found.top1_standard_error.fillna(-1).tolist() == [2.0, 2.0, -1.0]


def test_every_figure_is_drawn_from_tables(tmp_path: Path):
    times = timed([1.0, 2.0, 3.0, 4.0, 5.0])
    trials = TRIALS.assign(width=[1, 2, 3, 4, 5], optimizer="muon", batch_size=64, **times)
    trials.to_csv(tmp_path / "part2_trials.csv")
    history = {"study": "smallcnn", "trial": 0, "state": "complete", "epoch": [1, 3]}
    pd.DataFrame(history | {"held_out_top1_percent": [1.0, 2.0]}).to_csv(
        tmp_path / "part2_history.csv"
    )
    importances = {"hyperparameter": ["width"], "importance": 1.0, "complete_trials": 3}
    pd.DataFrame(importances).to_csv(tmp_path / "part2_importances.csv")
    FINAL.to_csv(tmp_path / "part2_final.csv")
    drawn = figures.draw_part2(tmp_path, tmp_path / "figures")
    assert [path.name for path in drawn] == [*tuning_report.FIGURES, "searches.png"]
    assert all(path.stat().st_size > 5000 for path in drawn)


def test_tables_are_derived_from_the_trials(tmp_path: Path):
    trials = TRIALS.assign(optimizer="muon", batch_size=64, **timed([1.0, 2.0, 3.0, 4.0, 5.0]))
    history = trials[["study", "trial"]].assign(epoch=3, held_out_top1_percent=20.0)
    finalists = pd.DataFrame({"study": ["smallcnn"], "train_seconds": 5.0})
    probe = trials.assign(workers=1, setup_seconds=0.5)
    given = {"trials": trials, "history": history, "finalists": finalists, "probe_trials": probe}
    given |= {"final": FINAL, "factorial_factors": FACTORS, "factorial": RUNS}
    for name, table in given.items():
        table.to_csv(tmp_path / f"part2_{name}.csv", index=False)
    figures.write_tables(tmp_path)
    found = pd.read_csv(tmp_path / "part2_optimizers.csv")
    assert found.epoch.tolist() == [3, 3]  # the shortest trial's last
    assert found.trials.tolist() == [1, 4]
    assert pd.read_csv(tmp_path / "part2_costs.csv").finalists_seconds.tolist() == [5.0, 0.0]
    assert pd.read_csv(tmp_path / "part2_workers.csv").trials.tolist() == [5]
    assert len(pd.read_csv(tmp_path / "part2_factorial_effects.csv")) == 3
    final = pd.read_csv(tmp_path / "part2_final_summary.csv")
    assert final.top1_percent_mean.tolist() == [80.0, 81.0, 80.5]  # studies are not lumped together


@pytest.mark.parametrize(
    ("changed", "value"),
    [("status", "failed"), ("factors", '{"rate": 3, "mirrored": true}')],
)
def test_effects_that_cannot_be_told_apart_are_refused(changed, value):
    runs = RUNS.copy()
    runs.loc[0, changed] = value
    if changed == "status":  # two runs are left for three coefficients
        runs.loc[1, changed] = value
    with pytest.raises(ValueError, match="a: unknown levels, or too few runs for 2 factors"):
        figures.estimate_effects(FACTORS, runs)
