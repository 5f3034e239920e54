"""Worker processes: answers, failures, processes that die, Ctrl-C, and a parent that is killed."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from utils import cli
from utils.workers import Outcome, UnavailableError, Worker, attempt, recorded

ROOT = Path(__file__).resolve().parent.parent


class StubbornError(Exception):
    """One that pickles and does not unpickle."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def fail(kind: str) -> Any:
    errors = {
        "value": ValueError("thirteen\nand more"),
        "user": cli.UserError("no such thing"),
        "stubborn": StubbornError("one", "two"),
        "memory": torch.OutOfMemoryError("CUDA out of memory"),
    }
    raise errors[kind]


def sleep_with_the_lock(seconds: int) -> None:
    """Sleep as a library's call does that holds the interpreter."""
    print("asleep", flush=True)
    ctypes.PyDLL(None).sleep(seconds)


def kill_self(number: int) -> None:
    os.kill(os.getpid(), number)


def make_generator() -> Any:
    return (i for i in range(3))


def test_a_worker_answers_in_a_process_of_its_own_and_survives_errors():
    with Worker() as worker:
        pid = worker.run(os.getpid)
        assert pid != os.getpid()
        with pytest.raises(ValueError, match="thirteen") as caught:
            worker.run(fail, "value")
        assert "in fail" in caught.value.__notes__[0]
        with pytest.raises(RuntimeError, match="StubbornError: one and two"):
            worker.run(fail, "stubborn")
        with pytest.raises(MemoryError, match="CUDA out of memory"):
            worker.run(fail, "memory")
        with pytest.raises(TypeError, match="pickle"):
            worker.run(make_generator)
        assert worker.run(os.getpid) == pid
    assert not worker.is_alive()


def test_an_outcome_says_whether_it_is_a_result():
    assert attempt(len, "four") == Outcome("ok", "", 4)
    assert attempt(fail, "value") == Outcome("failed", "ValueError: thirteen")
    assert attempt(fail, "memory") == Outcome("unavailable", "CUDA out of memory")
    assert not attempt(fail, "value").ok
    assert attempt(fail, "value").columns == {"status": "failed", "reason": "ValueError: thirteen"}
    with pytest.raises(cli.UserError, match="no such thing"):
        attempt(fail, "user")


def test_a_failure_is_recorded_in_its_row():
    row = {"status": "ok"}
    with recorded(row):
        pass
    assert row == {"status": "ok"}
    with recorded(row):
        raise UnavailableError("no GPU")
    assert row == {"status": "unavailable", "reason": "no GPU"}
    with pytest.raises(cli.UserError), recorded(row):
        raise cli.UserError("bad flag")


def test_a_dead_process_is_told_from_a_failed_question():
    with Worker() as worker:
        with pytest.raises(UnavailableError, match="not enough memory"):
            worker.run(kill_self, signal.SIGKILL)
        assert not worker.is_alive()
        with pytest.raises(UnavailableError, match="not enough memory"):
            worker.run(os.getpid)
    with Worker() as worker, pytest.raises(RuntimeError, match=f"ended with {-signal.SIGSEGV}"):
        worker.run(kill_self, signal.SIGSEGV)


def test_stopping_a_busy_worker_ends_its_question_in_another_thread():
    worker = Worker()
    worker.run(os.getpid)
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(attempt(worker.run, time.sleep, 600)))
    thread.start()
    worker.stop()
    thread.join(60)
    assert not thread.is_alive()
    assert [outcome.status for outcome in outcomes] == ["failed"]
    assert f"ended with {-signal.SIGTERM}" in outcomes[0].reason


def test_ctrl_c_does_not_reach_a_worker_from_its_first_moment():
    with Worker() as worker:
        assert worker._process.pid is not None
        os.kill(worker._process.pid, signal.SIGINT)  # it has not run a line of ours yet
        assert signal.SIGINT in worker.run(signal.pthread_sigmask, signal.SIG_BLOCK, set())
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_a_swallowed_ctrl_c_is_raised_by_the_next_question():
    @cli.command
    def main(_: Any) -> int:
        with Worker() as worker:
            with pytest.raises(KeyboardInterrupt):  # as a library's callback may swallow it
                signal.raise_signal(signal.SIGINT)
            worker.run(os.getpid)
        return 0

    assert main() == 130


ends_with_parent = pytest.mark.skipif(
    sys.platform != "linux", reason="SIGIO ends a process there alone"
)


@ends_with_parent
@pytest.mark.parametrize("ignored", [False, True])
def test_a_worker_ends_when_its_parent_is_killed(ignored: bool):
    program = (
        "import signal\n"
        f"{'signal.signal(signal.SIGIO, signal.SIG_IGN)' if ignored else ''}\n"
        "from tests.test_workers import sleep_with_the_lock\nfrom utils.workers import Worker\n"
        "Worker().run(sleep_with_the_lock, 600)\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "asleep\n"
        time.sleep(0.5)
        parent.kill()
        assert parent.stdout.read() == ""  # ends only when nobody holds the pipe any more
    assert parent.returncode == -signal.SIGKILL


@ends_with_parent
def test_a_worker_that_starts_does_nothing_for_a_parent_that_was_killed(tmp_path: Path):
    """Killed with the question sent, before the worker has run a line of ours."""
    (tmp_path / "main.py").write_text(
        "import signal, sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.test_workers import sleep_with_the_lock\nfrom utils.workers import Worker\n"
        "if __name__ == '__main__':\n"
        "    worker = Worker()\n"
        "    signal.setitimer(signal.ITIMER_REAL, 0.2)  # its default ends this process\n"
        "    worker.run(sleep_with_the_lock, 600)\n"
        "time.sleep(2)  # in the worker: what a script imports\n"
    )
    command = [sys.executable, str(tmp_path / "main.py")]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=100, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGALRM, "")
