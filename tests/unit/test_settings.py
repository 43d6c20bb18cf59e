"""Settings are read from three places, and a wrong one is refused with the nearest name."""

from datetime import timedelta
from typing import Any

import pytest
from celery import Celery

from celery_durable import Durable, RetryPolicy
from celery_durable.errors import SettingsError
from celery_durable.settings import Settings


def read(configuration: dict[str, Any] | None = None, **overrides: Any) -> Settings:
    return Settings.read(configuration or {}, overrides)


def test_what_is_not_set_has_its_default() -> None:
    settings = read()

    assert settings.store_url == "sqlite:///durable.db"
    assert (settings.lease, settings.sweep_interval) == (timedelta(seconds=15), timedelta(seconds=5))
    assert settings.inline_delay == timedelta(seconds=1)
    assert settings.retry == RetryPolicy(max_attempts=3, factor=2, min_delay=1, max_delay=60, jitter=True)
    assert (settings.on_divergence, settings.max_payload, settings.max_crashes) == ("warn", 1024 * 1024, 5)


@pytest.mark.parametrize("value", [30, 30.0, timedelta(seconds=30)])
def test_lengths_are_seconds_or_timedeltas(value: Any) -> None:
    assert read({"durable_lease": value}).lease == timedelta(seconds=30)


def test_a_keyword_wins_over_the_configuration() -> None:
    assert read({"durable_lease": 30}, lease=40).lease == timedelta(seconds=40)


def test_settings_of_others_are_left_alone() -> None:
    assert read({"broker_url": "memory://", "task_always_eager": True}) == read()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("leese", "lease"), ("sweep", "sweep_interval"), ("store", "store_url"), ("maxpayload", "max_payload")],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, nearest: str) -> None:
    sentence = f"unknown setting durable_{name}, did you mean durable_{nearest}?"

    for wrong in ({"configuration": {f"durable_{name}": 1}}, {name: 1}):
        with pytest.raises(SettingsError) as caught:
            read(**wrong)  # type: ignore[arg-type]
        assert str(caught.value) == sentence


def test_a_name_like_no_other_is_refused_with_all_that_are_known() -> None:
    with pytest.raises(SettingsError, match=r"unknown setting durable_xyzzy; known are .*lease, "):
        read(xyzzy=1)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("lease", 0, "setting durable_lease: "),
        ("lease", -5, "setting durable_lease: "),
        ("lease", "soon", "setting durable_lease: "),
        ("sweep_interval", 0, "setting durable_sweep_interval: "),
        ("inline_delay", -1, "setting durable_inline_delay: "),
        ("on_divergence", "explode", "setting durable_on_divergence: .*'ignore', 'warn' or 'fail', got: 'explode'"),
        ("max_payload", 0, "setting durable_max_payload: "),
        ("max_crashes", 0, "setting durable_max_crashes: "),
        ("retry", 3, "setting durable_retry: "),
    ],
)
def test_a_value_that_has_no_use_is_refused_with_its_name(name: str, value: Any, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence) as caught:
        read(**{name: value})

    assert "\n" not in str(caught.value)


def test_a_wrong_store_url_does_not_show_its_password() -> None:
    app = Celery("secret", broker="memory://", set_as_current=False)

    with pytest.raises(SettingsError) as caught:
        Durable(app, store_url="mysql://user:hunter2@db/shop").settings  # noqa: B018

    assert "hunter2" not in str(caught.value)


def test_the_password_of_the_store_is_not_printed_with_the_configuration() -> None:
    app = Celery("secret", broker="memory://", set_as_current=False)
    app.conf.durable_store_url = "postgresql://user:hunter2@127.0.0.1:1/shop"
    durable = Durable(app)

    assert durable.runtime.database.url.password == "hunter2"
    assert "hunter2" not in app.conf.humanize(with_defaults=False)
    assert "hunter2" not in app.bugreport()


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read().lease = timedelta(1)  # type: ignore[misc]
