"""A process of its own for each candidate or training, so that none disturbs another.

Candidates change global state (Inductor's freezing, the quantised engine, TF32), keep thread pools
and may crash the interpreter. Each lives in its own worker process, which answers one question at a
time and ends when its parent does, however that ends (macOS: when it has answered).
"""

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from utils import cli, results

SECONDS_TO_END = 30  # for a worker that was asked to; then it is terminated


class UnavailableError(Exception):
    """Something cannot run here; the text is the reason shown in its row."""


@dataclass(frozen=True)
class Outcome:
    """What came of a question: a value, or the reason why there is none."""

    status: str  # ok, unavailable (this machine, library or model cannot) or failed
    reason: str = ""
    value: Any = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def columns(self) -> dict[str, str]:
        """The outcome as columns of a table."""
        return {"status": self.status, "reason": self.reason}


class Worker:
    """One process that runs functions one after the other and keeps their modules' state."""

    def __init__(self) -> None:
        # A server process imports the slow libraries once and forks the workers from itself. It
        # runs nothing, so no CUDA context and no OpenMP thread is lost in the fork.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "timm", "pandas"])
        self._waiting = threading.Lock()  # the exit code can be read but once
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        # Ctrl-C reaches the whole process group, and only the parent acts on it. A signal that is
        # blocked now stays blocked in the server and in its workers, from their first moment; the
        # parent gets its own when it is unblocked. The tracker, once started, does not unblock it.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a module-level function in the worker and return its result.

        Raises:
            UnavailableError: the process was killed, as the system does when memory runs out.
            RuntimeError: the process crashed, or its error cannot be sent.
            KeyboardInterrupt: Ctrl-C, also if an earlier one was lost.
            Exception: whatever the function raised.
        """
        try:
            self._pipe.send_bytes(pickle.dumps((function, arguments)))
            while not self._pipe.poll(0.5):
                cli.check_interrupt()
            value, error = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as lost:
            cli.check_interrupt()
            code = self._wait()
            if code == -signal.SIGKILL:
                raise UnavailableError("its process was killed: not enough memory?") from lost
            raise RuntimeError(f"its process ended with {code}") from lost
        cli.check_interrupt()
        if error is not None:
            raise error
        return value

    def is_alive(self) -> bool:
        """Whether the process can still be asked."""
        return self._wait(0) is None

    def stop(self) -> None:
        """End the process at once, even in the middle of a compilation."""
        self._process.terminate()
        if self._wait(SECONDS_TO_END) is None:  # it hangs in a driver
            self._process.kill()
            self._wait()

    def _wait(self, seconds: float | None = None) -> int | None:
        """The exit code; None if the process still runs after so many seconds."""
        with self._waiting:
            self._process.join(seconds)
            return self._process.exitcode

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # an idle process ends when nobody can ask any more, and cleans up
            self._pipe.close()
            self._wait(SECONDS_TO_END)
        self.stop()  # a busy one must not hold up Ctrl-C


def _serve(pipe: Connection) -> None:
    """In the worker: answer each question with a value or an error, until the pipe is closed."""
    _end_with_parent()
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send_bytes(_answer(pipe.recv_bytes()))


def _answer(question: bytes) -> bytes:
    """Call the pickled function; a pickled value and no error, or no value and an error.

    Apart from the loop, so that a waiting worker holds nothing of its last question.
    """
    try:
        function, arguments = pickle.loads(question)
        return pickle.dumps((function(*arguments), None))
    except Exception as error:
        return pickle.dumps((None, _portable(error)))


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same, with the worker's traceback as a note."""
    inner = getattr(error, "inner_exception", error)  # of a compiler's wrapper
    if isinstance(inner, torch.OutOfMemoryError):
        error = MemoryError(cli.first_line(inner))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {cli.first_line(error)}")
    error.add_note(f"In a worker:\n{traceback.format_exc()}")
    return error


def _end_with_parent() -> None:
    """Have Linux end this process, whatever it does, when its parent is gone.

    The pipe that closes then sends SIGIO, which needs no lock of the interpreter: TensorRT holds it
    while it builds an engine. See fcntl(2), O_ASYNC.
    """
    if sys.platform != "linux":  # macOS ignores SIGIO
        return
    parent = multiprocessing.parent_process()
    assert parent
    signal.signal(signal.SIGIO, signal.SIG_DFL)  # whatever was inherited
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGIO})
    fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(parent.sentinel, fcntl.F_GETFL)
    fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)
    if not parent.is_alive():  # it ended before that, and there will be no signal
        os._exit(1)


@contextlib.contextmanager
def recorded(row: dict[str, Any]) -> Iterator[None]:
    """Turn a failure, but for a user's error and Ctrl-C, into a row's status and reason."""
    try:
        yield
    except cli.UserError:
        raise
    except (UnavailableError, ImportError, MemoryError, torch.OutOfMemoryError) as error:
        row.update(status="unavailable", reason=cli.first_line(error))
    except Exception as error:
        reason = f"{type(error).__name__}: {cli.first_line(error)}"
        row.update(status="failed", reason=reason)


def attempt(function: Callable[..., Any], *arguments: Any) -> Outcome:
    """Call a function; what `recorded` takes becomes an outcome."""
    columns = {"status": "ok", "reason": ""}
    value = None
    with recorded(columns):
        value = function(*arguments)
    return Outcome(value=value, **columns)


def peak_memory_mb(device: str) -> float | None:
    """Highest memory in MB since the start or the last reset; None where it cannot be read."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / 1e6
    peak = results.proc_value("/proc/self/status", "VmHWM")
    return int(peak.removesuffix("kB")) * 1024 / 1e6 if peak else None


def reset_peak_memory(device: str) -> None:
    """Return freed memory to the system and start a new peak (Linux: see proc(5), clear_refs)."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
