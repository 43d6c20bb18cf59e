"""What the hot operations cost with a thousand and with a million finished runs in the store."""

import time
import uuid
from collections.abc import Callable, Sequence

import psycopg

from celery_durable.store import runs
from celery_durable.store.database import Database
from tests import factory, servers
from tests.benchmarks.report import Result, by_turns, ratio
from tests.benchmarks.setting import Setting

ID = "md5(n::text)::uuid::text"
# In the order of the ids, because that fills an index several times as fast.
FILL = (
    f"""INSERT INTO durable_run (id, task, state, epoch, worker, queue, version, started_at, finished_at)
    SELECT {ID}, 'shop.order', 'succeeded', 1, 'w1@bench/0123abcd', 'celery', 'v1', now(), now()
    FROM generate_series(1, %(count)s) n ORDER BY 1""",
    f"""INSERT INTO durable_message (run_id, envelope)
    SELECT {ID}, repeat('x', 400) FROM generate_series(1, %(count)s) n ORDER BY 1""",
    f"""INSERT INTO durable_outcome (run_id, result)
    SELECT {ID}, '42' FROM generate_series(1, %(count)s) n ORDER BY 1""",
    f"""INSERT INTO durable_step (run_id, key, seq, name, kind, state, attempts, run_attempt, epoch, output, started_at)
    SELECT {ID}, 'charge', 0, 'charge', 'step', 'succeeded', 1, 1, 1, '42', now()
    FROM generate_series(1, %(count)s) n ORDER BY 1""",
    f"""INSERT INTO durable_history (run_id, what, who, epoch, version)
    SELECT {ID}, what, 'w1@bench/0123abcd', 1, 'v1'
    FROM generate_series(1, %(count)s) n, unnest(ARRAY['claim', 'succeed']) what ORDER BY 1""",
    "VACUUM ANALYZE",
    "CHECKPOINT",
)


class Store:
    """One store with finished runs, and the runs that pass through it in one round."""

    def __init__(self, url: str, finished: int, batch: int) -> None:
        with psycopg.connect(servers.plain(url), autocommit=True) as conn:
            for statement in FILL:
                conn.execute(statement, {"count": finished} if "%(count)s" in statement else None)
        self.database = Database(url)
        self._batch = batch
        self._made: list[factory.Made] = []

    def start(self) -> float:
        news = [factory.new_run(str(uuid.uuid4())) for _ in range(self._batch)]
        self._made = [factory.Made(new.id, 1, new) for new in news]
        store = self.database.once
        return self._time(
            lambda made: store(lambda conn: runs.start(conn, made.new, due_in=factory.RESEND)), expected=True
        )

    def claim(self) -> float:
        return self._time(lambda made: factory.take(self.database, made) is not None, expected=True)

    def step(self) -> float:
        record = factory.make_record()
        return self._time(lambda made: factory.append(self.database, made, record), expected=False)

    def finish(self) -> float:
        return self._time(lambda made: factory.finish(self.database, made), expected=True)

    def _time(self, operation: Callable[[factory.Made], object], *, expected: object) -> float:
        began = time.perf_counter()
        answers = [operation(made) for made in self._made]
        took = time.perf_counter() - began
        assert all(answer == expected for answer in answers), answers
        return took / self._batch


def measure(setting: Setting) -> list[Result]:
    rounds, batch, many = (7, 50, 50_000) if setting.is_quick else (15, 200, 1_000_000)
    few = Store(setting.database("few"), 1_000, batch)
    full = Store(setting.database("many"), many, batch)
    operations: Sequence[str] = ("start", "claim", "step", "finish")
    # By turns within each operation, so that both stores meet the same moment of the machine.
    timed = by_turns(rounds, *(getattr(store, name) for name in operations for store in (full, few)))
    few.database.close()
    full.database.close()
    return [
        ratio(
            f"{name} with {many:,} finished runs against 1,000",
            [(taken[2 * place], taken[2 * place + 1]) for taken in timed],
            unit="ms",
            at_most=1.2,
            scale=1000,
        )
        for place, name in enumerate(operations)
    ]
