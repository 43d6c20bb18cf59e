"""A recorded step against one bare insert and against a step of DBOS Transact, on one PostgreSQL."""

import importlib.util
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import psycopg

from tests import servers
from tests.benchmarks import project
from tests.benchmarks.report import Result, by_turns, ratio
from tests.benchmarks.setting import Setting

CREATE = "CREATE TABLE bare (run_id text, key text, output text, PRIMARY KEY (run_id, key))"
INSERT = "INSERT INTO bare (run_id, key, output) VALUES (%s, %s, %s)"
_workflow: Any = None


def measure(setting: Setting) -> list[Result]:
    rounds, count = (7, 100) if setting.is_quick else (11, 500)
    text = json.dumps(project.PAYLOAD)
    with psycopg.connect(servers.plain(setting.store), autocommit=True) as conn:
        conn.execute(CREATE)

        def bare() -> float:
            run = f"run-{time.monotonic_ns()}"
            began = time.perf_counter()
            for number in range(count):
                conn.execute(INSERT, (run, f"charge#{number}", text))
            return (time.perf_counter() - began) / count

        def ours() -> float:
            # Eagerly, so that it is claimed and executed in this process as it would be in a worker's.
            return float(project.many_steps.apply((count,)).get()) / count

        pairs = by_turns(rounds, ours, bare)
        results = [ratio("a step against a bare insert", pairs, unit="ms", at_most=2, scale=1000)]
        if importlib.util.find_spec("dbos") is None:
            print("  dbos is not installed, so nothing is compared with it")
            return results
        # In a process of its own, so that its background threads are not in the way of our steps.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            pool.submit(launch_dbos, setting.database("dbos")).result()
            pairs = by_turns(rounds, lambda: pool.submit(dbos_steps, count).result() / count, ours)
            pool.submit(destroy_dbos).result()
    return [*results, ratio("a step of DBOS Transact against ours", pairs, unit="ms", at_least=4, scale=1000)]


def launch_dbos(url: str) -> None:
    """Set DBOS up as its documentation says, without Conductor and without logging."""
    global _workflow
    from dbos import DBOS

    config: Any = {"name": "bench", "system_database_url": servers.plain(url), "log_level": "CRITICAL"}
    DBOS(config=config | {"console_log_level": "CRITICAL", "enable_otlp": False})

    @DBOS.step()
    def charge(number: int) -> dict[str, Any]:
        return project.PAYLOAD

    @DBOS.workflow()
    def many_steps(count: int) -> float:
        began = time.perf_counter()
        for number in range(count):
            charge(number)
        return time.perf_counter() - began

    DBOS.launch()
    _workflow = many_steps


def dbos_steps(count: int) -> float:
    return float(_workflow(count))


def destroy_dbos() -> None:
    from dbos import DBOS

    DBOS.destroy()
