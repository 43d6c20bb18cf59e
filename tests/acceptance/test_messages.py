"""What a Celery message carries survives a suspension, and what follows a task follows a durable one.

The workers are real processes; tests of one broker and pool share one, and each looks only at its own runs.
"""

import importlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from billiard.exceptions import TimeLimitExceeded
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError
from celery.result import AsyncResult

from celery_durable.states import TERMINAL, RunState
from tests import conftest, servers
from tests.acceptance.harness import Project, Worker, wait_until

WAIT = 30
POOLS = ("prefork", "threads", "gevent", "solo")
# The first two are the labs of the longer lists: pytest puts tests together by the place of their parameter.
LABS = [
    pytest.param((broker, pool), id=f"{broker}-{pool}", marks=[pytest.mark.rabbitmq] if broker == "rabbitmq" else [])
    for pool in POOLS
    for broker in ("redis", "rabbitmq")
]


def on(labs: list[Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("lab", labs, indirect=True, scope="module")


everywhere, on_both_brokers, on_redis = on(LABS), on(LABS[:2]), on(LABS[:1])


@dataclass
class Lab:
    """A running worker, and the tasks that it knows as this process sends them."""

    project: Project
    worker: Worker
    tasks: Any
    naps: Any

    @property
    def app(self) -> Celery:
        return self.tasks.app

    def state_of(self, run_id: str) -> RunState:
        return self.app.durable.runs.get(run_id).state

    def moves_of(self, run_id: str) -> list[str]:
        return [entry.what for entry in self.app.durable.runs.history(run_id)]

    def wait_for(self, run_id: str, state: RunState) -> None:
        """Wait until a run is in a state; it may not be stored yet."""

        def is_there() -> bool:
            return any(run.id == run_id for run in self.app.durable.runs.list(state=state))

        wait_until(is_there, timeout=WAIT, what=f"the state {state}", log=self.worker.log)

    def wait_for_line(self, *words: str) -> list[str]:
        """Wait until the ledger has a line that begins with these words; return all of them."""
        what = " ".join(words)
        wait_until(lambda: self.project.lines(*words), timeout=WAIT, what=what, log=self.worker.log)
        return self.project.lines(*words)


def alone(result: AsyncResult) -> AsyncResult:
    """The same result without its parents, whose errors `get` would raise instead of its own."""
    return AsyncResult(result.id, app=result.app)


@contextmanager
def running_lab(directory: Path, store: str, broker: str, backend: str, pool: str = "prefork") -> Iterator[Lab]:
    settings = {"imports": ["tests.acceptance.messages_project"], "durable_inline_delay": 0.1}
    project = Project(directory, store, broker, backend, {"TEST_SETTINGS": json.dumps(settings)})
    naps = project.load().naps
    sys.modules.pop("tests.acceptance.messages_project", None)
    tasks = importlib.import_module("tests.acceptance.messages_project")
    tasks.app.durable.migrate()
    slots = {"prefork": 2, "threads": 4, "gevent": 10, "solo": 1}
    with project.worker("-Q", "celery,side", pool=pool, concurrency=slots[pool]) as worker:
        yield Lab(project, worker, tasks, naps)
    tasks.app.close()


@contextmanager
def a_database() -> Iterator[str]:
    """An empty PostgreSQL database, for as long as a lab lasts."""
    name = f"cd_messages_{secrets.token_hex(6)}"
    yield conftest._create_database(name)
    conftest._drop_database(name)


def a_redis_index(indexes: Iterator[int]) -> str:
    """An empty Redis database."""
    conftest.start("REDIS_URL")
    url = os.environ["REDIS_URL"].rsplit("/", 1)[0] + f"/{next(indexes)}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@contextmanager
def a_vhost() -> Iterator[str]:
    """An empty RabbitMQ virtual host; the whole server if it is not ours."""
    conftest.start("AMQP_URL")
    if "AMQP_URL" not in os.environ:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("RabbitMQ is not installed")
    admin = os.environ.get("AMQP_URL_ADMIN")
    if not admin:
        yield os.environ["AMQP_URL"]
        return
    name = f"messages-{secrets.token_hex(6)}"
    servers.wait_for_rabbitmq(admin)
    servers.create_vhost(admin, name)
    yield os.environ["AMQP_URL"].rstrip("/") + f"/{name}"
    servers.delete_vhost(admin, name)


@pytest.fixture(scope="module")
def lab(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, _redis_indexes: Iterator[int]
) -> Iterator[Lab]:
    """The worker of one broker and pool, with its results in Redis."""
    broker, pool = request.param
    conftest.start("AMQP_URL")  # RabbitMQ takes its 15 seconds to start while the first tests use Redis
    directory = tmp_path_factory.mktemp(f"{broker}-{pool}")
    with ExitStack() as stack:
        store = stack.enter_context(a_database())
        backend = a_redis_index(_redis_indexes)
        url = backend if broker == "redis" else stack.enter_context(a_vhost())
        yield stack.enter_context(running_lab(directory, store, url, backend, pool))


# -- on every broker and pool ----------------------------------------------------------------------------


@everywhere
def test_a_run_that_was_suspended_returns_its_result(lab: Lab) -> None:
    handle = lab.naps.delay(3, count=2, nap=0.3)

    assert handle.get(timeout=WAIT) == 24
    assert lab.moves_of(handle.id).count("suspend") == 2


@everywhere
def test_a_link_fires_with_the_result(lab: Lab) -> None:
    lab.naps.apply_async((3, 1, 0.3), link=lab.tasks.told.s("link"))

    assert lab.wait_for_line("told", "link") == ["told link 12"]


@everywhere
def test_a_chain_of_two_durable_tasks_goes_on_after_each_suspension(lab: Lab) -> None:
    last = chain(lab.naps.s(1, nap=0.3), lab.naps.s(nap=0.3), lab.tasks.told.s("chain")).delay()

    assert last.get(timeout=WAIT) == 16
    assert last.parent.get(timeout=WAIT) == 16
    assert last.parent.parent.get(timeout=WAIT) == 4
    assert lab.project.lines("told", "chain") == ["told chain 16"]


@everywhere
def test_a_chord_waits_for_its_suspended_members(lab: Lab) -> None:
    body = chord(
        [lab.naps.s(1, nap=0.3), lab.naps.s(2, nap=0.6), lab.tasks.plain_add.s(1)], lab.tasks.total.s()
    ).delay()

    assert body.get(timeout=WAIT) == 4 + 8 + 1


@everywhere
def test_an_errback_is_called_with_the_error_of_a_suspended_run(lab: Lab) -> None:
    handle = lab.tasks.breaks.apply_async(link_error=lab.tasks.failed.s(), link=lab.tasks.told.s("never"))

    with pytest.raises(LookupError, match="broken"):
        handle.get(timeout=WAIT)
    assert lab.wait_for_line("failed", handle.id) == [f"failed {handle.id} LookupError broken"]
    assert lab.project.lines("told", "never") == []
    assert lab.state_of(handle.id) is RunState.FAILED


@everywhere
def test_autoretry_waits_in_the_store_and_keeps_what_was_recorded(lab: Lab) -> None:
    handle = lab.tasks.recovers.delay(4, failures=2)

    assert handle.get(timeout=WAIT) == [8, 2]
    assert lab.project.lines("double", handle.id) == [f"double {handle.id} 4"]
    assert lab.moves_of(handle.id).count("back_off") == 2


@everywhere
def test_the_state_of_a_waiting_run_is_retry_with_its_reason(lab: Lab) -> None:
    handle = lab.tasks.long_nap.delay()
    lab.wait_for(handle.id, RunState.WAITING)

    seen = AsyncResult(handle.id, app=lab.app)

    assert seen.state == "RETRY"
    assert "sleeping until" in str(seen.info)
    handle.cancel()


# -- what follows a task ---------------------------------------------------------------------------------


@on_redis
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_chain_goes_on_after_a_suspension(lab: Lab, place: str) -> None:
    plain = lab.tasks.plain_add
    tasks = {
        "first": [lab.naps.s(1, nap=0.3), plain.s(10), plain.s(20)],
        "middle": [plain.s(0, 1), lab.naps.s(nap=0.3), plain.s(30)],
        "last": [plain.s(0, 1), plain.s(0), lab.naps.s(nap=0.3)],
    }[place]

    assert chain(*tasks).delay().get(timeout=WAIT) == (4 if place == "last" else 34)


@on_redis
def test_every_one_of_several_links_fires(lab: Lab) -> None:
    links = [lab.tasks.told.s("left"), lab.tasks.told.s("right"), lab.tasks.told.si(7, "alone")]

    handle = lab.naps.apply_async((3, 1, 0.3), link=links)

    assert lab.wait_for_line("told", "left") == ["told left 12"]
    assert lab.wait_for_line("told", "right") == ["told right 12"]
    assert lab.wait_for_line("told", "alone") == ["told alone 7"]
    (links_of_run,) = AsyncResult(handle.id, app=lab.app).children
    assert sorted(links_of_run.get(timeout=WAIT)) == [7, 12, 12]


@on_redis
def test_callbacks_know_their_parent_and_root_as_after_a_plain_task(lab: Lab) -> None:
    first, second = lab.naps.s(1, nap=0.3), lab.tasks.lineage.s()

    last = chain(lab.tasks.plain_add.s(1, 1), first, second).delay()

    assert last.get(timeout=WAIT) == [last.parent.parent.id, last.parent.id]


@on_redis
def test_a_chain_ends_where_a_run_fails_after_its_suspension(lab: Lab) -> None:
    last = chain(lab.tasks.breaks.s(), lab.tasks.told.s("after a failure")).on_error(lab.tasks.failed.s()).delay()

    with pytest.raises(LookupError, match="broken"):
        last.parent.get(timeout=WAIT)
    assert len(lab.wait_for_line("failed", last.parent.id)) == 1
    assert lab.project.lines("told", "after", "a", "failure") == []


@on_redis
def test_a_group_of_durable_tasks_returns_its_results_in_order(lab: Lab) -> None:
    result = group(lab.naps.s(number, nap=0.6 - number / 10) for number in (1, 2, 3)).delay()

    assert result.get(timeout=WAIT) == [4, 8, 12]


@on_redis
def test_a_group_followed_by_a_durable_task_is_a_chord(lab: Lab) -> None:
    last = (group(lab.naps.s(1, nap=0.3), lab.tasks.plain_add.s(2, 3)) | lab.tasks.total.s()).delay()

    assert last.get(timeout=WAIT) == 9


@on_redis
def test_the_body_of_a_chord_of_plain_tasks_may_suspend(lab: Lab) -> None:
    body = chord([lab.tasks.plain_add.s(1), lab.tasks.plain_add.s(2)], lab.tasks.total.s()).delay()

    assert body.get(timeout=WAIT) == 3
    assert "suspend" in lab.moves_of(body.id)


@on_redis
def test_a_chord_inside_a_chord_waits_for_its_suspended_members(lab: Lab) -> None:
    inner = chord([lab.naps.s(1, nap=0.3), lab.naps.s(2, nap=0.3)], lab.tasks.total.s())

    body = chord([inner, chain(lab.naps.s(3, nap=0.3), lab.tasks.plain_add.s(1))], lab.tasks.total.s()).delay()

    assert body.get(timeout=WAIT) == (4 + 8) + (12 + 1)


@on_redis
def test_a_chord_fails_with_a_member_that_fails_after_its_suspension(lab: Lab) -> None:
    body = chord([lab.tasks.breaks.s(), lab.naps.s(1, nap=0.3)], lab.tasks.told.s("chord of a failure"))

    result = body.apply_async(link_error=lab.tasks.failed.s())

    with pytest.raises(ChordError, match="broken"):
        alone(result).get(timeout=WAIT)
    assert lab.wait_for_line("failed", result.id, "ChordError")
    assert lab.project.lines("told", "chord") == []


# -- Celery's own retry and replace ----------------------------------------------------------------------


@on_redis
@pytest.mark.parametrize("changed", [False, True], ids=["same arguments", "changed arguments"])
def test_a_retry_that_a_body_asks_for_waits_in_the_store(lab: Lab, changed: bool) -> None:
    handle = lab.tasks.asks_again.delay(5, changed=changed)

    assert handle.get(timeout=WAIT) == [10, 5, "second" if changed else "first", 1]
    assert len(lab.project.lines("double", handle.id)) == 1
    assert lab.moves_of(handle.id).count("back_off") == 1


@on_redis
def test_callbacks_survive_a_retry_with_other_arguments(lab: Lab) -> None:
    chain(lab.tasks.asks_again.s(5, changed=True), lab.tasks.told.s("retried")).delay()

    assert lab.wait_for_line("told", "retried") == ['told retried [10, 5, "second", 1]']


@on_redis
def test_a_retry_may_be_sent_in_another_way(lab: Lab) -> None:
    after = lab.tasks.asks_elsewhere.delay().get(timeout=WAIT)

    assert [after["routing_key"], after["priority"], after["timelimit"]] == ["side", 4, [None, 33]]
    assert after["headers"]["trace"] == "second"


@on_redis
def test_an_exhausted_autoretry_ends_with_the_original_error(lab: Lab) -> None:
    handle = lab.tasks.recovers.apply_async((4,), {"failures": 9}, link_error=lab.tasks.failed.s())

    with pytest.raises(Exception, match="after 2") as caught:
        handle.get(timeout=WAIT)
    assert type(caught.value).__name__ == "Unready"
    assert len(lab.project.lines("attempt", handle.id)) == 3
    assert lab.wait_for_line("failed", handle.id) == [f"failed {handle.id} Unready after 2"]
    assert lab.app.durable.runs.get(handle.id).error_code == "exception"


@on_redis
def test_an_exhausted_retry_raises_the_error_it_was_given(lab: Lab) -> None:
    handle = lab.tasks.asks_forever.delay()

    with pytest.raises(Exception, match="still") as caught:
        handle.get(timeout=WAIT)
    assert type(caught.value).__name__ == "Unready"
    assert len(lab.project.lines("attempt", handle.id)) == 2


@on_redis
@pytest.mark.parametrize("durable", [False, True], ids=["plain", "durable"])
def test_a_run_that_replaces_itself_has_the_result_of_the_other_task(lab: Lab, durable: bool) -> None:
    mark = f"replaced-{durable}"

    last = chain(lab.tasks.becomes.s(3, durable), lab.tasks.told.s(mark)).delay()

    expected = 13 if durable else 4
    assert last.get(timeout=WAIT) == expected
    assert last.parent.get(timeout=WAIT) == expected
    assert lab.project.lines("told", mark) == [f"told {mark} {expected}"]


@on_redis
def test_a_plain_task_may_be_replaced_by_a_durable_one(lab: Lab) -> None:
    handle = lab.tasks.plain_becomes.delay(3)

    assert handle.get(timeout=WAIT) == 12


@on_redis
@pytest.mark.parametrize(
    ("word", "end"), [("ignore", RunState.CANCELLED), ("reject", RunState.FAILED)], ids=["ignore", "reject"]
)
def test_a_body_that_raises_a_word_of_celery_is_not_executed_again(lab: Lab, word: str, end: RunState) -> None:
    handle = lab.tasks.gives_up.apply_async((word == "reject",), link_error=lab.tasks.failed.s())

    wait_until(lambda: lab.state_of(handle.id) in TERMINAL, timeout=WAIT, what="the end", log=lab.worker.log)

    assert lab.state_of(handle.id) is end
    assert len(lab.project.lines("gave-up", handle.id)) == 1
    if word == "reject":
        assert len(lab.wait_for_line("failed", handle.id, "Reject")) == 1
        assert handle.state == "FAILURE"


# -- how a run is sent -----------------------------------------------------------------------------------


@on_redis
def test_a_second_submit_under_the_same_id_returns_the_first_result(lab: Lab) -> None:
    given = f"order-{secrets.token_hex(4)}"
    first = lab.naps.apply_async((5, 1, 0.3), task_id=given, link=lab.tasks.told.s("first"))
    second = lab.naps.apply_async((6, 1, 0.3), task_id=given, link=lab.tasks.told.s("second"))
    assert first.get(timeout=WAIT) == second.get(timeout=WAIT) == 20

    third = lab.naps.apply_async((7, 1, 0.3), task_id=given)

    assert third.get(timeout=WAIT) == 20
    assert lab.naps.delay(1, nap=0.3).get(timeout=WAIT) == 4  # whatever the third had sent came before this
    assert len(lab.project.lines("double", given)) == 2
    assert lab.wait_for_line("told", "first") == ["told first 20"]
    assert lab.project.lines("told", "second") == []


@contextmanager
def foreign_app(lab: Lab) -> Iterator[Celery]:
    """An app that knows the names of tasks and nothing of durable ones."""
    app = Celery("foreign", broker=lab.project.broker, backend=lab.project.backend, set_as_current=False)
    yield app
    app.close()


@on_both_brokers
def test_a_task_sent_by_name_becomes_a_run_on_its_first_delivery(lab: Lab) -> None:
    with foreign_app(lab) as foreign:
        sent = foreign.send_task(lab.naps.name, (3,), {"nap": 0.3}, link=lab.tasks.told.s("by name"))

        assert sent.get(timeout=WAIT) == 12
    assert lab.moves_of(sent.id).count("suspend") == 1
    assert lab.wait_for_line("told", "by", "name") == ["told by name 12"]


@on_both_brokers
def test_the_countdown_of_a_foreign_process_delays_the_first_delivery_only(lab: Lab) -> None:
    with foreign_app(lab) as foreign:
        sent = foreign.send_task(lab.tasks.dump.name, countdown=0.5)

        before, after = sent.get(timeout=WAIT)
    assert before["eta"] is not None
    assert after["eta"] is None


@on_redis
@pytest.mark.parametrize("option", ["countdown", "eta"])
def test_a_delayed_run_waits_in_the_store_until_its_time(lab: Lab, option: str) -> None:
    due = datetime.now(UTC) + timedelta(seconds=0.7)
    when: dict[str, Any] = {"countdown": {"countdown": 0.7}, "eta": {"eta": due}}[option]

    handle = lab.naps.apply_async((3, 1, 0.3), **when)

    assert lab.state_of(handle.id) is RunState.DELAYED
    assert handle.get(timeout=WAIT) == 12
    assert lab.app.durable.runs.get(handle.id).started_at >= due - timedelta(seconds=0.05)


@on_both_brokers
def test_expires_limits_the_first_start_and_not_the_run(lab: Lab) -> None:
    handle = lab.naps.apply_async((3, 1, 3), expires=2)

    assert handle.get(timeout=WAIT) == 12


@on_both_brokers
def test_a_run_that_is_not_begun_in_time_expires(lab: Lab) -> None:
    handle = lab.naps.apply_async((3, 1, 0.3), expires=datetime.now(UTC) - timedelta(seconds=1))

    with pytest.raises(TaskRevokedError):
        handle.get(timeout=WAIT)
    assert handle.state == "REVOKED"
    lab.wait_for(handle.id, RunState.EXPIRED)
    assert lab.project.lines("double", handle.id) == []


@on_redis
def test_a_delayed_run_expires_when_its_time_comes_too_late(lab: Lab) -> None:
    handle = lab.naps.apply_async((3, 1, 0.3), countdown=1, expires=0.3)

    with pytest.raises(TaskRevokedError):
        handle.get(timeout=WAIT)
    lab.wait_for(handle.id, RunState.EXPIRED)


@on_redis
@pytest.mark.parametrize("of", ["the call", "the task"])
def test_a_run_whose_result_is_ignored_leaves_no_state_and_calls_back(lab: Lab, of: str) -> None:
    mark = of.replace(" ", "-")
    if of == "the task":
        handle = lab.tasks.silent.apply_async((12,), link=lab.tasks.told.s(mark))
    else:
        handle = lab.naps.apply_async((3, 1, 0.3), ignore_result=True, link=lab.tasks.told.s(mark))
    lab.wait_for(handle.id, RunState.WAITING)
    while_waiting = AsyncResult(handle.id, app=lab.app).state

    assert lab.wait_for_line("told", mark) == [f"told {mark} 12"]

    lab.wait_for(handle.id, RunState.SUCCEEDED)
    assert [while_waiting, AsyncResult(handle.id, app=lab.app).state] == ["PENDING", "PENDING"]


@on_both_brokers
def test_a_compressed_message_can_be_read_after_a_suspension(lab: Lab) -> None:
    text = "long " * 5000

    handle = lab.tasks.dump.apply_async((text,), compression="zlib")

    before, after = handle.get(timeout=WAIT)
    assert before == after
    assert after["compression"] == "application/x-gzip"
    assert after["args"] == [text]


@on_both_brokers
def test_a_suspended_run_goes_on_in_the_queue_it_was_sent_to(lab: Lab) -> None:
    before, after = lab.tasks.dump.apply_async(queue="side").get(timeout=WAIT)

    assert before == after
    assert after["routing_key"] == "side"


# -- what a message carries ------------------------------------------------------------------------------


@on_both_brokers
def test_every_option_of_a_message_survives_a_suspension(lab: Lab) -> None:
    sent = lab.tasks.dump.s("secret", key="hidden")
    sent.stamp(tenant="acme")

    handle = sent.apply_async(
        priority=6,
        headers={"trace": "abc"},
        shadow="shown",
        argsrepr="(***)",
        kwargsrepr="{***}",
        time_limit=50,
        soft_time_limit=40,
        link=lab.tasks.told.s("options"),
        link_error=lab.tasks.failed.s(),
    )

    before, after = handle.get(timeout=WAIT)
    assert before == after
    assert "suspend" in lab.moves_of(handle.id)
    expected = {
        "id": handle.id,
        "root_id": handle.id,
        "parent_id": None,
        "args": ["secret"],
        "kwargs": {"key": "hidden"},
        "priority": 6,
        "shadow": "shown",
        "argsrepr": "(***)",
        "kwargsrepr": "{***}",
        "timelimit": [50, 40],
        "stamps": {"tenant": "acme"},
        "stamped_headers": ["tenant"],
        "correlation_id": handle.id,
        "retries": 0,
    }
    assert {name: after.get(name) for name in expected} == expected
    assert after["reply_to"] == lab.app.thread_oid
    assert after["headers"]["trace"] == "abc"
    assert [link["task"] for link in after["callbacks"]] == [lab.tasks.told.name]
    assert [link["task"] for link in after["errbacks"]] == [lab.tasks.failed.name]


@on_both_brokers
def test_a_member_of_a_chord_in_a_chain_is_the_same_after_a_suspension(lab: Lab) -> None:
    members = group(lab.tasks.dump.s(), lab.tasks.dump.s(), lab.tasks.plain_dump.s())

    body = chain(lab.tasks.plain_add.s(1, 1), members, lab.tasks.told.s("members")).delay()

    first, second, plain = body.get(timeout=WAIT)
    for index, (before, after) in enumerate([first, second]):
        assert before == after
        assert after["group_index"] == index
        assert {name: after[name] for name in ("root_id", "parent_id", "group", "chord", "reply_to")} == {
            name: plain[name] for name in ("root_id", "parent_id", "group", "chord", "reply_to")
        }
    assert plain["chord"] is not None
    assert plain["parent_id"] != plain["id"]


@on_redis
def test_the_rest_of_a_chain_is_the_same_after_a_suspension(lab: Lab) -> None:
    last = chain(lab.tasks.dump.s(), lab.tasks.told.s("rest"), lab.tasks.told.s("end")).delay()

    before, after = last.get(timeout=WAIT)
    assert before == after
    assert [step["task"] for step in after["chain"]] == [lab.tasks.told.name] * 2


# -- limits and revokes ----------------------------------------------------------------------------------


@on_redis
def test_the_soft_time_limit_fails_a_run_as_timed_out(lab: Lab) -> None:
    handle = lab.tasks.busy.apply_async((20,), soft_time_limit=1, link_error=lab.tasks.failed.s())

    with pytest.raises(Exception, match="SoftTimeLimitExceeded"):
        handle.get(timeout=WAIT)
    assert len(lab.wait_for_line("failed", handle.id, "SoftTimeLimitExceeded")) == 1
    assert lab.state_of(handle.id) is RunState.FAILED
    assert lab.app.durable.runs.get(handle.id).error_code == "timeout"


@on_redis
def test_the_hard_time_limit_fails_a_run_as_timed_out(lab: Lab) -> None:
    handle = lab.tasks.busy.apply_async((20,), time_limit=1, link_error=lab.tasks.failed.s())

    with pytest.raises(TimeLimitExceeded):
        handle.get(timeout=WAIT)
    assert lab.wait_for_line("failed", handle.id, "TimeLimitExceeded")
    lab.wait_for(handle.id, RunState.FAILED)
    assert lab.app.durable.runs.get(handle.id).error_code == "timeout"


@on_redis
def test_time_limits_count_each_activation_for_itself(lab: Lab) -> None:
    handle = lab.tasks.half_time.apply_async((0.7,), time_limit=1.2, soft_time_limit=1.1)

    assert handle.get(timeout=WAIT) == "done"


@on_redis
def test_a_waiting_run_that_is_revoked_is_cancelled(lab: Lab) -> None:
    handle = lab.tasks.long_nap.apply_async(link=lab.tasks.told.s("revoked"))
    lab.wait_for(handle.id, RunState.WAITING)

    AsyncResult(handle.id, app=lab.app).revoke()

    with pytest.raises(TaskRevokedError):
        handle.get(timeout=WAIT)
    assert handle.state == "REVOKED"
    lab.wait_for(handle.id, RunState.CANCELLED)
    assert lab.project.lines("told", "revoked") == []


@on_redis
def test_a_chord_is_told_of_a_waiting_member_that_is_revoked(lab: Lab) -> None:
    members = [lab.tasks.long_nap.s(), lab.naps.s(1, nap=0.3)]
    body = chord(members, lab.tasks.told.s("revoked member")).delay()
    member = body.parent.results[0]
    lab.wait_for(member.id, RunState.WAITING)

    AsyncResult(member.id, app=lab.app).revoke()

    with pytest.raises(ChordError):
        alone(body).get(timeout=WAIT)
    lab.wait_for(member.id, RunState.CANCELLED)


@on_redis
def test_a_running_run_that_is_terminated_is_cancelled(lab: Lab) -> None:
    handle = lab.tasks.busy.delay(20, nap=0)
    lab.wait_for(handle.id, RunState.RUNNING)

    AsyncResult(handle.id, app=lab.app).revoke(terminate=True, signal="SIGKILL")

    with pytest.raises(TaskRevokedError):
        handle.get(timeout=WAIT)
    lab.wait_for(handle.id, RunState.CANCELLED)


# -- last, over all that the tests above have started ----------------------------------------------------


@everywhere
def test_no_callback_came_twice(lab: Lab) -> None:
    assert lab.naps.delay(1, nap=0.3).get(timeout=WAIT) == 4  # what was on its way has come before this

    lines = lab.project.lines("told") + lab.project.lines("failed")

    # Celery's main process marks a task that the hard time limit killed as failed twice, also a plain one.
    lines = [line for line in lines if "TimeLimitExceeded(" not in line]
    assert lines
    assert [line for line in lines if lines.count(line) > 1] == []


# -- other result backends -------------------------------------------------------------------------------


@pytest.mark.rabbitmq
def test_results_come_back_over_rpc(tmp_path: Path) -> None:
    with a_database() as store, a_vhost() as url, running_lab(tmp_path, store, url, "rpc://") as lab:
        handles = [lab.naps.delay(number, nap=0.3) for number in (1, 2)]
        broken = lab.tasks.breaks.delay()

        assert [handle.get(timeout=WAIT) for handle in handles] == [4, 8]
        with pytest.raises(LookupError, match="broken"):
            broken.get(timeout=WAIT)


def test_results_are_kept_in_a_database(tmp_path: Path, _redis_indexes: Iterator[int]) -> None:
    with a_database() as store:
        backend = "db+" + store
        with running_lab(tmp_path, store, a_redis_index(_redis_indexes), backend) as lab:
            handle = lab.naps.delay(3, nap=0.3)
            waiting = lab.tasks.long_nap.delay()
            lab.wait_for(waiting.id, RunState.WAITING)

            assert AsyncResult(waiting.id, app=lab.app).state == "RETRY"
            assert handle.get(timeout=WAIT) == 12
            assert chain(lab.naps.s(1, nap=0.3), lab.naps.s(nap=0.3)).delay().get(timeout=WAIT) == 16
            waiting.revoke()
            with pytest.raises(TaskRevokedError):
                waiting.get(timeout=WAIT)
