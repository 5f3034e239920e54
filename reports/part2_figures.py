"""Figures of Part 2, from the CSV files of its studies; `study` tells these apart."""

from pathlib import Path

import pandas as pd

from utils import tuning_report
from utils.figures import drawing

MAIN_STUDY = "smallcnn"
FIRST_RUNG = 3  # epochs, before which the pruner ends no trial


def draw_part2(data: Path, folder: Path) -> list[Path]:
    """The main study's own figures, every final training, and one search against another.

    Beside the CSV files it reads it writes part2_optimizers.csv.

    Args:
        data: holds part2_trials.csv, part2_history.csv and part2_final.csv, each of one or several
            studies, and the main study's part2_importances.csv.
    """
    folder.mkdir(exist_ok=True)
    trials, history, final = (
        pd.read_csv(data / f"part2_{name}.csv") for name in ("trials", "history", "final")
    )
    importances = rows_of(pd.read_csv(data / "part2_importances.csv"))
    main, of_main = (table[table.study == MAIN_STUDY] for table in (trials, history))
    tuning_report.draw_study(rows_of(main), rows_of(of_main), importances, folder)
    named = final.assign(
        configuration=final.configuration.where(
            final.study == MAIN_STUDY, final.study + ", " + final.configuration
        )
    )
    tuning_report.draw_final(rows_of(named[named.status == "ok"]), folder)
    draw_searches(trials, folder / "searches.png")
    optimizers = compare_optimizers(trials, history, FIRST_RUNG)
    optimizers.to_csv(data / "part2_optimizers.csv", index=False)
    names = (*tuning_report.FIGURES, "searches.png")
    return [folder / name for name in names if (folder / name).exists()]


def compare_optimizers(trials: pd.DataFrame, history: pd.DataFrame, epoch: int) -> pd.DataFrame:
    """Held-out top-1 after an epoch that every trial reaches, by study and optimiser.

    Unlike the importances, which see the survivors of the pruner alone, this is a comparison of all
    trials; in random search the optimisers meet configurations of the same distribution.
    """
    keys = ["study", "optimizer"]
    early = history[history.epoch == epoch].merge(trials[["study", "trial", "optimizer"]])
    table = early.groupby(keys, sort=False).held_out_top1_percent.agg(["count", "mean", "max"])
    complete = trials[trials.state == "complete"].groupby(keys).size()
    table = table.assign(complete=complete).fillna({"complete": 0}).reset_index()
    table.insert(2, "epoch", epoch)
    renamed = table.rename(
        columns={"count": "trials", "mean": "top1_percent_mean", "max": "top1_percent_best"}
    )
    return renamed.astype({"complete": int}).round(2)


def rows_of(table: pd.DataFrame) -> list[tuning_report.Row]:
    return [{str(key): row[key] for key in row} for row in table.to_dict("records")]


def best_so_far(trials: pd.DataFrame) -> pd.DataFrame:
    """Of one study: epochs trained in all, pruned trials included, and the best complete trial."""
    ordered = trials.sort_values("trial")
    top1 = ordered.held_out_top1_percent.where(ordered.state == "complete")
    return pd.DataFrame({"epochs": ordered.epochs.cumsum(), "best": top1.cummax().ffill()})


def draw_searches(trials: pd.DataFrame, path: Path) -> None:
    """Each study's best held-out accuracy against the epochs that it cost."""
    with drawing(path) as axes:
        for study, group in trials.groupby("study", sort=False):
            line = best_so_far(group)
            axes.step(line.epochs, line.best, where="post", label=study)
        axes.set(xlabel="epochs trained, all trials", ylabel="best held-out top-1, %")
        axes.legend()
