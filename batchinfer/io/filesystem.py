"""Mapping of URLs to filesystems, with bounded retries and typed errors for every call to a store.

Local paths never go through fsspec: `local_path` decides which URLs are local. All other URLs use an fsspec filesystem
without instance or listing caches, so that objects just written by another worker are visible.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import re
import time
from collections.abc import Callable
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from batchinfer.errors import (
    AccessDenied,
    BatchInferError,
    InputMissing,
    SpecError,
    StorageError,
    UsageError,
    UserError,
)
from batchinfer.log import log
from batchinfer.spec import StorageSpec

T = TypeVar("T")

RETRY_S = 60.0
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20

# the package that implements each protocol for fsspec
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "abfss", "az"), "adlfs"),
}
_S3 = ("s3", "s3a")
_ESCAPED = re.compile("%(?:2A|3F|5B)", re.IGNORECASE)  # the characters of a glob

# by name, so that no optional package is imported for its error classes
_TRANSIENT = frozenset(
    {
        "builtins.ConnectionError",
        "builtins.TimeoutError",
        "botocore.exceptions.ConnectionError",
        "botocore.exceptions.HTTPClientError",
        "botocore.exceptions.IncompleteReadError",
        "botocore.parsers.ResponseParserError",
        "aiohttp.client_exceptions.ClientError",
        "urllib3.exceptions.HTTPError",
        "requests.exceptions.ConnectionError",
        "requests.exceptions.Timeout",
        "azure.core.exceptions.ServiceRequestError",
        "azure.core.exceptions.ServiceResponseError",
    }
)
_NO_CREDENTIALS = frozenset(
    {
        "botocore.exceptions.NoCredentialsError",
        "botocore.exceptions.PartialCredentialsError",
        "botocore.exceptions.CredentialRetrievalError",
        "botocore.exceptions.TokenRetrievalError",
        "botocore.exceptions.ProfileNotFound",
        "google.auth.exceptions.DefaultCredentialsError",
        "azure.core.exceptions.ClientAuthenticationError",
    }
)
_MISCONFIGURED = frozenset(
    {
        "builtins.ValueError",
        "botocore.exceptions.ParamValidationError",
        "botocore.exceptions.NoRegionError",
        "botocore.exceptions.BaseEndpointResolverError",
    }
)
_PERMISSIONS = (AccessDenied, "check its permissions and those of the folders above it")
# permanent errors of local filesystems, with advice
_REFUSED: dict[int | None, tuple[type[UserError], str]] = {
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: (AccessDenied, "use another place"),
    errno.ENAMETOOLONG: (UsageError, "use a shorter one"),
    errno.ELOOP: (UsageError, "a link leads back to itself"),
}
_TRANSIENT_STATUS = frozenset({408, 409, 425, 429})
_TRANSIENT_CODES = frozenset({"SlowDown", "RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"})


def protocol_of(url: str) -> str:
    """Return the protocol of a URL: `"s3"` for `"s3://bucket/key"`, `"file"` for a plain path."""
    scheme, separator, _ = url.partition("://")
    return scheme.lower() if separator else "file"


def local_path(url: str) -> Path | None:
    """Return the path of a plain path or a file: URL; None for every other URL.

    URLs are percent-decoded (RFC 8089: `file:///a%20b`, `file://localhost/a`, `file:/a`); plain paths are not.
    """
    path = _local(url)
    return None if path is None else Path(path)


def local_pattern(url: str) -> str | None:
    """Return the path as a glob, in which percent-encoded characters of a URL are literal."""
    return _local(_ESCAPED.sub(lambda match: f"[{match[0]}]", url) if is_file_url(url) else url)


def file_url(path: str) -> str:
    """Return the file: URL that `local_path` converts back to this path, whatever its characters."""
    return f"file://{quote(os.fsencode(os.path.abspath(path)))}"  # noqa: PTH100 - Path would not keep the bytes


def is_file_url(url: str) -> bool:
    """Return True if the URL is a file: URL and thus percent-encoded."""
    return url[:6].lower() == "file:/"


def _local(url: str) -> str | None:
    if protocol_of(url) not in ("file", "local"):
        return None
    path = url.partition("://")[2] if "://" in url else url.partition(":")[2] if is_file_url(url) else url
    if is_file_url(url):
        host, slash, rest = path.partition("/")
        path = unquote(f"/{rest}" if slash and host.lower() == "localhost" else path, errors="surrogateescape")
    if "\0" in path:
        raise UsageError(f"{url!r}: a path cannot contain a NUL character")
    return os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser raises for "~a.jsonl", a valid name


def connect(url: str, options: StorageSpec) -> Any:
    """Return a fresh fsspec filesystem for a URL that is not local.

    Raises SpecError for an unknown protocol or invalid options, UserError if a package is not installed.
    """
    import fsspec

    protocol = protocol_of(url)
    fresh = {"skip_instance_cache": True, "use_listings_cache": False}
    try:
        arguments = _s3_arguments(options) if protocol in _S3 else _other_arguments(options)
        for name, value in options.options.items():
            ours = arguments.get(name)
            arguments[name] = {**ours, **value} if isinstance(ours, dict) and isinstance(value, dict) else value
        filesystem = fsspec.filesystem(protocol, **{**fresh, **arguments})
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        hint = f"pip install {package}" if package else str(error)
        raise UserError(f"{url}: {protocol}:// needs a package that is not installed: {hint}") from None
    except (ValueError, TypeError, KeyError) as error:
        raise SpecError(f"{url}: cannot be reached with these storage options: {error}") from None
    if protocol in _S3:
        # each request is tried twice, so that one lost part does not repeat a whole upload; Retry repeats the operation
        filesystem.retries = 2
    return filesystem


def _s3_arguments(options: StorageSpec) -> dict[str, Any]:
    # botocore's own retries, inside the two loops around it, would multiply the time until we give up
    config = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        "retries": {"total_max_attempts": 1},
    }
    arguments = {
        "endpoint_url": options.endpoint,
        "anon": options.anonymous,
        "requester_pays": options.requester_pays,
        "client_kwargs": {"region_name": options.region} if options.region else {},
        "config_kwargs": config,
    }
    if not {"session", "profile"} & options.options.keys():
        from s3fs.core import aiobotocore

        arguments["session"] = session = aiobotocore.session.AioSession()
        session.register_component("data_loader", _service_models())
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_timestamp)
    return arguments


@functools.cache
def _service_models() -> Any:
    """Return a process-wide loader of botocore's S3 description (without keys).

    Without sharing, loading takes 0.3 s of every new client.
    """
    from botocore.loaders import create_loader

    return create_loader()


def _timestamp(value: Any) -> Any:
    """Parse a time as botocore does, but try the formats of listings and headers first.

    Botocore's own parser takes most of the time of a listing page.
    """
    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            return parse(value)
        except (TypeError, ValueError, AttributeError):
            continue
    from botocore.utils import parse_timestamp

    return parse_timestamp(value)


def _other_arguments(options: StorageSpec) -> dict[str, Any]:
    s3_only = [name for name in ("endpoint", "region", "requester_pays") if getattr(options, name)]
    if s3_only:
        raise SpecError("goes with s3:// URLs; use storage.options for other filesystems", key=f"storage.{s3_only[0]}")
    return {"anon": True} if options.anonymous else {}


class Retry:
    """Retry policy for transient errors: jittered exponential backoff, for at most `total_s` seconds per call."""

    def __init__(self, place: str, total_s: float | None = None) -> None:
        self.place = place  # appended to messages: which endpoint
        self.total_s = RETRY_S if total_s is None else total_s

    def __call__(self, url: str, action: Callable[[], T], passes: tuple[type[Exception], ...] = ()) -> T:
        """Return the result of `action`. Errors in `passes` are raised unchanged, all others translated.

        Raises AccessDenied, InputMissing, SpecError, or StorageError (at once, or after all retries).
        """
        give_up = time.monotonic() + self.total_s
        attempt = 0
        while True:
            try:
                return action()
            except passes:
                raise
            except BatchInferError:
                raise
            except Exception as error:
                attempt += 1
                wait_s = min(0.05 * 2**attempt, 8.0) * random.uniform(0.5, 1.0)
                if not transient(error) or time.monotonic() + wait_s > give_up:
                    raise translate(error, url, self.place, attempt) from error
                if attempt >= 5:
                    log.warning("storage does not respond, retrying", url=url, error=_text(error), attempt=attempt)
            time.sleep(wait_s)


def _names(error: BaseException) -> set[str]:
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}


def _response(error: BaseException) -> tuple[int | None, str]:
    """Return the HTTP status and the store's error code, from the attribute that the client library uses."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, str(response.get("Error", {}).get("Code", ""))
        for name in ("status_code", "status", "code"):  # azure, aiohttp, gcsfs
            status = getattr(candidate, name, None)
            if isinstance(status, int) or (isinstance(status, str) and status.isdigit()):
                return int(status), str(getattr(candidate, "error_code", ""))
    return None, ""


def transient(error: BaseException) -> bool:
    """Return True if the same call may succeed later."""
    status, code = _response(error)
    if status is not None and (status >= 500 or status in _TRANSIENT_STATUS):
        return status != 501
    return code in _TRANSIENT_CODES or bool(_names(error) & _TRANSIENT)


def already_exists(error: BaseException) -> bool:
    """Return True if a conditional write was refused because the object exists."""
    return isinstance(error, FileExistsError) or _response(error)[0] == 412


def bucket_missing(error: BaseException) -> bool:
    return _response(error)[1] in ("NoSuchBucket", "ContainerNotFound")


def translate(error: BaseException, url: str, place: str = "", attempts: int = 1) -> BatchInferError:
    """Convert the error of a failed call to one of ours; `place` names the endpoint."""
    status, code = _response(error)
    names = _names(error)
    where = f"{url}{place}"
    if names & _NO_CREDENTIALS:
        return AccessDenied(
            f"{where}: no usable credentials ({_text(error)}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a "
            "profile, or storage.anonymous: true for a public bucket"
        )
    if isinstance(error, OSError) and error.filename is not None and error.errno in _REFUSED:
        kind, advice = _REFUSED[error.errno]
        return kind(f"{where}: {error.strerror}; {advice}")
    if isinstance(error, PermissionError) or status in (401, 403):
        return AccessDenied(
            f"{where}: access denied: {_text(error)}; check key, secret, region and the bucket's policy"
        )
    if code in ("NoSuchBucket", "NoSuchContainer") or (status == 404 and not code):
        return InputMissing(f"{where}: the bucket does not exist, or is not at this endpoint")
    if isinstance(error, FileNotFoundError):
        return InputMissing(f"{where}: not found")
    if isinstance(error, NotADirectoryError | IsADirectoryError):
        return UsageError(f"{where}: {error.strerror}")
    if status in (301, 307) or code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        return SpecError(f"{where}: {_text(error)}; set storage.region to the region of the bucket")
    if names & _MISCONFIGURED and not isinstance(error, UnicodeError):
        return SpecError(f"{where}: {_text(error)}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return StorageError(f"{where}: no space left on the device")
    tries = f" (after {attempts} attempts)" if attempts > 1 else ""
    return StorageError(f"{where}: {_text(error)}{tries}")


def _text(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
