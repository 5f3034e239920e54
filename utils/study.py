"""Worker processes and crash-safe bookkeeping of an Optuna study, whatever it tunes.

The storage is the only truth. The parent alone hands out trials, one at a time over each worker's
own pipe, and creates each in the storage under the name of its worker: so it knows whose trial a
dead worker leaves and queues its parameters again, as the next run does for a dead parent. No lock
or queue is shared that a killed process could hold for ever; workers end when their parent does.

User attributes of a trial: `worker` (its host, process and parent), `default`, `reason` (a failure
of its own, which counts as finished), `interrupted` (one that does not), `retry_of`, `kills`.
"""

import contextlib
import faulthandler
import functools
import gc
import math
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import optuna
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from utils.cli import UserError, check_name, first_line
from utils.study_storage import DATABASE_ERRORS, create_study, load_study, mendable, redacted

Objective = Callable[[optuna.Trial], float]
ObjectiveMaker = Callable[[torch.device], Objective]

SAMPLERS = ("tpe", "random")
PRUNERS = ("hyperband", "asha", "median", "none")
KILLS = 2  # parameters that have taken their process down so often are not tried again
HOPELESS = 5  # stop when so many trials have failed and none has succeeded
GRACE_S = 3  # from SIGTERM to SIGKILL


def tune(
    make_objective: ObjectiveMaker,
    *,
    storage: str,
    study_name: str,
    trials: int,
    workers: int,
    device: torch.device,
    sampler: str,
    pruner: str,
    max_epochs: int,
    seed: int,
    timeout: float | None = None,
    default_params: dict[str, Any] | None = None,
    setting: dict[str, Any] | None = None,
    fresh: bool = False,
    on_open: Callable[[optuna.Study], None] | None = None,
) -> optuna.Study:
    """Maximise an objective in worker processes until the study has `trials` finished trials.

    Finished are complete, pruned and failed trials; those whose process was killed or stopped are
    queued again and do not count. Several machines at work on one study may overshoot by a trial
    each. Call it from the main thread: SIGINT and SIGTERM let a record be written, end the workers
    within seconds and leave nothing running.

    Args:
        make_objective: called once in each worker with its device; it must pickle.
        storage: see `study_storage.open_storage`.
        trials: total over all workers and all earlier runs.
        device: of type cuda: worker i takes GPU i modulo their number; cpu: they share the threads.
        max_epochs: reports of a trial that runs to its end, in steps 1, 2, …
        timeout: seconds after which no trial is started; the running ones are finished.
        on_open: called with the study when it has been opened and may be continued.
        default_params: trial 0 of a new study.
        setting: what all trials must share, in JSON's types; kept in the study's user attributes.
        fresh: delete the study of this name first.

    Raises:
        UserError: the storage, another direction or setting, a UserError of `make_objective` or
            in the default trial, or none of the first trials succeeded.
        RuntimeError: `make_objective` failed, or the default trial did for another reason than
            memory or a value that is not finite, or workers keep dying.
        KeyboardInterrupt: SIGINT or SIGTERM.
    """
    deadline = time.monotonic() + (math.inf if timeout is None else timeout)
    check_name(sampler, SAMPLERS, "sampler")
    built_pruner = make_pruner(pruner, max_epochs)
    with mendable(storage, *DATABASE_ERRORS), _signals_noted() as signals:
        study = create_study(storage, study_name, fresh)
        _check_setting(study, setting or {})
        if on_open is not None:
            on_open(study)
        _recover(study)
        if default_params and not study.get_trials(deepcopy=False):
            study.enqueue_trial(default_params, user_attrs={"default": True})
        workers = min(workers, trials_left(study, trials))
        work = functools.partial(
            _work,
            make_objective,
            functools.partial(_claim_device, device, workers),
            functools.partial(load_study, storage, study_name),
            functools.partial(make_sampler, sampler, seed),
            built_pruner,
        )
        crew: list[_Worker] = []
        try:
            crew.extend(_start(work, index) for index in range(workers))
            _lead(crew, work, study, trials, deadline, signals)
        finally:
            _stop(crew)
            for trial in filter(_is_ours, _running(study)):
                _give_up(study, trial, "the study was stopped", killed=False)
        _note_others(study, storage)
        if signals:
            raise KeyboardInterrupt
    return study


def make_sampler(name: str, seed: int, number: int) -> optuna.samplers.BaseSampler:
    """A sampler for one trial: TPE as Optuna sets it up, or random search.

    It keeps nothing but its random state between trials, so each trial can have its own: no worker
    and no later run repeats another's points. Seed and number are mixed, not added: study 1 is not
    to be study 0 moved by one trial.
    """
    mixed = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    if name == "random":
        return optuna.samplers.RandomSampler(mixed)
    return optuna.samplers.TPESampler(seed=mixed)


def make_pruner(name: str, max_epochs: int) -> optuna.pruners.BasePruner:
    """The pruner of this name for trials that report in steps 1 to `max_epochs`.

    Halving decides after about 1/5 and 3/5 of the epochs: under a one-cycle schedule it is blind
    before. Where its rungs divide, it also does after the last: an objective should not ask there.
    """
    check_name(name, PRUNERS, "pruner")
    # Rounded, so that 9 times the first rung is never reached: hyperband then has 2 brackets at
    # most, and each wants some 10 trials before it is any use.
    first_rung = max(1, round(max_epochs / 5))
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(first_rung, max_epochs, reduction_factor=3)
    if name == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(first_rung, reduction_factor=3)
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=8, n_warmup_steps=max_epochs // 4)
    return optuna.pruners.NopPruner()


def is_finished(trial: FrozenTrial) -> bool:
    """Whether a trial counts: complete, pruned, or failed for a reason of its own."""
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (
        trial.state == TrialState.FAIL and "reason" in trial.user_attrs
    )


# Bookkeeping


def _check_setting(study: optuna.Study, setting: dict[str, Any]) -> None:
    """Note the setting of a new study; refuse to continue one that was made with another."""
    if not study.get_trials(deepcopy=False):
        study.set_user_attr("setting", setting)
    for key, value in study.user_attrs.get("setting", {}).items():
        if setting.get(key) != value:
            raise UserError(
                f"study {study.study_name!r} was made with {key} {value}, now it is "
                f"{setting.get(key)}: go back to that, or use another --study-name or --fresh"
            )


def _recover(study: optuna.Study) -> None:
    """Queue again what earlier runs on this machine left running when they were killed."""
    for trial in _running(study):
        worker = trial.user_attrs.get("worker", {})
        if worker.get("host") != socket.gethostname() or _lives(worker["parent"]):
            continue
        patience = time.monotonic() + 10  # an orphan ends itself; freeing a GPU takes a while
        while _lives(worker["process"]) and time.monotonic() < patience:
            time.sleep(0.1)
        if not _lives(worker["process"]):
            print(f"trial {trial.number} was left running by a process that is gone")
            _give_up(study, trial, "its process is gone", killed=True)


def trials_left(study: optuna.Study, total: int) -> int:
    """How many trials may still be handed out. Those that run, here or elsewhere, have theirs."""
    trials = study.get_trials(deepcopy=False)
    return total - sum(is_finished(t) or t.state == TrialState.RUNNING for t in trials)


def _running(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def _take_trial(study: optuna.Study, pid: int | None) -> int:
    """Number of a queued or else a new trial, running in the name of the worker `pid`."""
    storage, us = study._storage, _identity(os.getpid())
    worker = {"host": socket.gethostname(), "process": _identity(pid), "parent": us}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        with contextlib.suppress(UpdateFinishedTrialError):  # another machine was quicker
            # Named first: killed between the two, we leave no running trial without an owner.
            storage.set_trial_user_attr(trial._trial_id, "worker", worker)
            if storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                return trial.number
    named = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={"worker": worker})
    return storage.get_trial_number_from_id(storage.create_new_trial(study._study_id, named))


def _give_up(study: optuna.Study, trial: FrozenTrial, cause: str, killed: bool) -> None:
    """Fail a running trial whose process is gone and, before `KILLS`, queue its parameters."""
    kills = trial.user_attrs.get("kills", 0) + killed
    key, text = ("interrupted", cause) if kills < KILLS else ("reason", f"{cause}, {kills} times")
    others = study.get_trials(deepcopy=False)
    queued = any(other.user_attrs.get("retry_of") == trial.number for other in others)
    if kills < KILLS and not queued:  # before it fails: a crash must not lose the parameters
        # A queued trial that died early has not yet taken up all that was asked of it.
        params = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        kept = {"default": True} if "default" in trial.user_attrs else {}
        study.enqueue_trial(params, {**kept, "retry_of": trial.number, "kills": kills})
    with contextlib.suppress(UpdateFinishedTrialError):  # so has another run that recovers
        study._storage.set_trial_user_attr(trial._trial_id, key, text)
        study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def _identity(pid: int | None) -> list[int | None]:
    """A process and its start in clock ticks after boot; None if it does not run."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] not in "ZX":  # ended, but its parent has not asked for its exit code
            return [pid, int(fields[19])]
    return [pid, None]


def _lives(process: list[int | None]) -> bool:
    """Whether it runs. Without /proc none seems to: there, run one command at a time."""
    return process[1] is not None and _identity(process[0]) == process


def _is_ours(trial: FrozenTrial) -> bool:
    worker = trial.user_attrs.get("worker", {})
    return worker.get("host") == socket.gethostname() and worker["parent"] == _identity(os.getpid())


def _note_others(study: optuna.Study, storage: str) -> None:
    for trial in _running(study):
        host = trial.user_attrs.get("worker", {}).get("host", "an unknown host")
        print(
            f"note: trial {trial.number} still runs on {host}; if that is gone: optuna tell "
            f"--storage {redacted(storage)} --study-name {study.study_name} "
            f"--trial-number {trial.number} --state fail"
        )


# Parent


@dataclass
class _Worker:
    """The parent's view of a worker."""

    index: int
    process: BaseProcess
    pipe: Connection
    trial: int | None = None  # the number of the trial it was given
    dismissed: bool = False


def _start(work: Callable[[int, Connection], None], index: int) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(index, theirs))
    # Ctrl-C reaches the whole process group; a worker must not die of it while it still imports.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.start()
    signal.signal(signal.SIGINT, handler)
    theirs.close()
    return _Worker(index, process, ours)


def _lead(
    crew: list[_Worker],
    work: Callable[[int, Connection], None],
    study: optuna.Study,
    total: int,
    deadline: float,
    signals: list[int],
) -> None:
    """Hand out trials until `total` are finished or time is up; replace workers that die."""

    def may_start() -> bool:
        return time.monotonic() < deadline and trials_left(study, total) > 0

    workers, deaths = len(crew), 0  # deaths in a row, without a finished trial between them
    with _progress(study, total) as report:
        while present := [worker for worker in crew if not worker.dismissed]:
            if all(worker.trial is None for worker in present) and not may_start():
                return  # nobody waits for those that still load their data
            wait([worker.pipe for worker in present], timeout=0.5)
            if signals:
                raise KeyboardInterrupt
            for worker in present:
                alive = worker.process.is_alive()  # asked first: its last words may be in the pipe
                if worker.pipe.poll() and _is_ready(worker):
                    deaths = deaths if worker.trial is None else 0
                    report()
                    _dispatch(worker, study, may_start())
                elif not alive:
                    crew.remove(worker)
                    deaths = deaths + 1 if _bury(worker, study) else 0
                    if deaths >= 3 * workers:
                        raise RuntimeError(f"{deaths} workers died in a row: {_cause(worker)}")
                    if may_start():
                        crew.append(_start(work, worker.index))


def _is_ready(worker: _Worker) -> bool:
    """Whether it wants a trial, not if it is dead; an error that it reports is raised here."""
    try:
        error: Exception | None = worker.pipe.recv()
    except (EOFError, OSError):
        return False
    if error:
        raise error
    return True


def _dispatch(worker: _Worker, study: optuna.Study, may_start: bool) -> None:
    """Give it a trial or its leave."""
    worker.trial = _take_trial(study, worker.process.pid) if may_start else None
    worker.dismissed = not may_start
    with contextlib.suppress(OSError):  # it has just died; the next look finds that out
        worker.pipe.send(worker.trial)


def _bury(worker: _Worker, study: optuna.Study) -> bool:
    """Give up the trial of a dead worker; False if it was finished."""
    for trial in _running(study):
        if trial.number == worker.trial:
            tqdm.write(f"trial {trial.number}: {_cause(worker)}")
            _give_up(study, trial, _cause(worker), killed=True)
            return True
    return worker.trial is None


def _cause(worker: _Worker) -> str:
    code = worker.process.exitcode or 0
    if code == -signal.SIGKILL:
        return "its process was killed (out of memory?)"
    return f"its process ended with {signal.Signals(-code).name if code < 0 else code}"


def _stop(crew: list[_Worker]) -> None:
    """End all workers; those dismissed get a little time to do so by themselves."""
    for worker in crew:
        if not worker.dismissed:
            worker.process.terminate()
    deadline = time.monotonic() + GRACE_S
    for worker in crew:
        worker.process.join(max(0, deadline - time.monotonic()))
        worker.process.kill()
        worker.process.join()


@contextlib.contextmanager
def _progress(study: optuna.Study, total: int) -> Iterator[Callable[[], None]]:
    """A function that shows how far the study is: in a live line, or one now and then in a log."""
    initial = sum(map(is_finished, study.get_trials(deepcopy=False)))
    begin = shown_s = time.monotonic()
    # smoothing=0: the time left from the mean rate, as several workers finish in bursts.
    bar = tqdm(total=total, initial=initial, unit="trial", smoothing=0, disable=None)

    def report() -> None:
        nonlocal shown_s
        trials = [trial for trial in study.get_trials(deepcopy=False) if is_finished(trial)]
        done, now = len(trials), time.monotonic()
        if done == bar.n:
            return
        text = _summary(trials)
        bar.set_postfix_str(text, refresh=False)
        bar.update(done - bar.n)
        if bar.disable and (now - shown_s > 30 or done >= total):
            rest_s = (now - begin) / (done - initial) * max(0, total - done)
            print(f"{done}/{total} trials, {text}, about {rest_s:.0f} s left", flush=True)
            shown_s = now
        bar.n = done  # a bar that is not shown does not count

    with bar:
        yield report


def _summary(trials: list[FrozenTrial]) -> str:
    """Finished trials in words; UserError when the first `HOPELESS` have all failed."""
    states = Counter(trial.state for trial in trials)
    if len(trials) == states[TrialState.FAIL] >= HOPELESS:
        reason = trials[-1].user_attrs["reason"]
        raise UserError(f"none of the first {len(trials)} trials succeeded; the last one: {reason}")
    values = [trial.values[0] for trial in trials if trial.state == TrialState.COMPLETE]
    best = f"{max(values):.4f}" if values else "none yet"
    return f"{states[TrialState.PRUNED]} pruned, {states[TrialState.FAIL]} failed, best {best}"


@contextlib.contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM instead of breaking off a record; the third is heeded at once."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if len(noted) > 2:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# Worker


def _work(
    make_objective: ObjectiveMaker,
    claim_device: Callable[[int], torch.device],
    open_study: Callable[[], optuna.Study],
    build_sampler: Callable[[int], optuna.samplers.BaseSampler],
    pruner: optuna.pruners.BasePruner,
    index: int,
    pipe: Connection,
) -> None:
    """In a worker: evaluate the trials whose numbers come through the pipe; None ends it.

    It answers None when it wants a trial, and otherwise the error that ends the study.
    """
    faulthandler.enable()  # a crash in a library shows where it happened
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        device = claim_device(index)
        objective = make_objective(device)
        study = open_study()
    except Exception as error:
        pipe.send(_portable(error, "the objective could not be set up"))
        return
    study.pruner = pruner
    gc.freeze()  # what is there stays: to look through it would take 0.1 s after every trial
    failure = None
    while failure is None:
        pipe.send(None)
        if (number := pipe.recv()) is None:
            return
        study.sampler = build_sampler(number)
        failure = _evaluate(study, objective, number)
        gc.collect()  # a traceback's frames hold on to the trial's tensors in circles
        if device.type == "cuda":
            torch.cuda.empty_cache()  # raises if the GPU's context is broken: ends this process
    pipe.send(failure)


def _end_with_parent() -> None:
    """End this process, in the middle of a trial too, when its parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _claim_device(device: torch.device, workers: int, index: int) -> torch.device:
    """The GPU of worker `index`, or its share of the CPU's threads."""
    if device.type == "cuda":
        device = torch.device("cuda", index % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    return device


def _evaluate(study: optuna.Study, objective: Objective, number: int) -> Exception | None:
    """Run a trial and record how it ended; a failure is returned when it must end the study."""
    # Not study.ask(), which would choose the trial. To list the trials also fills the cache of a
    # database's storage, on which a trial made by hand relies.
    (given,) = (trial for trial in study.get_trials(deepcopy=False) if trial.number == number)
    trial = optuna.Trial(study, given._trial_id)
    value, state, reason = None, TrialState.FAIL, ""
    try:
        value, state = float(objective(trial)), TrialState.COMPLETE
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = first_line(error)
    except DATABASE_ERRORS:
        raise  # no fault of these parameters; the parent queues them again
    except Exception as error:
        if "default" in trial.user_attrs:
            return _portable(error, "the default trial failed")
        reason = f"{type(error).__name__}: {first_line(error)}"
    if value is not None and not math.isfinite(value):
        value, state, reason = None, TrialState.FAIL, f"the objective returned {value}"
    with contextlib.suppress(UpdateFinishedTrialError):  # given up by somebody in the meantime
        if reason:
            trial.set_user_attr("reason", reason[:500])  # a database has room for 2048 characters
        study.tell(trial, value, state, skip_if_finished=True)
    return None


def _portable(error: Exception, what: str) -> Exception:
    """An error in a form that always survives the pipe, with its traceback as a note."""
    portable: Exception = RuntimeError(f"{what}: {type(error).__name__}: {first_line(error)}")
    if isinstance(error, UserError):
        portable = UserError(str(error))
    portable.add_note(f"In a worker:\n{traceback.format_exc()}")
    return portable
