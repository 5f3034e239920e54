"""A process of its own for each candidate, so that none disturbs another.

Candidates change global state (Inductor's freezing, the quantised engine, TF32), keep thread pools
and may crash the interpreter. Each lives in its own worker process; the parent asks one at a time.
"""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch

from utils.cli import UserError, first_line


class UnavailableError(Exception):
    """A candidate cannot run here; the text is the reason shown in its row."""


class Worker:
    """One process that runs functions one after the other and keeps their module's state."""

    def __init__(self) -> None:
        # A server process imports the slow libraries once and forks the workers from itself. It
        # runs nothing, so no CUDA context and no OpenMP thread is lost in the fork.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "timm", "pandas"])
        self._pool = ProcessPoolExecutor(1, context, initializer=_prepare)
        self._ending = threading.Lock()  # two threads that shut the pool down close a file twice
        self._pool.submit(os.getpid)  # starts the process, which goes on importing by itself
        (self._process,) = self._pool._processes.values()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a module-level function in the worker and return its result.

        Raises:
            UnavailableError: the process was killed, as the system does when memory runs out.
            RuntimeError: the process crashed, or its error cannot be sent.
            Exception: whatever the function raised.
        """
        try:
            return self._pool.submit(_run_portably, function, *arguments).result()
        except BrokenProcessPool as error:
            self._shut_down()
            if self._process.exitcode == -signal.SIGKILL:
                raise UnavailableError("its process was killed: not enough memory?") from error
            raise RuntimeError(f"its process ended with {self._process.exitcode}") from error

    def is_alive(self) -> bool:
        """Whether the process can still be asked."""
        return self._process.is_alive()

    def stop(self) -> None:
        """End the process at once, even in the middle of a compilation."""
        self._process.terminate()
        self._shut_down(cancel=True)

    def _shut_down(self, cancel: bool = False) -> None:
        with self._ending:
            self._pool.shutdown(wait=True, cancel_futures=cancel)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._shut_down()
        else:  # a busy worker must not hold up Ctrl-C
            self.stop()


def _run_portably(function: Callable[..., Any], *arguments: Any) -> Any:
    """In the worker: run, and turn an error that does not survive pickling into one that does."""
    try:
        return function(*arguments)
    except Exception as error:
        inner = getattr(error, "inner_exception", error)  # of a compiler's wrapper
        if isinstance(inner, torch.OutOfMemoryError):
            raise MemoryError(first_line(inner)) from None
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {first_line(error)}") from None
        raise


def _prepare() -> None:
    """Ctrl-C reaches the whole process group; only the parent acts on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_jobs(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], places: Sequence[Any]
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Call `function(*job, place)` for every job, in one process for each place at once.

    Yields in the order of the jobs: what `recorded` says of a failure, nothing if it went well, and
    the result, None after a failure. A process that died is replaced before the next job.
    """
    idle: SimpleQueue[tuple[Worker, Any]] = SimpleQueue()

    def run_one(job: tuple[Any, ...]) -> tuple[dict[str, Any], Any]:
        row: dict[str, Any] = {}
        worker, place = idle.get()
        try:
            if not worker.is_alive():
                worker = workers.enter_context(Worker())
            with recorded(row):
                return row, worker.run(function, *job, place)
        finally:
            idle.put((worker, place))
        return row, None

    with ThreadPoolExecutor(len(places)) as threads, contextlib.ExitStack() as workers:
        for place in places:
            idle.put((workers.enter_context(Worker()), place))
        yield from threads.map(run_one, jobs)


@contextlib.contextmanager
def recorded(row: dict[str, Any]) -> Iterator[None]:
    """Turn a candidate's failure into its row's status and reason; the others go on."""
    try:
        yield
    except UserError:
        raise
    except (UnavailableError, ImportError, MemoryError, torch.OutOfMemoryError) as error:
        row.update(status="unavailable", reason=first_line(error))
    except Exception as error:
        row.update(status="failed", reason=f"{type(error).__name__}: {first_line(error)}")


def peak_memory_mb(device: str) -> float | None:
    """Highest memory since the start or the last reset; None where it cannot be read."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved() / 1e6
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return None


def reset_peak_memory(device: str) -> None:
    """Return freed memory to the system and start a new peak (Linux: see proc(5), clear_refs)."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
