"""How many bytes a small step adds to the tables and to the WAL, against a bare insert of the same payload."""

import json
import time
from collections.abc import Callable

import psycopg

from tests import servers
from tests.benchmarks import project
from tests.benchmarks.report import Result, ratio
from tests.benchmarks.setting import Setting

CREATE = "CREATE TABLE bare_size (run_id text, key text, output text, PRIMARY KEY (run_id, key))"
INSERT = "INSERT INTO bare_size (run_id, key, output) VALUES (%s, %s, %s)"
TABLES = "SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class c WHERE relkind = 'r' AND relname LIKE %s"
WAL = "SELECT pg_current_wal_lsn() - '0/0'::pg_lsn"


def measure(setting: Setting) -> list[Result]:
    rounds, count = (3, 500) if setting.is_quick else (7, 2_000)
    text = json.dumps(project.PAYLOAD)
    with psycopg.connect(servers.plain(setting.store), autocommit=True) as conn:
        conn.execute(CREATE)

        def bare() -> None:
            run = f"run-{time.monotonic_ns()}"
            for number in range(count):
                conn.execute(INSERT, (run, f"charge#{number}", text))

        def growth(tables: str, fill: Callable[[], object]) -> tuple[float, float]:
            conn.execute("CHECKPOINT")  # so that both write a page to the WAL as a whole the first time
            before = [number(conn, TABLES, tables), number(conn, WAL)]
            fill()
            after = [number(conn, TABLES, tables), number(conn, WAL)]
            return (after[0] - before[0]) / count, (after[1] - before[1]) / count

        # What autovacuum writes for the runs of other benchmarks would count as ours.
        conn.execute("ALTER SYSTEM SET autovacuum = off")
        conn.execute("SELECT pg_reload_conf()")
        both = [
            (growth("durable_%", lambda: project.many_steps.apply((count,)).get()), growth("bare_size", bare))
            for _ in range(rounds)
        ]
        conn.execute("ALTER SYSTEM RESET autovacuum")
        conn.execute("SELECT pg_reload_conf()")
    return [
        ratio(f"{what} of a step against a bare insert", pairs, unit="bytes")
        for what, pairs in (
            ("space", [(ours[0], theirs[0]) for ours, theirs in both]),
            ("WAL", [(ours[1], theirs[1]) for ours, theirs in both]),
        )
    ]


def number(conn: psycopg.Connection, query: str, *parameters: str) -> float:
    row = conn.execute(query, parameters or None).fetchone()
    return float(row[0]) if row else 0.0
