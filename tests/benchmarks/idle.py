"""How many statements idle workers send, counted in the server's own log, for one worker and for four."""

import contextlib
import time

from tests import servers
from tests.benchmarks.report import Result
from tests.benchmarks.setting import Setting

APPLICATION = "celery-durable"
PER_SECOND = 1 / 5


def measure(setting: Setting) -> list[Result]:
    seconds = 10.0 if setting.is_quick else 60.0
    logs: dict[int, servers.StatementLog] = {}
    with contextlib.ExitStack() as stack:
        for count in (1, 4):
            store = setting.database(f"idle_{count}")
            logs[count] = servers.StatementLog(setting.postgres.log, store)
            logs[count].enable()
            for _ in range(count):
                stack.enter_context(setting.worker(store=store, concurrency=1))
        time.sleep(5 if setting.is_quick else 20)  # until each of the four knows of the others
        marks = {count: log.mark() for count, log in logs.items()}
        time.sleep(seconds)
        sent = {count: len(log.statements(APPLICATION, since=marks[count])) for count, log in logs.items()}
    return [
        Result(
            f"statements of {count} idle worker{'s' if count > 1 else ''} together",
            f"at most {PER_SECOND:g} per second",
            f"{sent[count] / seconds:.2f} per second",
            sent[count] <= seconds * PER_SECOND,
            f"{sent[count]} in {seconds:g} s",
        )
        for count in sent
    ]
