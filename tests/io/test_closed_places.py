"""Places that this process may not look into, and what a disk refuses for good: told as that, and no outage."""

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
    """A folder that this process may not look into, with `in.jsonl` in it."""
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
def test_a_closed_folder_is_told_from_an_empty_one(closed, name):
    with pytest.raises(AccessDenied, match=r"closed.*Permission denied; check the permissions"):
        find_files(InputSpec(path=(str(closed / name),)), Sources(StorageSpec()))


def test_an_output_in_a_closed_folder_is_refused(closed):
    with pytest.raises(AccessDenied, match="Permission denied; check the permissions"):
        check_names(str(closed / "out"), ["parts"], ["plan.json"])
    with pytest.raises(AccessDenied, match="Permission denied; check the permissions"):
        Store.open(str(closed / "out"), StorageSpec()).put("a", b"x")


def test_what_a_disk_refuses_for_good_is_no_outage(tmp_path):
    long = str(tmp_path / ("x" * 300))
    with pytest.raises(UsageError, match="File name too long; use a shorter one"):
        check_names(long, ["parts"], ["plan.json"])
    with pytest.raises(UsageError, match="File name too long; use a shorter one"):
        Store.open(long, StorageSpec()).read("a")
    error = OSError(errno.EROFS, "Read-only file system", "out/a")
    assert isinstance(filesystem.translate(error, "out/a"), AccessDenied)
    assert isinstance(filesystem.translate(OSError(errno.EIO, "Input/output error", "a"), "a"), StorageError)
