"""Figures of Part 2, from the CSV files of its studies; `study` tells these apart."""

from pathlib import Path

import pandas as pd

from utils import tuning_report
from utils.figures import drawing

MAIN_STUDY = "smallcnn"


def draw_part2(data: Path, folder: Path) -> list[Path]:
    """The main study's own figures, every final training, and one search against another.

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
    names = (*tuning_report.FIGURES, "searches.png")
    return [folder / name for name in names if (folder / name).exists()]


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
