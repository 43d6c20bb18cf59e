"""Everything this package raises.

    DurableError
    ├── Abort               never retried
    ├── WaitTimeout         a wait ran out of time
    ├── RunFailed           a run that was waited for failed
    ├── RunCancelled        this run, or one that was waited for, was cancelled
    ├── DivergenceError     the code took another path than the record
    ├── PayloadError        a value cannot be stored, or does not fit its type
    ├── ConflictError       one name or key stands for two things
    ├── UsageError          a call that cannot mean anything
    ├── SettingsError       a setting is unknown or has no use
    ├── SchemaError         the store's tables do not fit this release
    ├── StoreUnavailable    the store does not answer
    └── CrashLoopError      the run's workers died again and again

Errors cross process boundaries inside Celery, so each passes all its arguments to
`Exception.__init__` and survives pickling.
"""


class DurableError(Exception):
    """Base of all errors of this package."""

    #: What a run that ends with this error carries as `error_code`.
    code = "exception"
    #: Whether another attempt could end differently.
    retryable = False


class Abort(DurableError):
    """Raised by user code to end the run as failed, whatever the retry policy says."""

    code = "abort"


class WaitTimeout(DurableError, TimeoutError):
    """Raised when a wait ran out of time and has no default."""

    code = "timeout"
    retryable = True


class RunFailed(DurableError):
    """Raised when a run or a recorded step failed with an error whose class is not at hand.

    Args:
        type_name: the qualified name of the original class.
        message: the text of the original error.
    """

    retryable = True

    def __init__(self, type_name: str, message: str = "") -> None:
        super().__init__(type_name, message)
        self.type_name = type_name
        self.message = message

    def __str__(self) -> str:
        return f"{self.type_name}: {self.message}" if self.message else self.type_name


class RunCancelled(DurableError):
    """Raised in a body whose run was cancelled, at its next step, and by those who wait for the run."""


class DivergenceError(DurableError):
    """Raised when the code and the record of a run differ and the policy is to fail."""

    code = "divergence"


class PayloadError(DurableError, ValueError):
    """Raised when a value cannot be stored, or does not fit its declared type."""

    code = "payload"


class ConflictError(DurableError):
    """Raised when one name or key is used for two different things."""


class UsageError(DurableError, ValueError):
    """Raised when a call cannot mean anything: a negative sleep, a wait outside a durable task."""


class SettingsError(DurableError, ValueError):
    """Raised when a setting is unknown or its value has no use."""


class SchemaError(DurableError):
    """Raised when the tables of the store are older or newer than this release."""


class StoreUnavailable(DurableError):
    """Raised when the store does not answer; nothing was changed, or the change can be repeated."""

    retryable = True


class CrashLoopError(DurableError):
    """What a run ends with whose workers died again and again without a new record."""

    code = "crash_loop"


class Waiting(Exception):
    """What Celery shows as the reason of the state RETRY while a run waits; nobody raises it."""
