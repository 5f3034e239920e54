"""Figures and derived tables of Part 2, from its studies' CSV files; `study` tells these apart."""

import json
import math
from pathlib import Path

import numpy as np
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


def write_tables(data: Path) -> None:
    """Write part2_{optimizers,costs,workers,final_summary,factorial_effects}.csv.

    Args:
        data: holds part2_trials.csv, part2_history.csv, part2_finalists.csv and part2_final.csv,
            each of one or several studies, part2_probe_trials.csv, where every number of
            `workers` ran the same trials, and part2_factorial_factors.csv and
            part2_factorial.csv, which `estimate_effects` takes.
    """
    names = ("trials", "history", "finalists", "final", "probe_trials")
    trials, history, finalists, final, probe, factors, runs = (
        pd.read_csv(data / f"part2_{name}.csv")
        for name in (*names, "factorial_factors", "factorial")
    )
    shortest = int(trials.epochs[trials.state != "fail"].min())  # before, no trial was pruned
    derived = {
        "optimizers": compare_optimizers(trials, history, shortest),
        "costs": summarize_costs(trials, finalists),
        "workers": compare_workers(probe),
        "final_summary": pd.DataFrame(tuning_report.summarize(rows_of(final))),
        "factorial_effects": estimate_effects(factors, runs),
    }
    for name, table in derived.items():
        table.to_csv(data / f"part2_{name}.csv", index=False)


def estimate_effects(factors: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """What each factor of a factorial design changes on average, in points of top-1.

    A linear model without interactions, by least squares (Box, Hunter and Hunter, "Statistics for
    Experimenters"); a design with no more runs than coefficients leaves no error to estimate.

    Args:
        factors: columns `design`, `factor`, and its two levels `from` and `to` as JSON.
        runs: columns `design`, `status`, `factors` (JSON: each factor's level), `top1_percent` and,
            of exponentially averaged weights, `averaged_top1_percent`. Failed runs do not count.

    Returns:
        The factors with the number of `trainings` and, for both accuracies, the effect of going
        from one level to the other and its standard error.

    Raises:
        ValueError: a level that is none of the two, or too few runs to tell the factors apart.
    """
    tables = []
    for design, group in factors.groupby("design", sort=False):
        done = runs[(runs.design == design) & (runs.status == "ok")]
        levels = pd.DataFrame([json.loads(text) for text in done.factors], columns=group.factor)
        low, high = (
            np.column_stack(
                [levels[row.factor] == json.loads(row[end]) for _, row in group.iterrows()]
            )
            for end in ("from", "to")
        )
        x = np.column_stack([np.ones(len(done)), high])
        if (low == high).any() or np.linalg.matrix_rank(x) < x.shape[1]:
            raise ValueError(f"{design}: unknown levels, or too few runs for {len(group)} factors")
        table, left = group.assign(trainings=len(done)), len(x) - x.shape[1]
        for name in ("top1", "averaged_top1"):
            y = done[f"{name}_percent"].to_numpy()
            effects, *_ = np.linalg.lstsq(x, y)
            variance = ((y - x @ effects) ** 2).sum() / left if left else math.nan
            errors = np.sqrt(variance * np.diag(np.linalg.inv(x.T @ x)))
            table[f"{name}_effect"] = effects[1:]
            table[f"{name}_standard_error"] = errors[1:]
        tables.append(table)
    return pd.concat(tables).round(2)


def compare_optimizers(trials: pd.DataFrame, history: pd.DataFrame, epoch: int) -> pd.DataFrame:
    """Mean held-out top-1 after an epoch that every trial reaches, by optimiser and batch size.

    Unlike the importances, which see the survivors of the pruner alone, this compares all trials.
    `complete_top1_percent_best` is the best after all epochs, of those that had them.
    """
    keys = ["study", "optimizer", "batch_size"]
    early = history[history.epoch == epoch].merge(trials[["study", "trial", *keys[1:]]])
    table = early.groupby(keys).held_out_top1_percent.agg(["count", "mean"])
    complete = trials[trials.state == "complete"].groupby(keys).held_out_top1_percent
    table = table.assign(complete=complete.size(), best=complete.max()).reset_index()
    table["complete"] = table.complete.fillna(0).astype(int)
    table.insert(3, "epoch", epoch)
    names = {"count": "trials", "mean": "top1_percent_mean", "best": "complete_top1_percent_best"}
    return table.rename(columns=names).round(2)


def span_seconds(trials: pd.DataFrame) -> float:
    """From the start of the first trial to the end of the last one."""
    begun = pd.to_datetime(trials.started)
    return float(((begun - begun.min()).dt.total_seconds() + trials.total_seconds).max())


def summarize_costs(trials: pd.DataFrame, finalists: pd.DataFrame) -> pd.DataFrame:
    """What each study took; the finalists' seconds are summed over the GPUs."""
    rows = []
    for study, group in trials.groupby("study", sort=False):
        states = group.state.value_counts()
        full = group.epochs.max() * len(group)
        row = {"study": study, "trials": len(group)}
        row |= {state: int(states.get(state, 0)) for state in ("complete", "pruned", "fail")}
        row |= {"epochs": group.epochs.sum(), "epochs_without_pruner": full}
        row |= {"epochs_saved_percent": 100 * (1 - group.epochs.sum() / full)}
        row |= {"trials_seconds": span_seconds(group)}
        row["finalists_seconds"] = finalists[finalists.study == study].train_seconds.sum()
        rows.append(row)
    return pd.DataFrame(rows).round(1)


def compare_workers(probe: pd.DataFrame) -> pd.DataFrame:
    """Speed of the same trials by several numbers of `workers`; setup is the longest one's."""
    rows = []
    for workers, group in probe.groupby("workers"):
        seconds, setup, epochs = span_seconds(group), group.setup_seconds.max(), group.epochs.sum()
        row = {"workers": workers, "trials": len(group), "epochs": epochs, "seconds": seconds}
        row |= {"setup_seconds": setup, "trials_per_minute": 60 * len(group) / seconds}
        row["epochs_per_minute_after_setup"] = 60 * epochs / (seconds - setup)
        rows.append(row)
    return pd.DataFrame(rows).round(1)


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
