"""Every error that a user can cause, or must be told of, and the exit code that each one means.

BatchInferError
├── UserError                 the user's mistake: retrying changes nothing
│   ├── UsageError        64  a flag or an argument of a command
│   ├── InputError        65  the input's content: schema drift, a file that changed since it was planned
│   ├── InputMissing      66  a path, glob or bucket that is not there or holds nothing
│   ├── ModelError        69  a model or tokenizer that cannot be used: missing files, unknown architecture
│   ├── OutputConflict    73  an output that belongs to another job, or holds what is not a job's
│   ├── AccessDenied      77  credentials that the store refuses
│   └── SpecError         78  the job file: file, line and key
├── InfrastructureError   75  not the user's and not the row's: run the same command again
│   ├── StorageError          the store does not answer, or answers wrongly, after all retries
│   ├── SpoolError            the local spool directory cannot be written (disk full)
│   └── EngineError           the engine failed on several steps in a row
├── VerifyFailed           1  an audit found a difference
├── TooManyRowErrors      10  more row errors than `errors.max` allows; without it, nothing but row errors
├── Drained               33  stopped by a signal with work left: run the same command again
└── RowError                  ends one row, never a job; `kind` is what the output's error_type column holds
    ├── InvalidInput          the row's data: malformed JSON, null or wrongly typed cell, empty prompt
    ├── TemplateError         the prompt or chat template failed on this row
    ├── TooLong               the prompt does not fit the context or the KV cache
    ├── BadParameters         a sampling value of this row
    ├── EngineFailure         the engine failed while this row ran (retryable)
    ├── DeadlineExceeded      the row's time was up (retryable)
    └── Cancelled             its batch was cancelled before it ran (retryable)
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

EXIT_OK = 0
EXIT_ROW_ERRORS = 10
EXIT_DRAINED = 33
_SHOWN = 60  # characters of a value


class BatchInferError(Exception):
    """Root of the tree; `exit_code` is what the command line ends with."""

    exit_code = 70

    @property
    def name(self) -> str:
        """The name that the tree has for it: that of the nearest type above, for a type that lives elsewhere."""
        return next(kind.__name__ for kind in type(self).__mro__ if kind.__module__ == __name__)


class UserError(BatchInferError):
    """The user's mistake; the message names what is wrong, where, and what to do.

    `key` is the dotted key of the job file that it is about, if there is one: the command line adds file and line.
    """

    exit_code = 64

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


class UsageError(UserError):
    exit_code = 64


class InputError(UserError):
    exit_code = 65


class InputMissing(UserError):
    exit_code = 66


class ModelError(UserError):
    exit_code = 69


class OutputConflict(UserError):
    exit_code = 73


class AccessDenied(UserError):
    exit_code = 77


class SpecError(UserError):
    exit_code = 78


class InfrastructureError(BatchInferError):
    """Retry the same command: nothing that was committed is lost."""

    exit_code = 75


class StorageError(InfrastructureError):
    pass


class SpoolError(InfrastructureError):
    pass


class EngineError(InfrastructureError):
    pass


class VerifyFailed(BatchInferError):
    exit_code = 1


class TooManyRowErrors(BatchInferError):
    exit_code = EXIT_ROW_ERRORS


class Drained(BatchInferError):
    exit_code = EXIT_DRAINED


class RowError(BatchInferError):
    """Ends one row. `kind` and `retryable` belong to the type, never to the message.

    `param`: the field of a request's body that is wrong, if it is one.
    """

    kind = "engine"
    retryable = False

    def __init__(self, message: str = "", *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidInput(RowError):
    kind = "invalid_input"


class TemplateError(RowError):
    kind = "template"


class TooLong(RowError):
    kind = "too_long"


class BadParameters(RowError):
    kind = "bad_parameters"


class EngineFailure(RowError):
    kind = "engine"
    retryable = True


class DeadlineExceeded(RowError):
    kind = "deadline"
    retryable = True


class Cancelled(RowError):
    kind = "cancelled"
    retryable = True


ROW_ERRORS: tuple[type[RowError], ...] = (
    InvalidInput,
    TemplateError,
    TooLong,
    BadParameters,
    EngineFailure,
    DeadlineExceeded,
    Cancelled,
)
RETRYABLE_KINDS = frozenset(error.kind for error in ROW_ERRORS if error.retryable)


def suggest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or an empty string. See `plain`."""
    names = {plain(other): other for other in known}
    wanted = plain(name)
    near = [wanted] if wanted in names else difflib.get_close_matches(wanted, names, n=1, cutoff=0.6)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def plain(name: str) -> str:
    """A name without case and without what is neither letter nor digit: `maxTokens`, `max-tokens`, `max_tokens`."""
    return "".join(char for char in name.casefold() if char.isalnum())


def shown(value: Any) -> str:
    """A value in a message, as YAML and JSON write it; of what is long, what it is."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def command(verb: str, output: str, *options: str) -> str:
    """What to type about an output, as a shell takes it."""
    return shlex.join(["batchinfer", verb, f"./{output}" if output.startswith("-") else output, *options])
