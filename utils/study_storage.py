"""Where a study is kept: a journal file, SQLite or a database server.

All errors that a user can mend become a UserError of one line, in which no password is shown.
"""

import contextlib
import fcntl
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from sqlalchemy.exc import SQLAlchemyError

from utils.cli import UserError, first_line

DRIVERS = {  # module: package
    "MySQLdb": "mysqlclient",
    "psycopg": "'psycopg[binary]'",
    "psycopg2": "psycopg2-binary",
}
DATABASE_ERRORS = (SQLAlchemyError, StorageInternalError)
# And what a missing driver, a folder, an old schema and, from ValueError on, a journal raise.
OPENING_ERRORS = (
    *(*DATABASE_ERRORS, ImportError, OSError, RuntimeError),
    *(ValueError, LookupError, TypeError, AttributeError, AssertionError),
)


def load_study(storage: str, study_name: str) -> optuna.Study:
    """Open an existing study and create nothing; UserError if there is none of this name."""
    file = _file_of(storage)
    if file and not file.exists():
        raise UserError(f"there is no study yet: {file} does not exist; run the tuning first")
    opened = open_storage(storage)
    with mendable(storage, *OPENING_ERRORS):
        names = optuna.get_all_study_names(opened)
        if study_name in names:
            return optuna.load_study(study_name=study_name, storage=opened)
    has = f"only {', '.join(sorted(names))}" if names else "none at all"
    raise UserError(
        f"storage {redacted(storage)} has no study {study_name!r}, {has}: correct the name "
        "or run the tuning first"
    )


def create_study(storage: str, study_name: str, fresh: bool) -> optuna.Study:
    """Open a study that maximises or create it, if `fresh` in place of an earlier one."""
    opened = open_storage(storage)
    with mendable(storage, *OPENING_ERRORS):
        exists = study_name in optuna.get_all_study_names(opened)
        if exists and fresh:
            optuna.delete_study(study_name=study_name, storage=opened)
        if exists and not fresh:
            study = optuna.load_study(storage=opened, study_name=study_name)
        else:
            study = optuna.create_study(
                storage=opened, study_name=study_name, direction="maximize", load_if_exists=True
            )
    if study.directions != [StudyDirection.MAXIMIZE]:
        raise UserError(
            f"study {study_name!r} in {redacted(storage)} does not maximise one value: "
            "take another name or start it afresh"
        )
    return study


def open_storage(text: str) -> BaseStorage:
    """A database for a URL (`sqlite:///a.db`, `postgresql+psycopg2://…`), else a journal file.

    For the workers of one machine a journal is faster than SQLite, but its lock is none to
    programs other than this; several machines want a database server. A file's folder is created.

    Raises:
        UserError: it cannot be reached, written or read, or its driver is missing.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    file = _file_of(text)
    with mendable(text, *OPENING_ERRORS):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
        if "://" not in text:
            return _open_journal(Path(text))
        # SQLite's writers wait for each other; a server may have closed an idle connection.
        patience = {"connect_args": {"timeout": 60}} if file else {}
        return RDBStorage(text, engine_kwargs={"pool_pre_ping": True, **patience})


@contextlib.contextmanager
def mendable(storage: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn a storage's errors of these kinds into a UserError."""
    try:
        yield
    except kinds as error:
        cause: Any = error.__cause__ if isinstance(error, StorageInternalError) else error
        text = first_line(getattr(cause, "orig", None) or cause)  # the driver's own words
        if isinstance(error, ImportError):
            driver = getattr(error.__cause__, "name", None) or "?"
            text = f"its driver is missing, pip install {DRIVERS.get(driver, driver)}"
        elif "://" not in storage:
            text += "; restore it or name another"
        raise UserError(f"storage {redacted(storage)} cannot be used: {text}") from error


def redacted(storage: str) -> str:
    """The storage's text as it may be shown."""
    if "://" not in storage:
        return storage
    try:
        return sqlalchemy.make_url(storage).render_as_string(hide_password=True)
    except (SQLAlchemyError, ValueError):
        return storage.partition("://")[0] + "://…"


def _file_of(storage: str) -> Path | None:
    """The file of a journal or of SQLite; None for a server."""
    if "://" not in storage:
        return Path(storage)
    with mendable(storage, SQLAlchemyError, ValueError):
        url = sqlalchemy.make_url(storage)
    if url.get_backend_name() != "sqlite":
        return None
    if not url.database or url.database == ":memory:":
        raise UserError(f"storage {storage}: workers cannot share SQLite's memory, name a file")
    return Path(url.database)


def _open_journal(path: Path) -> JournalStorage:
    content, start = path.read_bytes() if path.exists() else b"", b'{"op_code":'
    if not start.startswith(content[: len(start)]):  # or records would go into somebody's notes
        raise ValueError("it is not a journal of Optuna's")
    if whole := content[: content.rfind(b"\n") + 1].splitlines():
        json.loads(whole[-1])  # Optuna finds an error in the last line only after the next one
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_FileLock(path)))


class _FileLock(JournalFileOpenLock):
    """A lock of the kernel's, which ends with the process that holds it, however that ends.

    Optuna's own lock files outlive a killed process; the others then wait for 30 seconds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        self._file = self._path.open("rb+")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        _drop_torn_line(self._file)
        return True

    def release(self) -> None:
        if self._file:
            self._file.close()


def _drop_torn_line(file: IO[bytes]) -> None:
    """Cut off a half-written record: the next would join it and make the journal unreadable."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) not in (b"\n", b""):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
