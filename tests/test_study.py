"""Exact totals, and studies that survive the death of their workers, their parent and their files.

STUDY_KILL_ROUNDS=20 kills a worker in twenty studies instead of three.
"""

import contextlib
import functools
import os
import pwd
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

from tests.study_objectives import (
    DEADLY,
    crash,
    fail_to_make,
    make_count_threads,
    make_failing,
    make_quick,
    make_together,
    make_troubled,
    settings,
)
from utils import study
from utils.cli import UserError

ROOT = Path(__file__).parent.parent
ROUNDS = int(os.environ.get("STUDY_KILL_ROUNDS", "3"))
COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
RUNNING, WAITING = TrialState.RUNNING, TrialState.WAITING


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


@pytest.fixture
def together(tmp_path: Path) -> Callable[[int], study.ObjectiveMaker]:
    """An objective that begins once so many workers are there."""
    folder = tmp_path / "workers"
    folder.mkdir()
    return lambda workers: functools.partial(make_together, folder, workers)


def in_state(found: optuna.Study, state: TrialState) -> list[FrozenTrial]:
    return found.get_trials(states=(state,))


def finished(found: optuna.Study) -> list[FrozenTrial]:
    return [trial for trial in found.trials if study.is_finished(trial)]


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def empty_study(storage: Path) -> optuna.Study:
    return study.tune(make_quick, **settings(storage, trials=0))


# What needs no worker


def test_unknown_sampler_and_pruner_are_named_with_their_neighbours(journal: Path) -> None:
    for changes, near in (({"sampler": "tpp"}, "tpe"), ({"pruner": "hyberband"}, "hyperband")):
        with pytest.raises(UserError, match=near):
            study.tune(make_quick, **settings(journal, **changes))
    assert not journal.exists()


@pytest.mark.parametrize("name", study.SAMPLERS)
def test_points_follow_from_seed_and_trial_and_are_never_repeated(name: str) -> None:
    def points(seed: int) -> list[float]:
        found = optuna.create_study()
        drawn = []
        for number in range(20):
            found.sampler = study.make_sampler(name, seed, number)
            drawn.append(found.ask().suggest_float("x", 0, 1))
        return drawn

    assert points(0) == points(0)
    assert len({*points(0), *points(1)}) == 40  # seed and number are mixed, not added


@pytest.mark.parametrize(
    ("pruner", "first"), [("hyperband", 2), ("asha", 2), ("median", 3), ("none", None)]
)
def test_first_epoch_in_which_a_pruner_ends_a_bad_trial(pruner: str, first: int | None) -> None:
    """Among 30 good trials; hyperband has other brackets that are more patient."""
    found = optuna.create_study(
        study_name="fixed", direction="maximize", pruner=study.make_pruner(pruner, 12)
    )
    for _ in range(30):
        trial = found.ask()
        for epoch in range(1, 13):
            trial.report(0.9, epoch)
            trial.should_prune()
        found.tell(trial, 0.9)
    ends = []
    for _ in range(20):
        trial = found.ask()
        for epoch in range(1, 13):
            trial.report(0.1, epoch)
            if trial.should_prune():
                ends.append(epoch)
                break
        found.tell(trial, state=PRUNED)
    assert min(ends, default=None) == first
    assert max(ends, default=0) <= 9


def test_hyperband_has_two_brackets_at_most_however_long_the_trials() -> None:
    for max_epochs in range(1, 101):
        pruner = study.make_pruner("hyperband", max_epochs)
        found = optuna.create_study(study_name="fixed", pruner=pruner)
        trial = found.ask()
        trial.report(0.5, 1)
        trial.should_prune()
        brackets = pruner._n_brackets  # type: ignore[attr-defined]
        assert brackets == (1 if max_epochs < 3 else 2)


def test_a_study_of_another_setting_is_not_continued(journal: Path) -> None:
    arguments = settings(journal, trials=0, setting={"epochs": 12, "data": "a"})
    study.tune(make_quick, **arguments).enqueue_trial({"x": 1.0})
    assert len(study.tune(make_quick, **arguments).trials) == 1
    with pytest.raises(UserError, match="was made with epochs 12, now it is 6"):
        study.tune(make_quick, **{**arguments, "setting": {"epochs": 6, "data": "a"}})


# Trials of processes that are gone


def left_running(found: optuna.Study, **worker: Any) -> FrozenTrial:
    """A running trial of a worker and a parent that have ended, unless `worker` says otherwise."""
    gone = [os.getpid(), 1]  # this pid, but started in another age
    named = {"host": socket.gethostname(), "process": gone, "parent": gone, **worker}
    trial = found.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    trial.set_user_attr("worker", named)
    return found.trials[trial.number]


def test_a_trial_of_a_dead_process_is_queued_once(journal: Path) -> None:
    lost = left_running(empty_study(journal))
    found = empty_study(journal)
    assert [trial.state for trial in found.trials] == [FAIL, WAITING]
    assert found.trials[0].user_attrs["interrupted"] == "its process is gone"
    assert found.trials[1].user_attrs["retry_of"] == 0
    assert found.trials[1].system_attrs["fixed_params"] == lost.params
    again = left_running(found)  # takes up the queued trial
    assert again.number == 1
    assert again.params == lost.params
    found = empty_study(journal)
    assert [trial.state for trial in found.trials] == [FAIL, FAIL]
    assert found.trials[1].user_attrs["reason"] == "its process is gone, 2 times"
    assert len(finished(found)) == 1


def test_a_crash_between_queueing_and_failing_queues_nothing_twice(journal: Path) -> None:
    found = empty_study(journal)
    lost = left_running(found)
    found.enqueue_trial(lost.params, {"retry_of": lost.number, "kills": 1})
    assert [trial.state for trial in empty_study(journal).trials] == [FAIL, WAITING]


def test_what_a_trial_was_asked_to_do_survives_an_early_death(journal: Path) -> None:
    found = empty_study(journal)
    found.enqueue_trial({"x": 0.25, "y": 3}, {"default": True})
    left_running(found)
    retry = empty_study(journal).trials[1]
    assert retry.system_attrs["fixed_params"] == {"x": 0.25, "y": 3}
    assert retry.user_attrs["default"]


@pytest.mark.parametrize("owner", ["another machine", "a living parent", "nobody"])
def test_trials_of_others_are_left_alone_and_have_their_place(
    journal: Path, owner: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = empty_study(journal)
    alive = study._identity(os.getppid())
    worker = {"host": "elsewhere"} if owner == "another machine" else {"parent": alive}
    trial = found.ask() if owner == "nobody" else left_running(found, **worker)
    found = study.tune(make_quick, **settings(journal, trials=1))
    assert [trial.state for trial in found.trials] == [RUNNING]
    assert f"trial {trial.number} still runs on" in capsys.readouterr().out


def test_a_process_that_nobody_collected_is_dead() -> None:
    with subprocess.Popen(["true"]) as process:
        wait_for(lambda: study._identity(process.pid)[1] is None)
        assert Path(f"/proc/{process.pid}").exists()
    assert study._lives(study._identity(os.getpid()))


# Whole studies


def test_total_is_exact_through_resumes(
    journal: Path,
    together: Callable[[int], study.ObjectiveMaker],
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = settings(journal, trials=15, workers=3, default_params={"x": 1.25})
    study.tune(together(3), **arguments)
    size = journal.stat().st_size
    study.tune(crash, **arguments)  # already there: no worker starts
    assert journal.stat().st_size == size
    found = study.tune(together(1), **{**arguments, "trials": 18, "workers": 1})
    assert [trial.state for trial in found.trials] == [COMPLETE] * 18
    default, *others = found.trials
    assert default.params == {"x": 1.25}
    assert default.user_attrs["default"]
    assert len({trial.params["x"] for trial in others}) == 17  # nobody repeats anybody's points
    assert len({str(trial.user_attrs["worker"]["process"]) for trial in found.trials}) == 4
    output = capfd.readouterr()
    assert "15/15 trials, 0 pruned, 0 failed, best" in output.out
    assert output.err == ""


def test_troubles_of_trials_are_recorded_and_the_study_goes_on(journal: Path) -> None:
    arguments = settings(journal, trials=9, pruner="asha", sampler="tpe", max_epochs=5)
    found = study.tune(make_troubled, **arguments)
    states = [trial.state for trial in found.trials]
    assert states[:6] == [COMPLETE, FAIL, FAIL, FAIL, FAIL, PRUNED]
    assert len(finished(found)) == len(states) == 9
    assert [trial.user_attrs["reason"] for trial in found.trials[1:5]] == [
        "MemoryError",
        "the objective returned nan",
        "ValueError: no such thing",
        "CUDA out of memory. Tried to allocate 2 GiB.",
    ]
    assert found.trials[5].intermediate_values == {1: 0.1}


def test_a_default_trial_that_fails_unexpectedly_stops_and_is_tried_again(journal: Path) -> None:
    arguments = settings(journal, default_params={"x": 0.5})
    with pytest.raises(RuntimeError, match="default trial failed: ValueError: bug") as raised:
        study.tune(functools.partial(make_failing, ValueError("bug")), **arguments)
    assert "in objective" in raised.value.__notes__[0]  # where it happened
    with pytest.raises(UserError, match="mend me"):
        study.tune(functools.partial(make_failing, UserError("mend me")), **arguments)
    found = study.tune(make_quick, **arguments)
    assert [trial.state for trial in found.trials] == [FAIL, FAIL, *[COMPLETE] * 4]
    assert found.trials[2].params == {"x": 0.5}
    assert found.trials[2].user_attrs["default"]


def test_a_study_without_any_success_stops(journal: Path) -> None:
    maker = functools.partial(make_failing, MemoryError("no room"))
    with pytest.raises(UserError, match=r"none of the first 5 trials succeeded.* no room"):
        study.tune(maker, **settings(journal, trials=50))
    assert len(study.load_study(str(journal), "small").trials) == 5


@pytest.mark.parametrize("error", [UserError("no data"), ValueError("no data")])
def test_an_objective_that_cannot_be_made(journal: Path, error: Exception) -> None:
    kind = UserError if isinstance(error, UserError) else RuntimeError
    with pytest.raises(kind, match="no data"):
        study.tune(functools.partial(fail_to_make, error), **settings(journal))
    assert study.load_study(str(journal), "small").trials == []


def test_workers_that_keep_dying_stop_the_study(journal: Path) -> None:
    with pytest.raises(RuntimeError, match=r"3 workers died in a row.* ended with 3"):
        study.tune(crash, **settings(journal))


def test_parameters_that_kill_twice_are_not_tried_a_third_time(journal: Path) -> None:
    found = study.tune(make_quick, **settings(journal, trials=2, default_params={"x": DEADLY}))
    assert [trial.state for trial in found.trials] == [FAIL, FAIL, COMPLETE]
    assert "killed" in found.trials[0].user_attrs["interrupted"]
    assert "killed" in found.trials[1].user_attrs["reason"]
    assert found.trials[1].params == {"x": DEADLY}


def test_no_trial_starts_when_time_is_up(journal: Path) -> None:
    found = study.tune(make_quick, **settings(journal, timeout=0.01))
    assert found.trials == []


def test_a_running_trial_may_finish_when_time_is_up(
    journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent's clock leaps as soon as it has handed out a trial."""
    dispatch, clock = study._dispatch, time.monotonic

    def leap(*arguments: Any) -> None:
        dispatch(*arguments)
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 1000)

    monkeypatch.setattr(study, "_dispatch", leap)
    found = study.tune(make_quick, **settings(journal, timeout=500))
    assert [trial.state for trial in found.trials] == [COMPLETE]


def test_workers_share_the_threads_of_the_cpu(journal: Path) -> None:
    found = study.tune(make_count_threads, **settings(journal, workers=2, trials=2))
    share = max(1, torch.get_num_threads() // 2)
    assert [trial.value for trial in found.trials] == [share, share]


def test_workers_take_turns_on_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    devices = [study._claim_device(torch.device("cuda"), 3, index) for index in range(3)]
    assert devices == chosen == [torch.device("cuda", number) for number in (0, 1, 0)]


def test_sqlite(tmp_path: Path, together: Callable[[int], study.ObjectiveMaker]) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    arguments = settings(storage, trials=8, workers=2, default_params={"x": 1.25})
    found = study.tune(together(2), **arguments)
    assert [trial.state for trial in found.trials] == [COMPLETE] * 8
    assert found.trials[0].params == {"x": 1.25}


# Killed in the middle


def kill_one_worker(storage: str, kept: dict[int, float | None], seed: int) -> None:
    """Kill a worker some time after all three run, and note what was finished before."""
    generator = random.Random(seed)
    wait_for(lambda: len(active_children()) == 3)
    victim = generator.choice(active_children())
    wait_for(lambda: is_at_work(storage, victim.pid))
    time.sleep(generator.uniform(0, 0.3))
    kept.update({t.number: t.value for t in finished(study.load_study(storage, "small"))})
    victim.kill()


def is_at_work(storage: str, pid: int | None) -> bool:
    with contextlib.suppress(UserError):
        running = in_state(study.load_study(storage, "small"), RUNNING)
        return any(trial.user_attrs["worker"]["process"][0] == pid for trial in running)
    return False


def check_after_kill(found: optuna.Study, total: int) -> list[FrozenTrial]:
    """The total is exact, nothing runs, and each interrupted trial was repeated once."""
    assert len(finished(found)) == total
    assert not in_state(found, RUNNING) + in_state(found, WAITING)
    lost = [trial for trial in found.trials if not study.is_finished(trial)]
    for trial in lost:
        (retry,) = (t for t in found.trials if t.user_attrs.get("retry_of") == trial.number)
        assert retry.params.items() >= trial.params.items()
    return lost


def kill_round(storage: str, seed: int, maker: study.ObjectiveMaker, total: int = 50) -> int:
    kept: dict[int, float | None] = {}
    killer = threading.Thread(target=kill_one_worker, args=(storage, kept, seed))
    killer.start()
    found = study.tune(maker, **settings(storage, trials=total, workers=3, seed=seed))
    killer.join()
    assert len(kept) < total - 10  # it was killed in the middle
    assert all(found.trials[number].value == value for number, value in kept.items())
    lost = check_after_kill(found, total)
    assert len(lost) <= 1  # none, if it was killed between two trials
    return len(lost)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_killed_worker_costs_nothing(
    journal: Path, together: Callable[[int], study.ObjectiveMaker], seed: int
) -> None:
    lost = kill_round(str(journal), seed, together(3))
    print(f"round {seed}: {lost} interrupted")


@contextlib.contextmanager
def tuning(storage: Path, trials: int, pause_s: float) -> Iterator[subprocess.Popen[str]]:
    """A process that tunes with two workers."""
    code = "from tests.study_objectives import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, str(storage), "2", str(trials), str(pause_s)]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def workers_at_work(storage: Path) -> set[int]:
    if not storage.exists():
        return set()
    with contextlib.suppress(UserError):
        running = in_state(study.load_study(str(storage), "small"), RUNNING)
        return {trial.user_attrs["worker"]["process"][0] for trial in running}
    return set()


def test_a_killed_parent_takes_its_workers_along_and_the_study_resumes(journal: Path) -> None:
    def done() -> dict[int, float | None]:
        return {t.number: t.value for t in finished(study.load_study(str(journal), "small"))}

    with tuning(journal, trials=8, pause_s=1) as process:
        wait_for(lambda: workers_at_work(journal))
        wait_for(lambda: len(done()) >= 2 and len(workers_at_work(journal)) == 2)
        pids, kept = workers_at_work(journal), done()
        process.kill()
        process.wait()  # the workers may still be there, and it is to wait for them
        found = study.tune(make_quick, **settings(journal, trials=8, workers=1))
        assert all(study._identity(pid)[1] is None for pid in pids)
    assert kept.items() <= {trial.number: trial.value for trial in found.trials}.items()
    assert len(check_after_kill(found, total=8)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_even_stubborn_workers_soon(journal: Path, number: signal.Signals) -> None:
    with tuning(journal, trials=4, pause_s=60) as process:
        wait_for(lambda: len(workers_at_work(journal)) == 2)
        pids = workers_at_work(journal)
        start = time.monotonic()
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert time.monotonic() - start < 15
    assert process.returncode == 130
    assert errors == "interrupted: everything finished so far is kept\n"
    assert all(study._identity(pid)[1] is None for pid in pids)
    trials = study.load_study(str(journal), "small").trials
    assert [trial.state for trial in trials] == [FAIL, FAIL, WAITING, WAITING]
    assert {t.user_attrs["interrupted"] for t in trials[:2]} == {"the study was stopped"}
    retries = {t.user_attrs["retry_of"]: t.system_attrs["fixed_params"] for t in trials[2:]}
    assert retries == {t.number: t.params for t in trials[:2]}
    assert {t.user_attrs["kills"] for t in trials[2:]} == {0}  # it was not their fault


# PostgreSQL


@pytest.fixture
def postgresql() -> Iterator[str]:
    """URL of a server of our own, where its programs and a driver are installed."""
    pytest.importorskip("psycopg2")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("no PostgreSQL server under /usr/lib/postgresql")
    with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as folder:
        options: dict[str, Any] = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL}
        if os.getuid() == 0:  # the server refuses to run as root
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            options |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        control = [str(programs[-1] / "pg_ctl"), "-D", f"{folder}/data", "-w", "-t", "120"]
        initdb = [str(programs[-1] / "initdb"), "-D", f"{folder}/data", "-U", "me", "-A", "trust"]
        subprocess.run(initdb, **options)
        socket_only = f"-k {folder} -c listen_addresses= -c fsync=off"
        subprocess.run([*control, "-l", f"{folder}/log", "-o", socket_only, "start"], **options)
        try:
            yield f"postgresql+psycopg2://me@/postgres?host={folder}"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **options)


def test_postgresql(postgresql: str, together: Callable[[int], study.ObjectiveMaker]) -> None:
    """Three workers of which one is killed, then a resume."""
    kill_round(postgresql, 0, together(3))
    found = study.tune(make_quick, **settings(postgresql, trials=52))
    check_after_kill(found, total=52)
