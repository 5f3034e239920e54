"""What the figures of Part 2 compute, and that they are drawn from the CSV files alone."""

from pathlib import Path

import pandas as pd

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


def test_the_best_so_far_is_a_complete_trial():
    line = figures.best_so_far(TRIALS[TRIALS.study == "smallcnn"])
    assert line.epochs.tolist() == [15, 18, 33, 48]
    assert line.best.tolist() == [70.0, 70.0, 70.0, 72.0]


def test_optimizers_are_compared_over_all_trials_of_a_study():
    trials = TRIALS.assign(optimizer=["muon", "muon", "sgd", "muon", "sgd"])
    keys = trials[["study", "trial"]]
    history = pd.concat(
        [keys.assign(epoch=e, held_out_top1_percent=[10.0, 20, 30, 60, 50]) for e in (1, 3)]
    )
    found = figures.compare_optimizers(trials, history, 3).to_dict("records")
    names = ("study", "optimizer", "trials", "top1_percent_mean", "top1_percent_best", "complete")
    assert [tuple(row[name] for name in names) for row in found] == [
        ("smallcnn", "muon", 3, 30.0, 60.0, 3),
        ("smallcnn", "sgd", 1, 30.0, 30.0, 0),
        ("random", "sgd", 1, 50.0, 50.0, 1),
    ]


def test_every_figure_is_drawn_from_tables(tmp_path: Path):
    TRIALS.assign(width=[1, 2, 3, 4, 5], optimizer="muon").to_csv(tmp_path / "part2_trials.csv")
    history = {"study": "smallcnn", "trial": 0, "state": "complete", "epoch": [1, 3]}
    pd.DataFrame(history | {"held_out_top1_percent": [1.0, 2.0]}).to_csv(
        tmp_path / "part2_history.csv"
    )
    importances = {"hyperparameter": ["width"], "importance": 1.0, "complete_trials": 3}
    pd.DataFrame(importances).to_csv(tmp_path / "part2_importances.csv")
    final = {
        "study": ["smallcnn", "smallcnn", "random"],
        "configuration": ["default", "tuned", "tuned"],
        "status": "ok",
        "top1_percent": [80.0, 81.0, 80.5],
        "parameters": 7,
        "epochs": 80,
        "train_seconds": 50.0,
    }
    pd.DataFrame(final).to_csv(tmp_path / "part2_final.csv")
    drawn = figures.draw_part2(tmp_path, tmp_path / "figures")
    assert [path.name for path in drawn] == [*tuning_report.FIGURES, "searches.png"]
    assert all(path.stat().st_size > 5000 for path in drawn)
