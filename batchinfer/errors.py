"""Exception tree: every error that users can cause or see, with its exit code.

BatchInferError
├── UserError                 the user's mistake: retrying changes nothing
│   ├── UsageError        64  a flag or an argument of a command
│   ├── InputError        65  the input's content: schema drift, a file that changed since it was planned
│   ├── InputMissing      66  a path, glob or bucket that does not exist or matches nothing
│   ├── ModelError        69  a model or tokenizer that cannot be loaded: missing files, unknown architecture
│   ├── OutputConflict    73  an output that belongs to another job or holds files that are not a job's
│   ├── AccessDenied      77  credentials that the store refuses
│   └── SpecError         78  the job file: file, line and key
├── InfrastructureError   75  a failure of machine or store: run the same command again
│   ├── StorageError          the store does not respond, or responds wrongly, after all retries
│   ├── SpoolError            the local spool directory cannot be written (disk full)
│   ├── EngineError           the engine failed on several steps in a row, or its device is lost
│   └── OutOfDeviceMemory     a step does not fit the device's memory: the engine redoes it in smaller steps
├── VerifyFailed           1  `batchinfer verify` found a difference
├── TooManyRowErrors      10  more row errors than `errors.max` allows; without it, every row failed
├── Drained               33  stopped by a signal before all rows were done: run the same command again
└── RowError                  ends one row, never a job; the output's error_type column holds its `kind`
    ├── InvalidInput          the row's data: malformed JSON, null or wrongly typed cell, empty prompt
    ├── TemplateError         the prompt or chat template failed on this row
    ├── TooLong               the prompt exceeds the context length or the KV cache
    ├── BadParameters         an invalid sampling parameter of this row
    ├── EngineFailure         the engine failed while this row ran (retryable)
    ├── DeadlineExceeded      the row's deadline passed (retryable)
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
_MAX_VALUE_CHARACTERS = 60


class BatchInferError(Exception):
    """Root of the tree. `exit_code` is the exit code of the command line."""

    exit_code = 70

    @property
    def name(self) -> str:
        """Return the class's name in the tree.

        A subclass that is defined elsewhere has the name of its nearest ancestor in the tree.
        """
        return next(kind.__name__ for kind in type(self).__mro__ if kind.__module__ == __name__)


class UserError(BatchInferError):
    """A mistake of the user. The message names what is wrong, where, and what to do.

    `key` is the dotted key of the job file that the error is about, if any; the command line adds file and line.
    """

    exit_code = 64

    def __init__(self, message: str, *, key: str = "") -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


class UsageError(UserError):
    """Wrong flag or argument of a command."""

    exit_code = 64


class InputError(UserError):
    """Unusable content of the input: schema drift, or a file that changed since the job was planned."""

    exit_code = 65


class InputMissing(UserError):
    """Path, glob or bucket that does not exist or matches nothing."""

    exit_code = 66


class ModelError(UserError):
    """Model or tokenizer that cannot be loaded: missing files, unknown architecture."""

    exit_code = 69


class OutputConflict(UserError):
    """Output that belongs to another job or holds files that are not a job's."""

    exit_code = 73


class AccessDenied(UserError):
    """Credentials that the object store refuses."""

    exit_code = 77


class SpecError(UserError):
    """Invalid job file. The message names file, line and key."""

    exit_code = 78


class InfrastructureError(BatchInferError):
    """Failure of the machine or the store: retrying the same command is safe, and nothing committed is lost."""

    exit_code = 75


class StorageError(InfrastructureError):
    """Object store that does not respond, or responds wrongly, after all retries."""


class SpoolError(InfrastructureError):
    """Local spool directory that cannot be written, as when the disk is full."""


class EngineError(InfrastructureError):
    """Engine that failed on several steps in a row, or whose device is lost."""


class OutOfDeviceMemory(InfrastructureError):
    """Step that does not fit the device's memory. The engine redoes it in smaller steps."""


class VerifyFailed(BatchInferError):
    """Difference found by `batchinfer verify`."""

    exit_code = 1


class TooManyRowErrors(BatchInferError):
    """More row errors than `errors.max` allows; without `errors.max`, a job in which every row failed."""

    exit_code = EXIT_ROW_ERRORS


class Drained(BatchInferError):
    """Job stopped by a signal before all rows were done: run the same command again."""

    exit_code = EXIT_DRAINED


class RowError(BatchInferError):
    """Error that ends one row, never the job. `kind` and `retryable` belong to the type, never to the message.

    `param` is the field of a request body that is wrong, if the error is about one.
    """

    kind = "engine"
    retryable = False

    def __init__(self, message: str = "", *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidInput(RowError):
    """Invalid data in the row: malformed JSON, a null or wrongly typed cell, an empty prompt."""

    kind = "invalid_input"


class TemplateError(RowError):
    """Prompt template or chat template that failed on the row."""

    kind = "template"


class TooLong(RowError):
    """Prompt that exceeds the context length or the KV cache."""

    kind = "too_long"


class BadParameters(RowError):
    """Invalid sampling parameter of the row."""

    kind = "bad_parameters"


class EngineFailure(RowError):
    """Engine failure while the row ran."""

    kind = "engine"
    retryable = True


class DeadlineExceeded(RowError):
    """Deadline of the row that passed before it finished."""

    kind = "deadline"
    retryable = True


class Cancelled(RowError):
    """Row of a batch that was cancelled before the row ran."""

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
    """Return `"; did you mean 'x'?"` for the nearest known name, or an empty string.

    Names are compared as `normalize_name` writes them.
    """
    names = {normalize_name(other): other for other in known}
    target = normalize_name(name)
    near = [target] if target in names else difflib.get_close_matches(target, names, n=1, cutoff=0.6)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


def normalize_name(name: str) -> str:
    """Return a name without case and punctuation: `maxTokens`, `max-tokens` and `max_tokens` become `maxtokens`."""
    return "".join(char for char in name.casefold() if char.isalnum())


def format_value(value: Any) -> str:
    """Return a value as YAML and JSON write it, for use in a message; cut long values, name the type of containers."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else f"{text[:_MAX_VALUE_CHARACTERS]}…"


def shell_command(verb: str, output: str, *options: str) -> str:
    """Return the `batchinfer` command line for an output, quoted for a shell."""
    return shlex.join(["batchinfer", verb, f"./{output}" if output.startswith("-") else output, *options])
