"""Trainings that cost nothing, in a module that worker processes can import, and a false worker."""

import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from utils import cli, study
from utils.workers import UnavailableError

SPACE: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in "xy"}
SETTING = {"dataset": "none"}
TOTALS = {"search": 6, "finalists": 6, "final": 4}  # trials of each stage
DEFAULT = {"x": 0.25, "y": 0.5}

Answer = tuple[float, dict[str, Any], str]


class InlineWorker:
    """A worker without a process; SystemExit stands for the death of one."""

    def __init__(self) -> None:
        self.alive = True

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except SystemExit as error:
            self.alive = False
            raise UnavailableError("its process was killed") from error

    def is_alive(self) -> bool:
        return self.alive

    def stop(self) -> None:
        self.alive = False

    def __exit__(self, *error: object) -> None:
        self.stop()


def train(
    hparams: dict[str, float], seed: int, device: torch.device, pause_s: float = 0.0
) -> Answer:
    """x itself; a column says which process it was."""
    time.sleep(pause_s)
    columns = {"pid": os.getpid(), "parameters": 7, "steps": 3, "train_seconds": 1.5}
    return hparams["x"], columns, ""


def die(*_: Any) -> Answer:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0, {}, ""


def search_job(function: Callable[..., Answer], trial: optuna.Trial) -> study.Job:
    asked = {"configuration": f"trial {trial.number}", "hparams": trial.params}
    for key, value in (asked | {"seed": trial.number} | trial.user_attrs).items():
        trial.set_user_attr(key, value)
    return function, (trial.params, trial.user_attrs["seed"])


def queued_job(function: Callable[..., Answer], trial: optuna.Trial) -> study.Job | None:
    if "hparams" not in trial.user_attrs:
        return None
    return function, (trial.user_attrs["hparams"], trial.user_attrs["seed"])


def run_all(
    storage: str, function: Callable[..., Answer] = train, dead_after_s: float = 0.0
) -> dict[str, list[FrozenTrial]]:
    """Search, two finalists beside the default, and a final stage; the trials of each."""
    with (
        study.opened(storage) as opened,
        study.WorkerPool([torch.device("cpu")], ahead=True) as pool,
    ):
        studies = {name: study.open_study(opened, name, SETTING) for name in TOTALS}
        search, finalists, final = studies.values()
        begun = search.get_trials(deepcopy=False)
        search.sampler = study.make_sampler("random", 0, len(begun), dead_after_s > 0)
        search.enqueue_trial(DEFAULT, skip_if_exists=True)
        go = functools.partial(
            study.work_off, pool=pool, changed=lambda: None, dead_after_s=dead_after_s
        )
        ask = functools.partial(search_job, function)
        go(search, space=SPACE, job_of=ask, total=TOTALS["search"])
        best = [trial.params for trial in study.best_trials(search) if trial.params != DEFAULT]
        chosen = {"default": DEFAULT, "first": best[0], "second": best[1]}
        job = functools.partial(queued_job, function)
        study.queue(finalists, study.missing(finalists, chosen, range(100, 102)))
        go(finalists, space={}, job_of=job)
        chosen = {"default": DEFAULT, "best": best[0]}
        study.queue(final, study.missing(final, chosen, range(2)))
        go(final, space={}, job_of=job)
        return {name: part.get_trials() for name, part in studies.items()}


@cli.command
def main(argv: Sequence[str] | None) -> int:
    """Run all stages in a process that a test can kill: `<storage> <pause> <dead after>`."""
    storage, pause_s, dead_after_s = argv or sys.argv[1:]
    run_all(storage, functools.partial(train, pause_s=float(pause_s)), float(dead_after_s))
    return 0
