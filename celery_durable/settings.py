"""Every `durable_*` setting, in one frozen model.

A name that is not here is refused, with the nearest one that is.
"""

import difflib
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from celery_durable.errors import SettingsError
from celery_durable.retry import RetryPolicy

PREFIX = "durable_"


def _positive(value: timedelta) -> timedelta:
    if value <= timedelta():
        raise ValueError(f"expected more than 0 seconds, got: {value.total_seconds():g}")
    return value


def _not_negative(value: timedelta) -> timedelta:
    if value < timedelta():
        raise ValueError(f"expected 0 seconds or more, got: {value.total_seconds():g}")
    return value


Length = Annotated[timedelta, AfterValidator(_positive)]


class Settings(BaseModel):
    """The settings of one app; on `app.conf` each name has the prefix `durable_`. Lengths are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, validate_default=True)

    #: Where runs are stored: an SQLAlchemy URL for PostgreSQL or SQLite.
    store_url: str = "sqlite:///durable.db"
    #: The PostgreSQL schema of the tables; None is the first of the search path.
    schema_name: str | None = Field(default=None, alias="schema")
    #: How long a worker that went silent keeps its runs.
    lease: Length = timedelta(seconds=15)
    #: How often the store is looked at for what is due.
    sweep_interval: Length = timedelta(seconds=5)
    #: Delays shorter than this are slept in the worker, longer ones suspend.
    inline_delay: Annotated[timedelta, AfterValidator(_not_negative)] = timedelta(seconds=1)
    #: A start that is nearer than this rides on the broker's own countdown as well; never on RabbitMQ.
    eta_horizon: Annotated[timedelta, AfterValidator(_not_negative)] = timedelta(seconds=5)
    #: The retry policy of runs whose task names none.
    retry: RetryPolicy = RetryPolicy()
    #: What happens when code and record differ.
    on_divergence: Literal["ignore", "warn", "fail"] = "warn"
    #: The version of the code; None means a fingerprint of the task's function.
    version: str | None = None
    #: The largest input, output or result that is stored, in bytes.
    max_payload: int = Field(default=1024 * 1024, gt=0)
    #: How many recoveries without a new record end a run as `crash_loop`.
    max_crashes: int = Field(default=5, gt=0)
    #: How long an idempotency key stays taken.
    idempotency_ttl: Length = timedelta(days=30)
    #: How long a run is kept after its start, once it has ended and its outcome is delivered.
    retention: Length = timedelta(days=30)

    @classmethod
    def read(cls, configuration: Mapping[str, Any], overrides: Mapping[str, Any]) -> Self:
        """Build the settings from an app's configuration and the keywords given to `Durable`.

        Raises:
            SettingsError: for an unknown name or a value that does not fit.
        """
        found = {key.removeprefix(PREFIX): configuration[key] for key in configuration if key.startswith(PREFIX)}
        given = {**found, **overrides}
        for name in given:
            if name not in _NAMES:
                raise SettingsError(_unknown(name))
        try:
            return cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(part) for part in first["loc"])
            raise SettingsError(f"setting {PREFIX}{name}: {first['msg']}, got: {first['input']!r}") from None


_NAMES = frozenset(field.alias or name for name, field in Settings.model_fields.items())


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.5)
    hint = f", did you mean {PREFIX}{near[0]}?" if near else f"; known are {', '.join(sorted(_NAMES))}"
    return f"unknown setting {PREFIX}{name}{hint}"
