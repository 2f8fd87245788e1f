"""Tests of folders without permission and of permanent disk errors: user errors, not outages."""

import errno
import os

import pytest

from batchinfer.errors import AccessDenied, StorageError, UsageError
from batchinfer.io import filesystem
from batchinfer.io.discover import find_files
from batchinfer.io.source import Sources
from batchinfer.io.storage import Store, check_names
from batchinfer.spec import InputSpec, StorageSpec


@pytest.fixture
def closed(tmp_path):
    """Create a folder without permission, with `in.jsonl` in it."""
    folder = tmp_path / "closed"
    folder.mkdir()
    (folder / "in.jsonl").write_text('{"text": "a"}\n')
    folder.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o700)


@pytest.mark.parametrize("name", ["in.jsonl", "nothing.jsonl", "*.jsonl", "**/a?.jsonl", ""])
def test_unreadable_folder_is_access_denied_not_missing(closed, name):
    with pytest.raises(AccessDenied, match=r"closed.*Permission denied; check its permissions"):
        find_files(InputSpec(path=(str(closed / name),)), Sources(StorageSpec()))


def test_output_in_unreadable_folder_is_refused(closed):
    with pytest.raises(AccessDenied, match="Permission denied; check its permissions"):
        check_names(str(closed / "out"), ["parts"], ["plan.json"])
    with pytest.raises(AccessDenied, match="Permission denied; check its permissions"):
        Store.open(str(closed / "out"), StorageSpec()).put("a", b"x")


def test_permanent_disk_error_is_a_user_error(tmp_path):
    long = str(tmp_path / ("x" * 300))
    with pytest.raises(UsageError, match="File name too long; use a shorter one"):
        check_names(long, ["parts"], ["plan.json"])
    with pytest.raises(UsageError, match="File name too long; use a shorter one"):
        Store.open(long, StorageSpec()).read("a")
    error = OSError(errno.EROFS, "Read-only file system", "out/a")
    assert isinstance(filesystem.translate(error, "out/a"), AccessDenied)
    assert isinstance(filesystem.translate(OSError(errno.EIO, "Input/output error", "a"), "a"), StorageError)
