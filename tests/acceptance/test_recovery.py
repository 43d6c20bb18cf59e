"""Processes, brokers and databases die under running runs, and the runs go on."""

import contextlib
import importlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import redis

from celery_durable.messages import dispatch
from celery_durable.states import RunState
from tests import servers
from tests.acceptance.harness import Project, Worker, wait_until

LEASE = 2.0
#: How long after the lease a run may be idle.
BOUND = 2.0
SETTINGS = {"imports": ["tests.acceptance.recovery_project"]}


@pytest.fixture
def tasks(project: Project) -> Iterator[ModuleType]:
    """The tasks of `recovery_project` in this process, and in the workers of `project`."""
    yield load(project)


def load(project: Project, **settings: Any) -> ModuleType:
    project.settings |= {
        "TEST_LEASE": str(LEASE),
        "TEST_SWEEP": "0.5",
        "TEST_SETTINGS": json.dumps(SETTINGS | settings),
    }
    project.load()
    sys.modules.pop("tests.acceptance.recovery_project", None)
    return importlib.import_module("tests.acceptance.recovery_project")


def moves(handle: Any) -> list[str]:
    return [entry.what for entry in handle.history]


def seconds_until(condition: Callable[[], object], what: str, **options: Any) -> float:
    began = time.monotonic()
    wait_until(condition, what=what, **options)
    return time.monotonic() - began


def has_begun(project: Project, handle: Any, times: int = 1) -> Callable[[], bool]:
    return lambda: len(project.lines("begin", handle.id)) >= times


@contextlib.contextmanager
def two_workers(project: Project) -> Iterator[list[Worker]]:
    """Run two workers with one slot each."""
    with project.worker(concurrency=1, ready=False) as one, project.worker(concurrency=1, ready=False) as other:
        for worker in (one, other):
            wait_until(lambda worker=worker: " ready." in worker.text(), what="the worker", log=worker.log)
        yield [one, other]


def holder_of(handle: Any, workers: list[Worker]) -> Worker:
    """Return the worker that executes a run."""
    number = re.match(r"w(\d+)@", handle.run.worker)
    assert number is not None
    return next(worker for worker in workers if worker.log.name == f"worker{number[1]}.log")


def process_of(line: str) -> int:
    return int(line.split()[-1])


# -- processes -----------------------------------------------------------------------------------------


def test_a_run_whose_pool_process_is_killed_goes_on_within_two_seconds(project: Project, tasks: ModuleType) -> None:
    with project.worker(concurrency=2):
        handle = tasks.three.delay(1.0)
        wait_until(has_begun(project, handle), what="the step")

        os.kill(process_of(project.lines("begin")[0]), signal.SIGKILL)
        idle = seconds_until(has_begun(project, handle, 2), "the second attempt")
        processes = handle.get(timeout=20)

    print(f"goes on {idle:.2f} s after the kill")
    assert idle < 2
    assert processes[1] == process_of(project.lines("begin")[1])
    assert len(project.lines("first")) == len(project.lines("last")) == 1
    assert handle.run.attempt == 1


def test_a_run_whose_pool_process_is_killed_goes_on_when_the_pool_has_no_other(
    project: Project, tasks: ModuleType
) -> None:
    with project.worker(concurrency=1):
        handle = tasks.three.delay(1.0)
        wait_until(has_begun(project, handle), what="the step")

        os.kill(process_of(project.lines("begin")[0]), signal.SIGKILL)
        idle = seconds_until(has_begun(project, handle, 2), "the second attempt")
        handle.get(timeout=20)

    print(f"goes on {idle:.2f} s after the kill")
    assert idle < 5 + BOUND  # the pool looks for dead processes every 5 seconds
    assert len(project.lines("first")) == len(project.lines("last")) == 1


def test_the_runs_of_a_killed_pool_process_are_not_held_by_their_own_redelivered_messages(
    project: Project, tasks: ModuleType
) -> None:
    with project.worker(concurrency=2):
        # The slot of the dead process is taken at once, so that the message of the run waits in the worker.
        victim = tasks.three.delay(12.0)
        wait_until(has_begun(project, victim), what="the step")
        others = [tasks.three.delay(12.0) for _ in range(3)]
        wait_until(has_begun(project, others[0]), what="the other step")

        os.kill(process_of(project.lines("begin", victim.id)[0]), signal.SIGKILL)
        idle = seconds_until(lambda: "recover" in moves(victim), "the recovery")

    print(f"taken from the dead process after {idle:.2f} s")
    assert idle < LEASE


def test_a_run_of_a_killed_worker_goes_on_elsewhere_within_the_lease(project: Project, tasks: ModuleType) -> None:
    with two_workers(project) as workers:
        handle = tasks.three.delay(1.0)
        wait_until(has_begun(project, handle), what="the step")

        holder_of(handle, workers).kill()
        idle = seconds_until(has_begun(project, handle, 2), "the second attempt")
        handle.get(timeout=20)

    print(f"goes on {idle:.2f} s after the kill, with a lease of {LEASE:g} s")
    assert idle < LEASE + BOUND
    assert len(project.lines("first")) == len(project.lines("last")) == 1
    assert handle.run.attempt == 1


def test_a_worker_that_was_frozen_past_its_lease_records_nothing_more(project: Project, tasks: ModuleType) -> None:
    with two_workers(project) as workers:
        handle = tasks.three.delay(1.5)
        wait_until(has_begun(project, handle), what="the step")
        frozen = holder_of(handle, workers)
        (other,) = [worker for worker in workers if worker is not frozen]
        os.killpg(frozen.pid, signal.SIGSTOP)
        idle = seconds_until(has_begun(project, handle, 2), "the second attempt")
        processes = handle.get(timeout=20)
        wait_until(lambda: handle.run.state is RunState.SUCCEEDED, what="the end")
        other.stop()
        thawed = process_of(project.lines("begin")[0])
        before = handle.history, handle.steps, stored_result(project, handle)

        os.killpg(frozen.pid, signal.SIGCONT)
        wait_until(lambda: project.lines("end", handle.id, str(thawed)), what="the end of the frozen step")
        # It has tried to record its step when it takes the next run.
        tasks.three.delay(0.0).get(timeout=20)

    print(f"goes on {idle:.2f} s after the freeze, with a lease of {LEASE:g} s")
    assert idle < LEASE + BOUND
    assert (handle.history, handle.steps, stored_result(project, handle)) == before
    assert processes[1] != thawed
    assert len(project.lines("first", handle.id)) == len(project.lines("last", handle.id)) == 1


def test_a_step_that_lasts_longer_than_three_leases_is_not_stolen(project: Project, tasks: ModuleType) -> None:
    project.settings["TEST_LEASE"] = "1"
    with two_workers(project):
        handle = tasks.three.delay(3.5)

        handle.get(timeout=20)

    assert len(project.lines("begin")) == 1
    assert moves(handle) == ["start", "claim", "succeed"]


def test_a_warm_shutdown_hands_the_run_to_another_worker_at_its_next_step(project: Project, tasks: ModuleType) -> None:
    with two_workers(project) as workers:
        handle = tasks.strides.delay(8, 0.4)
        wait_until(lambda: len(project.lines("stride")) == 3, what="the third step")

        leaving = holder_of(handle, workers)
        leaving.send(signal.SIGTERM)
        idle = seconds_until(lambda: "release" in moves(handle), "the release", timeout=5)
        pause = seconds_until(lambda: moves(handle).count("claim") == 2, "the other worker")
        result = handle.get(timeout=20)
        code = leaving.process.wait(10)

    print(f"released {idle:.2f} s after SIGTERM, taken up {pause:.2f} s later")
    assert (result, code) == (28, 0)
    assert idle < 1
    assert pause < 1
    assert len(project.lines("stride")) == 8
    assert handle.run.attempt == 1


@pytest.mark.parametrize("patience", [0.0, 1.0], ids=["cold", "soft"])
def test_a_run_survives_a_quick_shutdown_of_its_worker(project: Project, patience: float) -> None:
    tasks = load(project, worker_soft_shutdown_timeout=patience)
    with two_workers(project) as workers:
        handle = tasks.three.delay(3.0)
        wait_until(has_begun(project, handle), what="the step")

        leaving = holder_of(handle, workers)
        leaving.send(signal.SIGQUIT)
        leaving.process.wait(20)
        idle = seconds_until(has_begun(project, handle, 2), "the second attempt")
        handle.get(timeout=20)

    print(f"goes on {idle:.2f} s after the worker has gone, with a lease of {LEASE:g} s")
    assert idle < LEASE + BOUND
    assert len(project.lines("first")) == len(project.lines("last")) == 1
    assert handle.run.attempt == 1


def test_a_soft_shutdown_repeats_at_most_the_step_that_it_cut_off(project: Project) -> None:
    tasks = load(project, worker_soft_shutdown_timeout=1.0)
    with two_workers(project) as workers:
        handle = tasks.strides.delay(8, 0.4)
        wait_until(lambda: len(project.lines("stride")) == 2, what="the second step")

        holder_of(handle, workers).send(signal.SIGQUIT)
        result = handle.get(timeout=20)

    assert result == 28
    assert len(project.lines("stride")) <= 9


def test_a_step_that_kills_every_process_ends_the_run_as_a_crash_loop(project: Project) -> None:
    tasks = load(project, durable_max_crashes=2)
    errback = sys.modules["tests.acceptance.project"].errback
    with project.worker(concurrency=2):
        handle = tasks.hopeless.apply_async(link_error=errback.s())

        with pytest.raises(Exception, match="died 3 times"):
            handle.get(timeout=40)

        wait_until(lambda: project.lines("errback", handle.id), what="the errback")
    assert (handle.run.state, handle.run.error_code) == (RunState.FAILED, "crash_loop")
    assert len(project.lines("deadly")) == 3
    assert len(project.lines("first")) == 1


def test_a_task_that_a_worker_does_not_know_waits_for_one_that_does(project: Project, tasks: ModuleType) -> None:
    old = {"TEST_SETTINGS": "{}"}
    with project.worker(concurrency=1, **old) as leaving:
        handle = tasks.three.delay(0.0)
        wait_until(lambda: "a task that this worker does not know" in leaving.text(), what="the old worker's refusal")
        refused = handle.run.state, stored_result(project, handle)
        with project.worker(concurrency=1):
            leaving.stop()

            handle.get(timeout=30)

    assert refused == (RunState.PENDING, None)
    assert len(project.lines("first")) == 1
    assert "fail" not in moves(handle)


# -- messages and the broker ---------------------------------------------------------------------------


def stored_result(project: Project, handle: Any) -> bytes | None:
    with contextlib.closing(redis.Redis.from_url(project.backend)) as client:
        found: bytes | None = client.get(f"celery-task-meta-{handle.id}")
        return found


def send_copy(tasks: ModuleType, handle: Any) -> None:
    dispatch.send_stored(tasks.app, tasks.app.durable.runtime, [handle.id])


def test_copies_of_a_message_execute_its_run_once_and_leave_its_result_alone(
    project: Project, tasks: ModuleType
) -> None:
    handle = tasks.three.delay(1.5)
    for _ in range(3):
        send_copy(tasks, handle)

    with project.worker(concurrency=4) as worker:
        wait_until(lambda: worker.text().count("] ignored") >= 3, what="the end of three copies")
        while_running = stored_result(project, handle)
        handle.get(timeout=20)
        wait_until(lambda: moves(handle)[-1] == "succeed", what="the end")
        result = stored_result(project, handle)
        known = worker.text().count("] ignored")
        for count in (1, 2):
            send_copy(tasks, handle)
            wait_until(lambda count=count: worker.text().count("] ignored") >= known + count, what="a late copy")

    assert while_running is None
    assert stored_result(project, handle) == result
    assert len(project.lines("first")) == len(project.lines("begin")) == len(project.lines("last")) == 1
    assert moves(handle) == ["start", "claim", "succeed"]


def test_every_run_survives_a_broker_that_was_emptied(project: Project, tasks: ModuleType) -> None:
    naps = sys.modules["tests.acceptance.project"].naps
    with project.worker(pool="threads", concurrency=8) as worker:
        asleep = [naps.delay(number, nap=6.0) for number in range(50)]
        wait_until(lambda: all(h.run.state is RunState.WAITING for h in asleep), what="50 sleeping runs")
        worker.stop()
    pending = [naps.delay(number) for number in range(50)]

    with contextlib.closing(redis.Redis.from_url(project.broker)) as client:
        client.flushdb()
    with project.worker(pool="threads", concurrency=8):
        took = seconds_until(
            lambda: all(h.run.state is RunState.SUCCEEDED for h in [*asleep, *pending]), "the end of 100 runs"
        )

    print(f"100 runs have ended {took:.1f} s after the flush")
    assert [h.run.result for h in [*asleep, *pending]] == [number * 4 for number in range(50)] * 2
    assert all(len(project.lines("double", h.id)) == 2 for h in [*asleep, *pending])


def test_runs_survive_a_restart_of_the_broker(tmp_path: Path, fresh_postgres_url: str, redis_url: str) -> None:
    broker = servers.redis(tmp_path / "broker")
    project = Project(tmp_path, store=fresh_postgres_url, broker=broker.url, backend=redis_url)
    tasks = load(project)
    tasks.app.durable.migrate()
    naps = sys.modules["tests.acceptance.project"].naps
    try:
        workers = [project.start_worker(concurrency=2)]

        def are_over() -> bool:
            # Celery itself may die of a broker that is away while messages are unacknowledged.
            if workers[-1].process.poll() is not None or "Unrecoverable error" in workers[-1].text():
                workers[-1].kill()
                workers.append(project.start_worker(concurrency=2))
            return all(handle.run.state is RunState.SUCCEEDED for handle in handles)

        handles = [naps.delay(number, count=3) for number in range(20)]
        wait_until(lambda: len(project.lines("double")) >= 30, what="the first steps")
        broker.restart(downtime=1.0)
        took = seconds_until(are_over, "the end of all")
    finally:
        workers[-1].kill()
        tasks.app.close()
        broker.stop()

    print(f"20 runs have ended {took:.1f} s after the restart, executed by {len(workers)} workers")
    assert [handle.run.result for handle in handles] == [number * 16 for number in range(20)]
    if len(workers) == 1:
        assert all(len(project.lines("double", handle.id)) == 4 for handle in handles)
    # A worker that dies may cut off one step for each of its slots.
    assert len(project.lines("double")) <= 80 + 2 * (len(workers) - 1)


# -- the database --------------------------------------------------------------------------------------


@pytest.mark.parametrize("downtime", [5.0, pytest.param(20.0, marks=pytest.mark.slow)])
def test_a_database_that_is_away_costs_no_attempt_and_repeats_no_step(
    tmp_path: Path, redis_url: str, downtime: float
) -> None:
    postgres = servers.postgres(tmp_path / "postgres")
    project = Project(tmp_path, store=postgres.url, broker=redis_url, backend=redis_url)
    tasks = load(project)
    tasks.app.durable.migrate()
    naps = sys.modules["tests.acceptance.project"].naps
    try:
        with project.worker(concurrency=2), project.worker(concurrency=1):
            sleeper = naps.delay(1, count=2)
            handle = tasks.strides.delay(6, 0.5)
            wait_until(lambda: len(project.lines("stride")) == 3, what="the third step")
            postgres.restart(downtime=downtime)
            back = time.monotonic()
            tasks.app.durable.runtime.database.close()  # this process's connections died with the server
            handle.get(timeout=30)
            took = time.monotonic() - back
            sleeper.get(timeout=30)
            ended = [(h.run.result, h.run.attempt, moves(h)) for h in (handle, sleeper)]
    finally:
        tasks.app.durable.runtime.database.close()
        postgres.stop()

    print(f"ended {took:.1f} s after the database was back")
    (total, attempt, history), (slept, attempt_of_sleeper, _) = ended
    assert (total, attempt) == (15, 1)
    assert (slept, attempt_of_sleeper) == (8, 1)
    assert len(project.lines("stride")) == 6
    assert history == ["start", "claim", "succeed"]
    assert len(project.lines("double", sleeper.id)) == 3
