"""Objectives for test_study.py, in a module that worker processes can import."""

import functools
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch

from utils import cli, study

Objective = Callable[[optuna.Trial], float]
DEADLY = 2.0  # the x that kills its process


def settings(storage: str | Path, **changes: Any) -> dict[str, Any]:
    """Arguments of `study.tune` for a small study on the CPU."""
    return {
        "storage": str(storage),
        "study_name": "small",
        "trials": 4,
        "workers": 1,
        "device": torch.device("cpu"),
        "sampler": "random",
        "pruner": "none",
        "max_epochs": 3,
        "seed": 0,
        **changes,
    }


def make_quick(device: torch.device, pause_s: float = 0.02) -> Objective:
    """x itself, after a pause; x = DEADLY kills the process."""

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, DEADLY)
        if x == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(pause_s)
        return x

    return objective


def make_together(folder: Path, workers: int, device: torch.device) -> Objective:
    """As `make_quick`, but none begins before all are there: one alone would do all the work."""
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < workers:
        time.sleep(0.01)
    return make_quick(device, pause_s=0.05)


def make_slow(pause_s: float, device: torch.device) -> Objective:
    """As `make_quick`, and it does not heed SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return make_quick(device, pause_s)


def make_troubled(device: torch.device) -> Objective:
    """What happens depends on the trial's number; from 6 on all goes well."""

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        match trial.number:
            case 1:
                raise MemoryError
            case 2:
                return math.nan
            case 3:
                raise ValueError("no such thing\nat all")
            case 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        trial.report(0.1 if trial.number == 5 else 0.9, 1)
        if trial.should_prune():
            raise optuna.TrialPruned
        return x

    return objective


def make_failing(error: Exception, device: torch.device) -> Objective:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        raise error

    return objective


def fail_to_make(error: Exception, device: torch.device) -> Objective:
    raise error


def crash(device: torch.device) -> Objective:
    os._exit(3)


def make_count_threads(device: torch.device) -> Objective:
    """The number of CPU threads of this worker as the value of each trial."""
    return lambda trial: float(torch.get_num_threads())


@cli.command
def main(argv: Sequence[str] | None) -> int:
    """Tune in a process that a test can kill: `<storage> <workers> <trials> <seconds a trial>`."""
    storage, workers, trials, pause_s = argv or sys.argv[1:]
    maker = functools.partial(make_slow, float(pause_s))
    study.tune(maker, **settings(storage, workers=int(workers), trials=int(trials)))
    return 0
