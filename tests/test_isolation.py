"""Jobs in worker processes: their order, their failures, and processes that die."""

import os
import signal
import threading
import time

import pytest

from utils.cli import UserError
from utils.isolation import Worker, run_jobs


def work(number: int, place: str) -> tuple[int, str, int]:
    if number == 13:
        raise ValueError("thirteen")
    if number == 66:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == 99:
        raise UserError("no such thing")
    return number, place, os.getpid()


def test_results_come_in_the_order_of_the_jobs_from_one_process_a_place():
    outcomes = list(run_jobs(work, [(i,) for i in range(6)], ["a", "b"]))
    assert [failure for failure, _ in outcomes] == [{}] * 6
    assert [number for _, (number, _, _) in outcomes] == list(range(6))
    pids = {place: pid for _, (_, place, pid) in outcomes}
    assert all(pids[place] == pid for _, (_, place, pid) in outcomes)
    assert os.getpid() not in pids.values()


def test_a_failed_job_is_a_reason_and_a_dead_process_is_replaced():
    outcomes = list(run_jobs(work, [(1,), (13,), (66,), (2,), (3,)], ["a"]))
    assert [result and result[0] for _, result in outcomes] == [1, None, None, 2, 3]
    assert outcomes[1][0] == {"status": "failed", "reason": "ValueError: thirteen"}
    assert outcomes[2][0]["status"] == "failed"
    assert "ended with -11" in outcomes[2][0]["reason"]
    pids = [result[2] for _, result in outcomes if result]
    assert pids[0] != pids[1] == pids[2]


def test_a_users_error_ends_all_jobs():
    with pytest.raises(UserError, match="no such thing"):
        list(run_jobs(work, [(i,) for i in (1, 99, 99, 99, 2)], ["a", "b"]))


def sleep_and_note(worker: Worker, errors: list[BaseException]) -> None:
    try:
        worker.run(time.sleep, 60)
    except BaseException as error:
        errors.append(error)


def test_stopping_a_busy_process_ends_its_job_without_another_error():
    for _ in range(8):
        errors: list[BaseException] = []
        worker = Worker()
        worker.run(os.getpid)
        thread = threading.Thread(target=sleep_and_note, args=(worker, errors))
        thread.start()
        time.sleep(0.05)
        worker.stop()
        thread.join(10)
        assert not thread.is_alive()
        (error,) = errors
        assert str(error) == f"its process ended with {-signal.SIGTERM}"
