"""Tables and figures of a study and of the trainings after it.

A trial's user attributes `hparams` (the configuration as trained), `parameters` and `history`
(a dict per epoch: epoch, loss, seconds, setup_seconds) come from the objective; its value and
intermediate values are the top-1 of held-out images in percent.
"""

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from utils import results
from utils.cli import UserError, first_line
from utils.figures import drawing

Row = dict[str, Any]

TRIAL_COLUMNS = (
    *("study", "trial", "state", "reason", "retry_of", "held_out_top1_percent", "epochs"),
    *("parameters", "train_seconds", "setup_seconds", "total_seconds", "started"),
)
HISTORY_COLUMNS = (
    *("study", "trial", "state", "epoch", "held_out_top1_percent", "loss", "seconds"),
)
FINAL_COLUMNS = (
    *("study", "configuration", "seed", "epochs", "compiled", "status", "reason", "parameters"),
    *("train_images", "train_seconds", "setup_seconds", "final_loss", "num_images"),
    *("top1_percent", "top5_percent", "hparams"),
)
FINAL_HISTORY_COLUMNS = (
    *("study", "configuration", "seed", "epoch", "loss", "seconds", "setup_seconds"),
)
RESULTS = (
    *("trials.csv", "history.csv", "importances.csv", "finalists.csv", "best_params.json"),
    "environment.json",
    *("final.csv", "final_summary.csv", "final_history.csv", "final_environment.json"),
    *("best.safetensors", "best.json"),
)
IMPORTANCE_COLUMNS = ("hyperparameter", "importance", "complete_trials")
FINALIST_COLUMNS = (
    *("study", "trial", "trial_top1_percent", "epochs", "status", "reason", "parameters"),
    *("train_seconds", "held_out_top1_percent", "hparams"),
)
SUMMARY_COLUMNS = (
    *("study", "configuration", "trainings", "parameters", "epochs", "train_seconds_mean"),
    *("top1_percent_mean", "top1_percent_sd", "top1_percent_low", "top1_percent_high"),
)
SHOWN = {
    "configuration": "s",
    "trainings": "d",
    "parameters": "d",
    "epochs": "d",
    "train_seconds_mean": ".1f",
    "top1_percent_mean": ".2f",
    "top1_percent_sd": ".2f",
    "top1_percent_low": ".2f",
    "top1_percent_high": ".2f",
}
FIGURES = (
    "optimization_history.png",
    "importances.png",
    "learning_curves.png",
    "top_parameters.png",
    "final.png",
)
MIN_COMPLETE = 25  # trials; with fewer, importances are noise


# --- tables ---------------------------------------------------------------------------------------


def digest(texts: Iterable[str]) -> str:
    """A short fingerprint of texts, in their order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def delete_results(folder: Path) -> None:
    """Delete what earlier runs wrote into the folder, except the storage of their trials."""
    for name in (*RESULTS, *FIGURES):
        (folder / name).unlink(missing_ok=True)


def best_trials(study: optuna.Study, number: int) -> list[FrozenTrial]:
    """The complete trials with the highest values, each configuration once."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ranked = sorted(complete, key=lambda trial: trial.value or 0.0, reverse=True)
    found: list[FrozenTrial] = []
    for trial in ranked:
        if trial.user_attrs["hparams"] not in [other.user_attrs["hparams"] for other in found]:
            found.append(trial)
    return found[:number]


def trial_row(study_name: str, trial: FrozenTrial, names: Sequence[str]) -> Row:
    attributes = trial.user_attrs
    hparams = attributes.get("hparams", trial.params)
    last = (attributes.get("history") or [{}])[-1]
    duration = trial.duration
    return {
        "study": study_name,
        "trial": trial.number,
        "state": trial.state.name.lower(),
        "reason": attributes.get("reason", attributes.get("interrupted")),
        "retry_of": attributes.get("retry_of"),
        "held_out_top1_percent": trial.value,
        "epochs": len(attributes.get("history", ())),
        "parameters": attributes.get("parameters"),
        "train_seconds": _rounded(last.get("seconds")),
        "setup_seconds": _rounded(last.get("setup_seconds")),
        "total_seconds": None if duration is None else _rounded(duration.total_seconds()),
        "started": trial.datetime_start and trial.datetime_start.isoformat(timespec="seconds"),
        **{name: hparams.get(name) for name in names},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def history_rows(study_name: str, trial: FrozenTrial) -> list[Row]:
    losses = {epoch["epoch"]: epoch for epoch in trial.user_attrs.get("history", ())}
    return [
        {
            "study": study_name,
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "epoch": epoch,
            "held_out_top1_percent": round(value, 3),
            "loss": losses.get(epoch, {}).get("loss"),
            "seconds": _rounded(losses.get(epoch, {}).get("seconds")),
        }
        for epoch, value in sorted(trial.intermediate_values.items())
    ]


def importance_rows(study: optuna.Study) -> list[Row]:
    """Importances by PED-ANOVA (Watanabe et al. 2023); none with too few complete trials.

    They tell which hyperparameters set the best tenth of the complete trials apart from the rest,
    not what happens when one is changed alone.
    """
    complete = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    if complete < MIN_COMPLETE:
        return []
    importances = optuna.importance.get_param_importances(study)
    return [
        {"hyperparameter": name, "importance": round(value, 4), "complete_trials": complete}
        for name, value in importances.items()
    ]


def write_study(study: optuna.Study, names: Sequence[str], folder: Path) -> None:
    """Write the tables, the figures and the best configuration of a study into the folder.

    `names` are the hyperparameters, a column each. If trials were trained again at full length,
    finalists.csv, the best of those stays the best configuration.
    """
    trials = [t for t in study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]
    rows = [trial_row(study.study_name, trial, names) for trial in trials]
    history = [row for trial in trials for row in history_rows(study.study_name, trial)]
    results.write_csv(folder / "trials.csv", rows, (*TRIAL_COLUMNS, *names))
    results.write_csv(folder / "history.csv", history, HISTORY_COLUMNS)
    if not (folder / "finalists.csv").exists():
        write_best_trial(study, folder)
    importances = importance_rows(study)
    results.write_csv(folder / "importances.csv", importances, IMPORTANCE_COLUMNS)
    draw_study(rows, history, importances, folder)


def write_best_trial(study: optuna.Study, folder: Path) -> None:
    """Write best_params.json of the best trial, if one is complete."""
    for best in best_trials(study, 1):
        epochs = len(best.user_attrs.get("history", ()))
        write_best(study, best, best.value or 0.0, epochs, folder)


def write_best(
    study: optuna.Study, best: FrozenTrial, top1_percent: float, epochs: int, folder: Path
) -> None:
    """Write best_params.json: the configuration, and its held-out top-1 after so many epochs."""
    setting = study.user_attrs.get("setting", {})
    content = {
        "study": study.study_name,
        "dataset": setting.get("dataset"),
        "classes": setting.get("classes"),
        "trial": best.number,
        "epochs": epochs,
        "held_out_top1_percent": top1_percent,
        "hparams": best.user_attrs["hparams"],
    }
    results.write_json(folder / "best_params.json", content)


def write_finalists(
    rows: Sequence[Row], trials: Sequence[FrozenTrial], study: optuna.Study, folder: Path
) -> None:
    """Write finalists.csv, a row for each of the trials, and the best of them as the best."""
    results.write_csv(folder / "finalists.csv", rows, FINALIST_COLUMNS)
    done = [pair for pair in zip(rows, trials, strict=True) if pair[0]["status"] == "ok"]
    if done:
        row, best = max(done, key=lambda pair: pair[0]["held_out_top1_percent"])
        write_best(study, best, row["held_out_top1_percent"], row["epochs"], folder)


def read_best(
    path: Path, dataset: str, classes: str, example: Any, searched: Iterable[str]
) -> dict[str, Any]:
    """The best configuration of a study, from best_params.json.

    Args:
        dataset, classes: what it must have been found on, the classes as a `digest`.
        example: a dataclass instance with the same fields, whose values stand for missing ones.
        searched: the fields that must not be missing.

    Raises:
        UserError: missing or damaged file, or another data set.
    """
    try:
        content = json.loads(path.read_text())
        hparams, found = content["hparams"], content["dataset"]
        known = asdict(example)
        missing = set(searched) - set(hparams)
        if missing or any(type(value) is not type(known[key]) for key, value in hparams.items()):
            raise ValueError("not the hyperparameters of this version")
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): run --stage tune first, or leave "
            "tuned out of --configurations"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): run --stage tune") from error
    if found != dataset:
        raise UserError(f"{path} was found on {found}: run --stage tune on {dataset} first")
    if content.get("classes") not in (None, classes):  # files of an older version lack them
        raise UserError(f"{path} was found on other classes: run --stage tune on these first")
    return known | hparams


def write_final(rows: Sequence[Row], history: Sequence[Row], folder: Path) -> None:
    """Write final.csv, its summary and history, and the figure of the test accuracies."""
    results.write_csv(folder / "final.csv", rows, FINAL_COLUMNS)
    results.write_csv(folder / "final_summary.csv", summarize(rows), SUMMARY_COLUMNS)
    results.write_csv(folder / "final_history.csv", history, FINAL_HISTORY_COLUMNS)
    if done := [row for row in rows if row["status"] == "ok"]:
        draw_final(done, folder)


def summarize(rows: Iterable[Row]) -> list[Row]:
    """One row per study and configuration: mean, deviation and 95 % t-interval of its top-1.

    The interval speaks of other seeds, not of other test images; it wants three seeds or more.
    """
    from scipy import stats

    summary = []
    done = [row for row in rows if row["status"] == "ok"]
    keys = ["study", "configuration"]
    for (study, name), group in pd.DataFrame(done).groupby(keys, sort=False) if done else ():
        top1 = group["top1_percent"].tolist()
        mean, n = statistics.fmean(top1), len(top1)
        sd = statistics.stdev(top1) if n > 1 else None
        half = float(stats.t.ppf(0.975, n - 1)) * sd / n**0.5 if sd is not None and n > 2 else None
        summary.append(
            {
                "study": study,
                "configuration": name,
                "trainings": n,
                "parameters": int(group["parameters"].iloc[0]),
                "epochs": int(group["epochs"].iloc[0]),
                "train_seconds_mean": statistics.fmean(group["train_seconds"]),
                "top1_percent_mean": mean,
                "top1_percent_sd": sd,
                "top1_percent_low": None if half is None else mean - half,
                "top1_percent_high": None if half is None else mean + half,
            }
        )
    return summary


# --- figures --------------------------------------------------------------------------------------

COLOURS = {"complete": "tab:blue", "pruned": "tab:orange"}


def draw_study(
    trials: Sequence[Row], history: Sequence[Row], importances: Sequence[Row], folder: Path
) -> None:
    """Draw the first four FIGURES, as far as there are trials to draw."""
    complete = [row for row in trials if row["state"] == "complete"]
    if not complete:
        return
    draw_optimization_history(trials, folder / "optimization_history.png")
    draw_learning_curves(history, folder / "learning_curves.png")
    if importances:
        draw_importances(importances, folder / "importances.png")
        top = [row["hyperparameter"] for row in importances[:3]]
        draw_parameters(complete, top, folder / "top_parameters.png")


def draw_optimization_history(trials: Sequence[Row], path: Path) -> None:
    """Every trial's last value, and the best complete one so far."""
    with drawing(path) as axes:
        for state, colour in COLOURS.items():
            chosen = [r for r in trials if r["state"] == state and r["held_out_top1_percent"]]
            x, y = [r["trial"] for r in chosen], [r["held_out_top1_percent"] for r in chosen]
            axes.scatter(x, y, color=colour, s=14, label=state)
        complete = [r for r in trials if r["state"] == "complete"]
        best = pd.Series([r["held_out_top1_percent"] for r in complete]).cummax()
        axes.step([r["trial"] for r in complete], best, where="post", color="black", label="best")
        axes.set(xlabel="trial", ylabel="held-out top-1, %")
        axes.legend()


def draw_learning_curves(history: Sequence[Row], path: Path) -> None:
    """Held-out accuracy by epoch; trials that were pruned end early."""
    with drawing(path) as axes:
        for _, curve in pd.DataFrame(history).groupby("trial"):
            colour = COLOURS.get(curve["state"].iloc[0], "grey")
            axes.plot(
                curve["epoch"], curve["held_out_top1_percent"], color=colour, alpha=0.5, lw=0.9
            )
        for state in ("complete", "pruned"):
            axes.plot([], [], color=COLOURS[state], label=state)
        axes.set(xlabel="epoch", ylabel="held-out top-1, %")
        axes.legend()


def draw_importances(importances: Sequence[Row], path: Path) -> None:
    """Importance of each hyperparameter, the largest on top."""
    with drawing(path) as axes:
        shown = list(reversed(importances))
        axes.barh([r["hyperparameter"] for r in shown], [r["importance"] for r in shown])
        axes.set(xlabel=f"importance over {shown[0]['complete_trials']} complete trials")


def draw_parameters(complete: Sequence[Row], names: Sequence[str], path: Path) -> None:
    """Value against each of the named hyperparameters."""
    with drawing(path, columns=len(names)) as panels:
        for axes, name in zip([panels] if len(names) == 1 else panels, names, strict=True):
            x = [row[name] for row in complete]
            axes.scatter(x, [row["held_out_top1_percent"] for row in complete], s=14)
            if all(isinstance(value, float) and value > 0 for value in x) and max(x) > 10 * min(x):
                axes.set_xscale("log")
            axes.set(xlabel=name)
        axes = panels if len(names) == 1 else panels[0]
        axes.set(ylabel="held-out top-1, %")


def draw_final(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Every final training's test accuracy, with each configuration's mean and 95 % interval."""
    with drawing(folder / "final.png") as axes:
        for position, summary in enumerate(summarize([dict(row) for row in rows])):
            name = summary["configuration"]
            top1 = [row["top1_percent"] for row in rows if row["configuration"] == name]
            axes.scatter([position] * len(top1), top1, s=14, color="tab:blue")
            if summary["top1_percent_low"] is not None:
                half = summary["top1_percent_high"] - summary["top1_percent_mean"]
                axes.errorbar(
                    position + 0.1, summary["top1_percent_mean"], half, fmt="_", color="black"
                )
        names = list(dict.fromkeys(row["configuration"] for row in rows))
        axes.set_xticks(range(len(names)), names)
        axes.set(ylabel="test top-1, %", xlim=(-0.5, len(names) - 0.5))
