"""Totals, retries and tables of studies; and that a kill at any moment loses no finished trial.

STUDY_KILL_ROUNDS=20 kills real processes in twenty rounds instead of one.
"""

import functools
import os
import pwd
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy import stats

from tests.study_objectives import (
    DEFAULT,
    SETTING,
    SPACE,
    TOTALS,
    InlineWorker,
    die,
    queued_job,
    run_all,
    search_job,
    train,
)
from utils import study
from utils.cli import UserError

ROOT = Path(__file__).parent.parent
ROUNDS = int(os.environ.get("STUDY_KILL_ROUNDS", "1"))
CUTS = 24  # prefixes of a journal from which a run goes on
CPU = torch.device("cpu")
COMPLETE, FAIL = TrialState.COMPLETE, TrialState.FAIL
RUNNING, WAITING = TrialState.RUNNING, TrialState.WAITING


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "Worker", InlineWorker)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power failure is tested


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


def write_at_exit(path: Path, device: torch.device) -> None:
    Finalize(None, path.write_text, ["clean"], exitpriority=0)


def test_an_idle_worker_may_clean_up_before_it_ends(tmp_path: Path):
    path = tmp_path / "at_exit"
    with study.WorkerPool([CPU], ahead=False) as pool:
        pool.submit(write_at_exit, [path]).result()
        assert not path.exists()
    assert path.read_text() == "clean"


def search(
    journal: Path, function: Callable[..., Any], total: int = 4, changed: Any = lambda: None
) -> optuna.Study:
    """A random search; its study can be read, not written, when this returns."""
    with study.opened(str(journal)) as storage, study.WorkerPool([CPU], ahead=True) as pool:
        found = study.open_study(storage, "search", SETTING)
        found.sampler = study.make_sampler("random", 0, len(found.trials), shared=False)
        job = functools.partial(search_job, function)
        study.work_off(found, pool, SPACE, job, changed, total)
        return found


def finish(found: dict[str, list[FrozenTrial]]) -> dict[tuple[str, int], float | None]:
    """Check that all stages are complete; the value of each trial."""
    for name, trials in found.items():
        complete = [trial for trial in trials if trial.state == COMPLETE]
        lost = [trial for trial in trials if trial.state == FAIL]
        assert len(complete) == TOTALS[name]
        assert len(complete) + len(lost) == len(trials)  # none runs or waits
        for trial in lost:
            retry = trial
            while retry.state == FAIL:  # killed, too, perhaps before it had anything of its own
                (retry,) = (t for t in trials if t.user_attrs.get("retry_of") == retry.number)
            assert retry.params.items() >= trial.params.items()
            assert retry.user_attrs.get("hparams") == trial.user_attrs.get("hparams", retry.params)
    return {
        (name, trial.number): trial.value
        for name, trials in found.items()
        for trial in trials
        if trial.state == COMPLETE
    }


def values_in(journal: Path) -> dict[tuple[str, int], float | None]:
    """The complete trials of a journal that nobody writes."""
    with study.opened(str(journal)) as storage:
        names = optuna.get_all_study_names(storage)
        studies = [optuna.load_study(study_name=name, storage=storage) for name in names]
        return {(s.study_name, t.number): t.value for s in studies for t in study.best_trials(s)}


# --- totals, retries, failures --------------------------------------------------------------------


@pytest.mark.usefixtures("inline")
def test_a_whole_run_is_exact_and_the_same_again_adds_nothing(journal: Path) -> None:
    found = run_all(str(journal))
    finish(found)
    assert found["search"][0].params == DEFAULT
    assert len({trial.params["x"] for trial in found["search"]}) == 6
    seeds = [(t.user_attrs["configuration"], t.user_attrs["seed"]) for t in found["finalists"]]
    three = ("default", "first", "second")
    assert seeds == [(name, seed) for seed in (100, 101) for name in three]
    again = run_all(str(journal))
    assert finish(again) == finish(found)
    assert [len(trials) for trials in again.values()] == [len(t) for t in found.values()]


@pytest.mark.usefixtures("inline")
def test_a_kill_at_any_byte_of_the_journal_loses_nothing(journal: Path, tmp_path: Path) -> None:
    """One process appends to a journal: what a kill leaves is always a part from its beginning."""
    run_all(str(journal))
    content = journal.read_bytes()
    generator = random.Random(0)
    for cut in [0, *(generator.randrange(len(content)) for _ in range(CUTS))]:
        part = tmp_path / f"{cut}.journal"
        part.write_bytes(content[:cut])
        kept = values_in(part)
        assert finish(run_all(str(part))).items() >= kept.items()


@pytest.mark.usefixtures("inline")
def test_two_kills_in_a_row_lose_nothing(journal: Path, tmp_path: Path) -> None:
    run_all(str(journal))
    once = tmp_path / "once.journal"
    once.write_bytes(journal.read_bytes()[: journal.stat().st_size // 3])
    first = once.stat().st_size
    run_all(str(once))
    twice = tmp_path / "twice.journal"
    twice.write_bytes(once.read_bytes()[: first + 1500])
    kept = values_in(twice)
    assert finish(run_all(str(twice))).items() >= kept.items()


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize(("deaths", "states"), [(2, [FAIL, FAIL, COMPLETE]), (9, [FAIL] * 3)])
def test_a_training_whose_process_dies_is_tried_three_times(
    journal: Path, deaths: int, states: list[TrialState]
) -> None:
    seen: list[dict[str, float]] = []

    def mortal(hparams: dict[str, float], seed: int, device: torch.device) -> Any:
        seen.append(hparams)
        if len(seen) <= deaths:
            raise SystemExit
        return train(hparams, seed, device)

    found = search(journal, mortal, total=1)
    assert [trial.state for trial in found.trials] == states
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]
    rows = study.rows_of(found, "top1")
    assert [row["status"] for row in rows[:2]] == ["retried", "retried"]
    assert [row["retry_of"] for row in rows] == [None, 0, 1]
    assert rows[0]["reason"] == "its process was killed"
    assert rows[2]["status"] == ("ok" if deaths == 2 else "unavailable")


@pytest.mark.usefixtures("inline")
def test_a_training_that_objects_to_itself_fails_in_the_end_with_its_columns(journal: Path) -> None:
    def late(hparams: dict[str, float], seed: int, device: torch.device) -> Any:
        value, columns, _ = train(hparams, seed, device)
        return value, columns, "9 s of training, not 8" if hparams["x"] > 0.5 else ""

    found = search(journal, late, total=6)
    assert len(study.finished(found)) == 6
    rows = study.rows_of(found, "top1")
    failed = [row for row in rows if row["status"] == "failed"]
    assert failed
    for row in failed:
        assert (row["reason"], row["top1"]) == ("9 s of training, not 8", None)
        assert row["train_seconds"] == 1.5
        same = [r for r in rows if r["seed"] == row["seed"]]
        assert [r["status"] for r in same] == ["retried", "retried", "failed"]
    assert all(row["hparams"].count('"x": 0.') == 1 for row in rows)


@pytest.mark.usefixtures("inline")
def test_a_failure_is_recorded_and_the_study_goes_on(journal: Path) -> None:
    errors: list[Exception] = [MemoryError("no room"), ValueError("no such\nthing")]

    def troubled(hparams: dict[str, float], seed: int, device: torch.device) -> Any:
        if seed < 2:
            raise errors[seed]
        return train(hparams, seed, device)

    found = search(journal, troubled)
    assert [trial.state for trial in found.trials] == [FAIL, FAIL, COMPLETE, COMPLETE]
    rows = study.rows_of(found, "top1")
    reasons = [(row["status"], row["reason"]) for row in rows]
    assert reasons[0] == ("unavailable", "no room")
    assert reasons[1:] == [("failed", "ValueError: no such"), ("ok", ""), ("ok", "")]


@pytest.mark.usefixtures("inline")
def test_a_study_without_any_success_stops(journal: Path) -> None:
    def hopeless(*_: Any) -> Any:
        raise MemoryError("no room")

    with pytest.raises(UserError, match=r"none of the first 5 trainings succeeded.* no room"):
        search(journal, hopeless, total=50)


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_what_runs_when_the_run_is_stopped_is_queued_and_has_not_been_tried(
    journal: Path, error: type[BaseException]
) -> None:
    def stop() -> None:
        raise error("mend me")

    with pytest.raises(error):
        search(journal, train, total=4, changed=stop)
    with study.opened(str(journal)) as storage:
        trials = optuna.load_study(study_name="search", storage=storage).trials
    waiting = [trial for trial in trials if trial.state == WAITING]
    assert waiting
    assert sorted(trial.state for trial in trials if trial not in waiting) == [COMPLETE, FAIL]
    assert {trial.user_attrs["tries"] for trial in waiting} == {1}
    found = search(journal, train, total=4)
    assert len(study.finished(found)) == len(study.best_trials(found)) == 4


@pytest.mark.usefixtures("inline")
def test_the_next_trial_is_asked_for_while_one_trains(journal: Path) -> None:
    asked, two = [], threading.Event()

    def patient(hparams: dict[str, float], seed: int, device: torch.device) -> Any:
        assert two.wait(60), "the second was not asked for"
        return train(hparams, seed, device)

    def job_of(trial: optuna.Trial) -> study.Job:
        asked.append(trial.number)
        if len(asked) == 2:
            two.set()
        return search_job(patient, trial)

    with study.opened(str(journal)) as storage, study.WorkerPool([CPU], ahead=True) as pool:
        found = study.open_study(storage, "search", SETTING)
        study.work_off(found, pool, SPACE, job_of, lambda: None, 3)
    assert [trial.state for trial in found.trials] == [COMPLETE] * 3


@pytest.mark.usefixtures("inline")
def test_only_what_is_missing_is_queued_seeds_outside(journal: Path) -> None:
    with study.opened(str(journal)) as storage:
        found = study.open_study(storage, "final", SETTING)
        for configurations, seeds in (
            ({"default": DEFAULT}, [1]),
            ({"default": DEFAULT, "best": {"x": 1.0}}, [0, 1]),
        ):
            study.queue(found, study.missing(found, configurations, seeds))
        asked = [(t.user_attrs["configuration"], t.user_attrs["seed"]) for t in found.trials]
    assert asked == [("default", 1), ("default", 0), ("best", 0), ("best", 1)]


@pytest.mark.usefixtures("inline")
def test_what_two_machines_queue_at_once_is_trained_once(journal: Path) -> None:
    with study.opened(str(journal)) as storage, study.WorkerPool([CPU], ahead=True) as pool:
        found = study.open_study(storage, "final", SETTING)
        asked = study.missing(found, {"default": DEFAULT, "best": {"x": 1.0}}, [0, 1])
        study.queue(found, asked)
        study.queue(found, asked)
        for trial in [found.ask() for _ in range(5)]:  # all were cut off, a twin among them
            study.try_again(found, trial.number, counted=False)
        study.work_off(found, pool, {}, functools.partial(queued_job, train), lambda: None)
        rows = study.rows_of(found, "value")
        done = [(row["configuration"], row["seed"]) for row in rows if row["status"] == "ok"]
        assert done == [(what["configuration"], what["seed"]) for what in asked]
        assert len(rows) == 8  # with the four that were cut off
        assert len(study.finished(found)) == 4
        assert study.missing(found, {"default": DEFAULT, "best": {"x": 1.0}}, [0, 1]) == []


def test_what_failed_in_the_end_or_is_lost_is_queued_again_once(journal: Path) -> None:
    with study.opened(str(journal)) as storage:
        found = study.open_study(storage, "final", SETTING)
        study.queue(found, study.missing(found, {"default": DEFAULT}, [0, 1, 2]))
        for state, value in ((FAIL, None), (COMPLETE, 1.0), (COMPLETE, 1.0)):
            found.tell(found.ask(), value, state)
        for _ in range(2):
            lost = [("default", 1)]
            study.queue(found, study.missing(found, {"default": DEFAULT}, [0, 1, 2], lost))
        again = [(t.user_attrs["seed"], t.user_attrs["retry_of"]) for t in found.trials[3:]]
        assert again == [(0, 0), (1, 1)]
        assert [trial.number for trial in study.finished(found)] == [2]


def test_what_waits_or_runs_is_unfinished(journal: Path) -> None:
    with study.opened(str(journal)) as storage:
        found = study.open_study(storage, "finalists", SETTING)
        assert not study.unfinished(found)
        found.enqueue_trial(DEFAULT)
        assert len(study.unfinished(found)) == 1
        trial = found.ask()
        assert len(study.unfinished(found)) == 1
        found.tell(trial, 1.0)
        assert not study.unfinished(found)


def test_a_trial_that_has_ended_is_not_tried_again(journal: Path) -> None:
    with study.opened(str(journal)) as storage:
        found = study.open_study(storage, "search", SETTING)
        found.tell(found.ask(SPACE), 1.0)
        study.try_again(found, 0, counted=False)
        assert [trial.state for trial in found.trials] == [COMPLETE]


@pytest.mark.usefixtures("inline")
def test_an_empty_queue_that_another_machine_emptied_is_no_error(journal: Path) -> None:
    with study.opened(str(journal)) as storage, study.WorkerPool([CPU], ahead=True) as pool:
        found = study.open_study(storage, "final", SETTING)
        found.enqueue_trial({})  # as `ask` makes one where the queue is empty
        job = functools.partial(queued_job, train)
        study.work_off(found, pool, {}, job, lambda: None)
        assert [trial.state for trial in found.trials] == [FAIL]
        assert study.finished(found) == study.rows_of(found, "top1") == []


@pytest.mark.usefixtures("inline")
def test_trials_of_other_machines_are_waited_for_and_then_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with study.opened(f"sqlite:///{tmp_path}/study.db") as storage:
        found = study.open_study(storage, "search", SETTING)
        ours, theirs = found.ask(SPACE), found.ask(SPACE)
        seen: dict[int, float] = {}
        assert study.recover(found, [ours.number], seen, dead_after_s=240)
        now[0] = 239.0
        assert study.recover(found, [ours.number], seen, dead_after_s=240)
        assert [trial.state for trial in found.trials] == [RUNNING, RUNNING]
        now[0] = 240.0
        assert not study.recover(found, [ours.number], seen, dead_after_s=240)
        assert [trial.state for trial in found.trials] == [RUNNING, FAIL, WAITING]
        assert found.trials[2].system_attrs["fixed_params"] == theirs.params
        assert found.trials[2].user_attrs == {"retry_of": 1, "tries": 2}


def test_a_kill_between_queueing_and_failing_queues_nothing_twice(journal: Path) -> None:
    with study.opened(str(journal)) as storage:
        found = study.open_study(storage, "search", SETTING)
        lost = found.ask(SPACE)
        found.enqueue_trial(lost.params, {"retry_of": lost.number, "tries": 2})
        study.recover(found, [], {}, 0.0)
        assert [trial.state for trial in found.trials] == [FAIL, WAITING]


@pytest.mark.parametrize("name", study.SAMPLERS)
def test_points_follow_from_the_seed_and_a_resumed_study_does_not_repeat_them(name: str) -> None:
    def points(seed: int, begun: int) -> list[float]:
        sampler = study.make_sampler(name, seed, begun, shared=False)
        found = optuna.create_study(sampler=sampler)
        return [found.ask(SPACE).params["x"] for _ in range(5)]

    assert points(0, 0) == points(0, 0)
    assert len({*points(0, 0), *points(0, 5), *points(1, 0)}) == 15


def test_the_gaussian_process_chooses_beside_running_trials() -> None:
    found = optuna.create_study(direction="maximize")
    found.sampler = study.make_sampler("gp", 0, 0, shared=False)
    for i in range(12):
        trial = create_trial(params={"x": i / 12, "y": 0.5}, distributions=SPACE, value=-i / 12)
        found.add_trial(trial)
    first, second = (found.ask(SPACE).params for _ in range(2))
    assert max(first["x"], second["x"]) < 0.5
    assert first != second


# --- storages -------------------------------------------------------------------------------------


def test_a_journal_belongs_to_one_run(journal: Path) -> None:
    in_use = pytest.raises(UserError, match="in use by another run")
    with study.opened(str(journal)), in_use, study.opened(str(journal)):
        pass
    with study.opened(str(journal)):  # free again
        pass


def test_half_a_record_is_dropped(journal: Path) -> None:
    with study.opened(str(journal)) as storage:
        study.open_study(storage, "search", SETTING).enqueue_trial(DEFAULT)
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole.splitlines()[-1][:20])
    with study.opened(str(journal)) as storage:
        study.open_study(storage, "search", SETTING).enqueue_trial({"x": 1.0})
    assert journal.read_bytes().startswith(whole)
    with study.opened(str(journal)) as storage:
        trials = study.open_study(storage, "search", SETTING).trials
    assert [t.system_attrs["fixed_params"]["x"] for t in trials] == [0.25, 1.0]


@pytest.mark.parametrize("content", ["notes of mine\n", "{}", '{"a": 1}\n'])
def test_a_file_that_is_no_journal_is_left_alone(journal: Path, content: str) -> None:
    journal.write_text(content)
    with pytest.raises(UserError, match="not a journal"), study.opened(str(journal)):
        pass
    assert journal.read_text() == content


@pytest.mark.parametrize("where", [0, 1, -1])
def test_a_damaged_journal_is_reported_in_one_line(journal: Path, where: int) -> None:
    with study.opened(str(journal)) as storage:
        study.open_study(storage, "search", SETTING).enqueue_trial(DEFAULT)
    lines = journal.read_text().splitlines()
    lines[where] = '{"op_code":nonsense'
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="cannot be used") as raised, study.opened(str(journal)):
        pass
    assert str(journal) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "storage",
    [
        "nonsense://me:secret@somewhere",
        "postgresql://me:secret@host:port/db",
        "postgresql+psycopg2://me:secret@127.0.0.1:1/db",
        "postgresql+psycopg2://me:sec@ret@127.0.0.1:1/db",
        "/proc/no/such.journal",
        "sqlite:////proc/no/such.db",
        "/tmp",
    ],
)
def test_storages_that_cannot_be(storage: str) -> None:
    refused = pytest.raises(UserError, match=r"--storage .* cannot be used: .+")
    with refused as raised, study.opened(storage):
        pass
    assert "sec" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_study_of_another_setting_is_not_continued(journal: Path) -> None:
    with study.opened(str(journal)) as storage:
        study.open_study(storage, "search", {"seconds": 60}).enqueue_trial(DEFAULT)
        study.open_study(storage, "search", {"seconds": 60})
        with pytest.raises(UserError, match=r"made with seconds 60, now it is 8: .* --study-name"):
            study.open_study(storage, "search", {"seconds": 8})
        optuna.create_study(storage=storage, study_name="foreign").enqueue_trial(DEFAULT)
        with pytest.raises(UserError, match="made with seconds None"):
            study.open_study(storage, "foreign", {"seconds": 60})


# --- tables ---------------------------------------------------------------------------------------


def rows(name: str, *values: float | None) -> list[dict[str, Any]]:
    about = {"configuration": name, "parameters": 7, "steps": 9, "train_seconds": 1.5}
    return [
        about | {"status": "failed" if value is None else "ok", "top1": value} for value in values
    ]


def test_summary_has_students_interval_and_welchs_difference() -> None:
    first, second = [80.0, 81.0, 80.4], [81.0, 82.0, 81.8, 81.2]
    both = rows("default", *first, None) + rows("best", *second)
    default, best = study.summarize(both, "top1", stage="final")
    assert default["stage"] == "final"
    assert (default["trainings"], best["trainings"]) == (3, 4)
    low, high = stats.t.interval(0.95, 2, default["top1_percent_mean"], stats.sem(first))
    assert (default["top1_percent_low"], default["top1_percent_high"]) == pytest.approx((low, high))
    assert "difference_points" not in default
    assert best["difference_points"] == pytest.approx(sum(second) / 4 - sum(first) / 3)
    variances = [stats.sem(second) ** 2, stats.sem(first) ** 2]
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 3 + variances[1] ** 2 / 2)
    half = stats.t.ppf(0.975, freedom) * sum(variances) ** 0.5
    assert best["difference_high_points"] - best["difference_points"] == pytest.approx(half)
    assert best["difference_points"] - best["difference_low_points"] == pytest.approx(half)


def test_two_seeds_have_no_interval_and_none_no_row() -> None:
    (pair,) = study.summarize(rows("best", 80.0, 81.0), "top1")
    assert pair["top1_percent_sd"] > 0
    assert "top1_percent_low" not in pair
    assert study.summarize(rows("best", None), "top1") == []


def test_importances_want_enough_trials_and_find_what_matters() -> None:
    found = optuna.create_study(direction="maximize")
    for i in range(30):
        params = {"x": i / 30, "y": 7 * i % 30 / 30}
        asked = params | {"y": params["x"]}  # what is trained decides, not what was asked for
        trial = create_trial(params=asked, distributions=SPACE, value=i / 30)
        trial.set_user_attr("hparams", params)
        found.add_trial(trial)
        if i == study.MIN_COMPLETE - 2:
            assert study.importance_rows(found) == []
    first, second = study.importance_rows(found)
    assert (first["hyperparameter"], first["complete_trials"]) == ("x", 30)
    assert first["importance"] > 0.6 > second["importance"]


# --- real processes -------------------------------------------------------------------------------


def start(storage: str, pause_s: float = 0.2, dead_after_s: float = 0) -> subprocess.Popen[bytes]:
    code = "from tests.study_objectives import main; raise SystemExit(main())"
    command = [sys.executable, "-c", code, storage, str(pause_s), str(dead_after_s)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def wait_for_trials(journal: Path, process: subprocess.Popen[bytes], number: int) -> None:
    """Until so many trials have been completed since the journal's beginning."""
    end = time.monotonic() + 600  # it hangs, however slow the machine is
    while not (journal.exists() and journal.read_bytes().count(b'"state":1') >= number):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def last_worker(journal: Path) -> int:
    """The process that did the last complete training."""
    return int(journal.read_bytes().rpartition(b'"pid":')[2].partition(b",")[0])


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_killed_processes_cost_nothing(journal: Path, seed: int) -> None:
    """A worker in the search, then the run itself, at a moment and a stage by chance."""
    generator = random.Random(seed)
    with start(str(journal)) as process:
        wait_for_trials(journal, process, generator.randrange(1, 5))
        time.sleep(generator.uniform(0, 0.2))
        os.kill(last_worker(journal), signal.SIGKILL)
        wait_for_trials(journal, process, 5 + generator.randrange(10))
        time.sleep(generator.uniform(0, 0.2))
        worker = last_worker(journal)
        process.kill()
        process.wait()
        end = time.monotonic() + 600
        while lives(worker):  # it ends with the run
            assert time.monotonic() < end
            time.sleep(0.05)
    kept = values_in(journal)
    assert len(kept) >= 5
    assert finish(run_all(str(journal))).items() >= kept.items()


def test_a_signal_ends_a_run_soon_and_nothing_runs_on(journal: Path) -> None:
    with start(str(journal), pause_s=0.5) as process:
        wait_for_trials(journal, process, 2)
        worker = last_worker(journal)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert not lives(worker)
    with study.opened(str(journal)) as storage:
        trials = optuna.load_study(study_name="search", storage=storage).trials
    assert not [trial for trial in trials if trial.state == RUNNING]
    assert {trial.user_attrs["tries"] for trial in trials if trial.state == WAITING} == {1}


def test_a_worker_that_dies_is_replaced(journal: Path) -> None:
    """The process itself, not a stand-in: three deaths of one trial, then the next ones."""

    def job_of(trial: optuna.Trial) -> study.Job:
        function, arguments = search_job(train, trial)
        return (die if trial.user_attrs["seed"] == 0 else function), arguments

    with study.opened(str(journal)) as storage, study.WorkerPool([CPU], ahead=True) as pool:
        found = study.open_study(storage, "search", SETTING)
        study.work_off(found, pool, SPACE, job_of, lambda: None, 2)
    by_seed = sorted((t.user_attrs["seed"], t.state.name) for t in found.trials)
    assert by_seed == [(0, "FAIL"), (0, "FAIL"), (0, "FAIL"), (1, "COMPLETE")]


# --- PostgreSQL -----------------------------------------------------------------------------------


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


def test_three_machines_share_a_database(postgresql: str) -> None:
    processes = [start(postgresql, 0.3, dead_after_s=20) for _ in range(3)]
    time.sleep(8)
    processes[0].kill()
    for process in processes[1:]:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    processes[0].communicate()
    with study.opened(postgresql) as storage:
        for name, total in TOTALS.items():
            found = optuna.load_study(study_name=name, storage=storage)
            assert not study.unfinished(found)
            complete = len(study.best_trials(found))
            assert total <= complete <= total + 2 * (name == "search")  # three may begin the last
