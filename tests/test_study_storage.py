"""Storages: what is created, what is refused in one line, and files that killed processes leave."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import optuna
import pytest
from optuna.study import StudyDirection

from utils.cli import UserError
from utils.study_storage import create_study, load_study, open_storage


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "study.journal"


def open_small(storage: str | Path, fresh: bool = False) -> optuna.Study:
    return create_study(str(storage), "small", fresh)


@pytest.mark.parametrize("content", ["notes of mine\n", "{}", '{"a": 1}\n'])
def test_a_file_that_is_no_journal_is_left_alone(journal: Path, content: str) -> None:
    journal.write_text(content)
    with pytest.raises(UserError, match="not a journal"):
        open_small(journal)
    assert journal.read_text() == content


@pytest.mark.parametrize("damage", ["first", "middle", "last"])
def test_a_corrupt_journal_is_reported_in_one_line(journal: Path, damage: str) -> None:
    open_small(journal).enqueue_trial({"x": 1.0})
    lines = journal.read_text().splitlines(keepends=True)
    where = {"first": 0, "middle": 1, "last": len(lines)}[damage]
    lines.insert(where, '{"op_code":nonsense\n')
    journal.write_text("".join(lines))
    with pytest.raises(UserError, match="cannot be used") as raised:
        open_small(journal)
    assert str(journal) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_half_a_record_at_the_end_is_dropped(journal: Path) -> None:
    found = open_small(journal)
    found.enqueue_trial({"x": 1.0})
    whole = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(whole.splitlines()[-1][:20])
    found.enqueue_trial({"x": 0.5})
    assert journal.read_bytes().startswith(whole)
    fixed = [t.system_attrs["fixed_params"]["x"] for t in open_small(journal).trials]
    assert fixed == [1.0, 0.5]


def test_the_lock_of_a_killed_process_is_free_at_once(journal: Path) -> None:
    found = open_small(journal)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'rb+'); fcntl.flock(f, 2); print(flush=True); "
    command = [sys.executable, "-c", hold + "sys.stdin.read()", str(journal)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        holder.stdout.readline()
        waiting = threading.Thread(target=found.enqueue_trial, args=({"x": 1.0},))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()  # it does exclude
        holder.kill()
        waiting.join(5)
        assert not waiting.is_alive()
    assert len(found.trials) == 1


def test_a_study_of_another_direction_is_not_continued(journal: Path) -> None:
    opened = open_storage(str(journal))
    optuna.create_study(storage=opened, study_name="small", direction="minimize")
    with pytest.raises(UserError, match="does not maximise"):
        open_small(journal)
    fresh = open_small(journal, fresh=True)
    assert fresh.direction == StudyDirection.MAXIMIZE


@pytest.mark.parametrize("storage", ["study.journal", "sqlite:///study.db"])
def test_fresh_forgets_the_study_of_this_name_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("small", "other"):
        found = create_study(storage, name, fresh=False)
        found.add_trial(optuna.trial.create_trial(value=0.5))
    assert len(open_small(storage).trials) == 1
    assert open_small(storage, fresh=True).trials == []
    assert load_study(storage, "small").trials == []
    assert len(load_study(storage, "other").trials) == 1


def test_folders_of_a_storage_are_created(tmp_path: Path) -> None:
    for name, prefix in (("a.journal", ""), ("b.db", "sqlite:///")):
        file = tmp_path / "new" / "folder" / name
        open_storage(f"{prefix}{file}")
        assert file.is_file()


def test_load_study_says_what_is_missing_and_creates_nothing(tmp_path: Path) -> None:
    journal = tmp_path / "a.journal"
    for storage in (str(journal), f"sqlite:///{tmp_path}/b.db"):
        with pytest.raises(UserError, match="run the tuning first"):
            load_study(storage, "small")
    assert not list(tmp_path.iterdir())
    open_small(journal)
    assert load_study(str(journal), "small").trials == []
    with pytest.raises(UserError, match="no study 'smal', only small"):
        load_study(str(journal), "smal")


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("sqlite://", "name a file"),
        ("sqlite:///:memory:", "name a file"),
        ("nonsense://somewhere", "nonsense"),
        ("postgresql://me:secret@host:port/db", r"postgresql://…"),
        ("/proc/no/such.journal", "cannot be used"),
        ("sqlite:////proc/no/such.db", "cannot be used"),
        ("/tmp", "directory"),
    ],
)
def test_storages_that_cannot_be(storage: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        open_storage(storage)
    assert "secret" not in str(raised.value)


def test_a_missing_driver_is_named_by_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for driver, package in (("psycopg2", "psycopg2-binary"), ("psycopg", "psycopg[binary]")):
        monkeypatch.setitem(sys.modules, driver, None)
        with pytest.raises(UserError, match=f"pip install .*{re.escape(package)}") as raised:
            open_storage(f"postgresql+{driver}://me:secret@127.0.0.1:1/db")
        assert "secret" not in str(raised.value)


def test_an_unreachable_server_is_reported() -> None:
    pytest.importorskip("psycopg2")
    with pytest.raises(UserError, match="refused") as raised:
        open_storage("postgresql+psycopg2://me:secret@127.0.0.1:1/db")
    assert "secret" not in str(raised.value)
