"""Detection of files that a failed download left in place of a model's file: LFS pointers, HTML pages and the like."""

from __future__ import annotations

import contextlib
from pathlib import Path

_HEAD_BYTES = 512
_LFS = b"version https://git-lfs.github.com/spec/"
_MARKUP = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<error>")
_KINDS = (
    (b"PK\x03\x04", "a ZIP archive, perhaps a pickle of PyTorch: convert it to safetensors"),
    (b"\x80\x02", "a Python pickle, which can run code: convert it to safetensors"),
    (b"\x1f\x8b", "gzip data: unpack it"),
    (b"GGUF", "a GGUF file: name it as the model itself"),
)


def misplaced_content(path: Path) -> str:
    """Return what the file is instead, and what to do; an empty text if nothing is known to be wrong.

    Git LFS pointer: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md.
    """
    head = b""
    with contextlib.suppress(OSError), path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(_LFS):
        return "a Git LFS pointer, not the file that it stands for: run `git lfs pull` in its folder"
    if start.lower().startswith(_MARKUP):
        return "a web page: the download got a login or an error page in place of the file; download it again"
    if not head:
        return "empty: download it again"
    own = b"GGUF" if path.suffix.lower() == ".gguf" else b""
    return next((kind for magic, kind in _KINDS if magic != own and head.startswith(magic)), "")


def said(path: Path, otherwise: str) -> str:
    """Return the end of an error message about `path`: what it holds if that is known, else `otherwise`."""
    kind = misplaced_content(path)
    return f"is {kind}" if kind else otherwise
