"""Optuna studies whose trials are trained in worker processes, and which survive any kill.

One process asks Optuna for trials, lets a worker on each device train them and tells how it went;
workers know nothing of Optuna. A journal belongs to one command at a time, so that whatever is
RUNNING in it when a command begins was lost with an earlier one, and is queued again.

User attributes of a trial: what it trains (`configuration`, `hparams`, `seed`), how that went
(`status`, `reason`, `columns`), and `tries` and `retry_of` if it was queued again.
"""

import contextlib
import copy
import functools
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import optuna
import pandas as pd
import torch
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from scipy import stats
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError
from tqdm import tqdm

from utils import results
from utils.cli import UserError, check_interrupt, first_line, hold
from utils.workers import Outcome, Worker, attempt

Row = dict[str, Any]

SAMPLERS: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
    "gp": optuna.samplers.GPSampler,
    "tpe": optuna.samplers.TPESampler,
    "random": optuna.samplers.RandomSampler,
}
TRIES = 3  # of a training whose process dies or whose seconds are off
HOPELESS = 5  # stop when so many trainings have failed and none has succeeded
MIN_COMPLETE = 25  # trials; with fewer, importances are noise
DATABASE_ERRORS = (SQLAlchemyError, StorageInternalError)

# --- storages -------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(text: str) -> Iterator[BaseStorage]:
    """The journal file or, for a URL, the database, which several machines may share.

    Raises:
        UserError: it cannot be used, in one line without a password; or the journal is in use.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with contextlib.ExitStack() as stack:
        with _in_one_line(text, (Exception,)):  # drivers and damaged journals raise many kinds
            if is_shared(text):
                storage: BaseStorage = _open_database(text)
            else:
                Path(text).parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(hold(Path(text), "name another --storage"))
                _drop_torn_line(Path(text))
                # Optuna's own lock files outlive a kill, and the command holds the journal anyway.
                lock: Any = threading.RLock()
                storage = JournalStorage(JournalFileBackend(text, lock_obj=lock))
        with _in_one_line(text, DATABASE_ERRORS):
            yield storage


def _open_database(url: str) -> RDBStorage:
    """The tables that another machine makes at the same moment are there at the second attempt."""
    connect = functools.partial(RDBStorage, url, engine_kwargs={"pool_pre_ping": True})
    try:
        return connect()
    except (IntegrityError, ProgrammingError):
        time.sleep(2)
        return connect()


def is_shared(storage: str) -> bool:
    return "://" in storage


@contextlib.contextmanager
def _in_one_line(storage: str, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        cause: Any = error.__cause__ or error
        text = first_line(getattr(cause, "orig", None) or cause)  # the driver's own words
        message = f"--storage {storage} cannot be used: {text}"
        raise UserError(results.hide_passwords(message)) from error


def _drop_torn_line(path: Path) -> None:
    """Cut off half a record, which a kill can leave: the next would make the journal unreadable.

    Raises:
        ValueError: it is no journal, or its last line is damaged, which Optuna notices too late.
    """
    content, start = path.read_bytes(), b'{"op_code":'
    if content[: len(start)] != start[: len(content)]:
        raise ValueError("it is not a journal of Optuna's")
    whole = content[: content.rfind(b"\n") + 1]
    if whole:
        json.loads(whole.splitlines()[-1])
    if len(whole) < len(content):
        os.truncate(path, len(whole))


def open_study(storage: BaseStorage, name: str, setting: Row) -> optuna.Study:
    """Open or create a study that maximises; UserError if it was made with another setting.

    `setting` is what all its trials must share, in JSON's types.
    """
    study = optuna.create_study(
        storage=storage, study_name=name, direction="maximize", load_if_exists=True
    )
    if not study.get_trials(deepcopy=False):
        study.set_user_attr("setting", setting)
    known = study.user_attrs.get("setting", {})
    for key, value in setting.items():
        if known.get(key) != value:
            raise UserError(
                f"study {name!r} was made with {key} {known.get(key)}, now it is {value}: go back "
                "to that, or take another --study-name"
            )
    return study


def make_sampler(name: str, seed: int, begun: int, shared: bool) -> optuna.samplers.BaseSampler:
    """A sampler that repeats no point of the `begun` trials that a study has.

    Nor of another machine that begins at the same moment, if the storage is shared.
    """
    numbers = (seed, begun, uuid.getnode() if shared else 0)
    return SAMPLERS[name](seed=int(np.random.SeedSequence(numbers).generate_state(1)[0]))


# --- trials ---------------------------------------------------------------------------------------


def in_state(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=states)


def unfinished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that wait or run, here or on another machine."""
    return in_state(study, TrialState.WAITING, TrialState.RUNNING)


def trainings(study: optuna.Study) -> list[FrozenTrial]:
    """The trials less those that another machine queued, too, as both ended a stage at once."""
    first: dict[str, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        keys = ("hparams", "seed", "retry_of", "tries")
        asked = [trial.user_attrs.get(key) for key in keys]
        first.setdefault(json.dumps(asked if asked[0] else trial.number, sort_keys=True), trial)
    return list(first.values())


def is_twin(study: optuna.Study, number: int) -> bool:
    """Whether an earlier trial is the same training: see `trainings`."""
    return all(trial.number != number for trial in trainings(study))


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trainings that are complete, or have failed, and were not queued again."""
    trials = trainings(study)
    retried = {trial.user_attrs.get("retry_of") for trial in trials}
    return [
        trial
        for trial in trials
        # Without hyperparameters it was asked for and had nothing to do.
        if trial.state.is_finished() and "hparams" in trial.user_attrs
        if trial.number not in retried
    ]


def left(study: optuna.Study, total: int | None) -> int:
    """How many trials are still to begin: of `total`, or of those that are queued if None."""
    if total is None:
        return len(in_state(study, TrialState.WAITING))
    return total - len(finished(study)) - len(in_state(study, TrialState.RUNNING))


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The complete trials, the highest value first."""
    complete = in_state(study, TrialState.COMPLETE)
    return sorted(complete, key=lambda trial: trial.value or 0.0, reverse=True)


def missing(
    study: optuna.Study,
    configurations: Mapping[str, Row],
    seeds: Iterable[int],
    lost: Collection[tuple[str, int]] = (),
) -> list[Row]:
    """User attributes of the trainings that are to be queued.

    Those of each configuration with each seed that are not there yet, or have failed in the end, or
    are complete but `lost` (pairs of configuration and seed). The seeds outside: an interrupted
    comparison is still a fair one.
    """
    trials = trainings(study)
    found = []
    for seed in seeds:
        for name, hparams in configurations.items():
            asked: Row = {"configuration": name, "hparams": hparams, "seed": seed}
            what = {"hparams": hparams, "seed": seed}  # whatever it was called
            begun = [trial for trial in trials if what.items() <= trial.user_attrs.items()]
            state = begun[-1].state if begun else None  # of the last: retries come later
            if not begun:
                found.append(asked)
            elif state == TrialState.FAIL or (
                state == TrialState.COMPLETE and (name, seed) in lost
            ):
                found.append(asked | {"retry_of": begun[-1].number})
    return found


def queue(study: optuna.Study, asked: Iterable[Row]) -> None:
    """Queue trainings, as by `missing`."""
    for user_attrs in asked:
        study.enqueue_trial({}, user_attrs)


def try_again(study: optuna.Study, number: int, counted: bool = True) -> None:
    """Fail a running trial and queue what it was to do, unless it has had its TRIES."""
    trials = study.get_trials(deepcopy=False)
    trial = trials[number]
    if trial.state.is_finished():  # a Ctrl-C came just after its end
        return
    tries = trial.user_attrs.get("tries", 1) + counted
    queued = any(other.user_attrs.get("retry_of") == number for other in trials)
    # Before it fails: a kill in between must not lose it.
    if tries <= TRIES and not queued and not is_twin(study, number):
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        asked = ("configuration", "hparams", "seed")
        kept = {key: value for key, value in trial.user_attrs.items() if key in asked}
        study.enqueue_trial(params, {**kept, "retry_of": number, "tries": tries})
    study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def recover(
    study: optuna.Study, ours: Collection[int], seen: dict[int, float], dead_after_s: float
) -> bool:
    """Queue again what dead processes left RUNNING; whether others may still be at work.

    Args:
        ours: numbers of the trials that this process runs.
        seen: when each of the others was first seen, by our own clock, as machines disagree.
        dead_after_s: how long ago that must be.
    """
    others = [trial for trial in in_state(study, TrialState.RUNNING) if trial.number not in ours]
    now = time.monotonic()
    dead = [t for t in others if now - seen.setdefault(t.number, now) >= dead_after_s]
    for trial in dead:
        tqdm.write(f"{study.study_name}, trial {trial.number}: its process is gone")
        try_again(study, trial.number)
    return len(dead) < len(others)


# --- ask and tell ---------------------------------------------------------------------------------

# A worker's function and its arguments before the device. It returns the trial's value, columns of
# its row, and why it should be tried again, or nothing.
Job = tuple[Callable[..., tuple[float, Row, str]], Sequence[Any]]
Answer = Future[tuple[Outcome, bool]]


class WorkerPool:
    """A worker on each device, and a thread each to wait for it; a context manager."""

    def __init__(self, devices: Sequence[torch.device], ahead: bool) -> None:
        """`ahead`: keep a job ready for each device, as it may take seconds to ask for one."""
        self.capacity = len(devices) * (2 if ahead else 1)
        self._threads = ThreadPoolExecutor(len(devices))
        self._workers = {device: Worker() for device in devices}
        self._idle: SimpleQueue[tuple[torch.device, Worker] | None] = SimpleQueue()
        for pair in self._workers.items():
            self._idle.put(pair)

    def submit(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Answer:
        """Call `function(*arguments, device)` in the next idle worker: see `_run`."""
        return self._threads.submit(self._run, function, arguments)

    def _run(self, function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Outcome, bool]:
        """The outcome, and whether the worker died of it."""
        while (pair := self._idle.get()) and not pair[1].is_alive():
            pass  # the main thread has replaced it, or will
        if pair is None:
            raise KeyboardInterrupt
        device, worker = pair
        outcome = attempt(worker.run, function, *arguments, device)
        died = not outcome.ok and not worker.is_alive()
        if outcome.ok:
            self._idle.put(pair)
        else:  # its GPU's context may be broken, or its memory full
            worker.stop()
        return outcome, died

    def replace_dead(self) -> None:
        """Start a worker where there is none any more; from the main thread."""
        for device, worker in self._workers.items():
            if not worker.is_alive():
                self._workers[device] = Worker()
                self._idle.put((device, self._workers[device]))

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers.values():
            worker.__exit__(kind)
            self._idle.put(None)
        self._threads.shutdown()


def work_off(
    study: optuna.Study,
    pool: WorkerPool,
    space: Mapping[str, BaseDistribution],
    job_of: Callable[[optuna.Trial], Job | None],
    changed: Callable[[], Any],
    total: int | None = None,
    dead_after_s: float = 0.0,
) -> None:
    """Train until `total` trials are finished, or the queue is empty if None.

    A trial whose worker dies, or whose training objects to itself, is queued again; so is what runs
    at a Ctrl-C, which does not count as a try.

    Args:
        space: of the sampler; empty for a queue.
        job_of: what a trial is to do; None if nothing, as another machine emptied the queue.
        changed: called after every trial.
        dead_after_s: so long, trials that others run are waited for: see `recover`.

    Raises:
        UserError: a worker's, or none of the first trainings succeeded.
    """
    running: dict[Answer, optuna.Trial] = {}
    seen: dict[int, float] = {}
    in_all = total or len(finished(study)) + left(study, total)
    with tqdm(total=in_all, unit="training", smoothing=0, disable=None) as bar:
        try:
            while True:
                ours = [trial.number for trial in running.values()]
                others = recover(study, ours, seen, dead_after_s)
                pool.replace_dead()
                while len(running) < pool.capacity and left(study, total) > 0:
                    trial = study.ask(dict(space))
                    if (job := job_of(trial)) and not is_twin(study, trial.number):
                        running[pool.submit(*job)] = trial
                    else:
                        study.tell(trial, state=TrialState.FAIL)
                _show(bar, study)
                if not running and not others:
                    return
                for answer in _wait(running):
                    _tell(study, running[answer], *answer.result())
                    del running[answer]
                    changed()
        except BaseException:
            # Where nobody else is at work, also one that was just being asked for.
            lost = running.values() if dead_after_s else in_state(study, TrialState.RUNNING)
            for number in [trial.number for trial in lost]:
                try_again(study, number, counted=False)
            raise


def _wait(running: Collection[Answer]) -> set[Answer]:
    """What has ended within a second."""
    if not running:  # others are at work
        time.sleep(1)
    done, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
    check_interrupt()
    return done


def _tell(study: optuna.Study, trial: optuna.Trial, outcome: Outcome, died: bool) -> None:
    """Record how a training went, or queue it again."""
    value, columns, objection = outcome.value if outcome.ok else (None, {}, "")
    status, reason = ("failed", objection) if objection else (outcome.status, outcome.reason)
    if reason:
        tqdm.write(f"{study.study_name}, trial {trial.number}: {status}: {reason}")
    with contextlib.suppress(UpdateFinishedTrialError):  # another machine took us for dead
        for key, attr in {"status": status, "reason": reason, "columns": columns}.items():
            trial.set_user_attr(key, attr)
    if died or objection:
        try_again(study, trial.number)
    else:
        state = TrialState.COMPLETE if outcome.ok else TrialState.FAIL
        study.tell(trial, value, state, skip_if_finished=True)
    done = finished(study)
    if len(done) >= HOPELESS and all(other.state == TrialState.FAIL for other in done):
        raise UserError(f"none of the first {len(done)} trainings succeeded; the last: {reason}")


def _show(bar: tqdm, study: optuna.Study) -> None:
    bar.n = len(finished(study))
    if best := best_trials(study):
        bar.set_postfix_str(f"best {best[0].value:.2f}", refresh=False)
    bar.refresh()


# --- tables ---------------------------------------------------------------------------------------


def rows_of(study: optuna.Study, value_column: str) -> list[Row]:
    """A row for every training that has ended: what it was, how it went, its value and `columns`.

    A trial that was queued again has the status `retried`; its successor's `retry_of` names it.
    """
    last = {trial.number for trial in finished(study)}
    rows = []
    for trial in trainings(study):
        about: Row = {"status": "failed", "reason": "its process was stopped or killed"}
        about |= trial.user_attrs
        if trial.state.is_finished() and "hparams" in about:
            rows.append(
                {
                    "study": study.study_name,
                    "trial": trial.number,
                    **{key: about.get(key) for key in ("configuration", "seed", "retry_of")},
                    "status": about["status"] if trial.number in last else "retried",
                    "reason": about["reason"],
                    value_column: trial.value,
                    "started": f"{trial.datetime_start:%Y-%m-%dT%H:%M:%S}",
                    "hparams": json.dumps(about["hparams"]),
                    **about.get("columns", {}),
                }
            )
    return rows


def importance_rows(study: optuna.Study) -> list[Row]:
    """Importances by PED-ANOVA (Watanabe et al. 2023); none with too few complete trials.

    Of what was trained, which may not be what the sampler asked for. They tell which
    hyperparameters set the best tenth of the complete trials apart from the rest, not what happens
    when one is changed alone.
    """
    complete = in_state(study, TrialState.COMPLETE)
    if len(complete) < MIN_COMPLETE:
        return []
    trained = optuna.create_study(direction="maximize")
    for trial in complete:
        trial = copy.copy(trial)
        trial.params = {name: trial.user_attrs["hparams"][name] for name in trial.params}
        trained.add_trial(trial)
    importances = optuna.importance.get_param_importances(trained)
    return [
        {"hyperparameter": name, "importance": round(value, 4), "complete_trials": len(complete)}
        for name, value in importances.items()
    ]


def summarize(rows: Iterable[Row], value_column: str, **about: Any) -> list[Row]:
    """A row for each configuration: the mean over its seeds and the difference from the default.

    From three seeds on with 95 % intervals, Student's of a mean and Welch's of a difference. They
    speak of other seeds, not of other images.
    """
    done = pd.DataFrame([row for row in rows if row["status"] == "ok"])
    groups = dict(iter(done.groupby("configuration", sort=False))) if len(done) else {}
    summary: list[Row] = []
    for name, group in groups.items():
        values, n = group[value_column].to_numpy(dtype=float), len(group)
        mean = values.mean()
        row: Row = about | {
            "configuration": name,
            "trainings": n,
            "parameters": int(group.parameters.iloc[0]),
            "steps_mean": group.steps.mean(),
            "train_seconds_mean": group.train_seconds.mean(),
            "top1_percent_mean": mean,
        }
        if n > 1:
            row["top1_percent_sd"] = values.std(ddof=1)
        if n > 2:
            half = stats.t.ppf(0.975, n - 1) * stats.sem(values)
            row |= {"top1_percent_low": mean - half, "top1_percent_high": mean + half}
        if name != "default" and "default" in groups:
            default = groups["default"][value_column].to_numpy(dtype=float)
            row["difference_points"] = mean - default.mean()
            if min(n, len(default)) > 2:
                welch = stats.ttest_ind(values, default, equal_var=False).confidence_interval()
                row |= {"difference_low_points": welch.low, "difference_high_points": welch.high}
        summary.append(row)
    return summary
