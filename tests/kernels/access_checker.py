"""Memory accesses of kernels in Triton's interpreter: bounds, races between programs, bytes moved.

    with checked_accesses() as launches:
        backend.rms_norm(x, weight, 1e-5)
    assert launches[0].loaded_bytes == ...

A pointer knows the tensor argument that it comes from, so that an access beyond this tensor is found even where another
tensor begins there. Programs of a launch run in any order on a GPU: none may store where another one stores or loads.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from triton.runtime import interpreter

_POINTERS_FROM = (
    *("create_addptr", "create_splat", "create_broadcast", "create_expand_dims", "create_reshape", "create_trans"),
    *("create_bitcast", "create_int_to_ptr", "create_ptr_to_int"),
)
"""Functions of the builder whose first argument is the pointer, or tensor of pointers, that they change."""

_Builder = interpreter.InterpreterBuilder
_Program = tuple[int, int, int]


class OutOfBounds(AssertionError):
    """An access outside the tensor that its pointer comes from, or outside all arguments of the launch."""


class Race(AssertionError):
    """Two programs of one launch, at least one of which stores, at one address."""


class _Extent(NamedTuple):
    """Bytes from a tensor's first element to the end of its last."""

    low: int
    high: int


@dataclass
class Launch:
    """One launch of a kernel. An access moves each of its addresses once, however many lanes share one."""

    kernel: str
    names: dict[_Extent, str]  # tensor arguments
    loaded_bytes: int = 0
    stored_bytes: int = 0
    loaded_from: Counter[str] = field(default_factory=Counter)  # bytes by name of the argument
    stored_to: Counter[str] = field(default_factory=Counter)
    loads: dict[_Program, list[np.ndarray]] = field(default_factory=dict, repr=False)
    stores: dict[_Program, list[np.ndarray]] = field(default_factory=dict, repr=False)

    def record(self, kind: str, pointers: interpreter.TensorHandle, mask: object, program: _Program) -> None:
        """Count one access; raise OutOfBounds."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.unique(pointers.data[np.broadcast_to(np.asarray(mask), pointers.data.shape)].astype(np.int64))
        extents = pointers.attr.get("extent") or list(self.names)
        inside = np.zeros(len(addresses), bool)
        for low, high in extents:
            inside |= (addresses >= low) & (addresses + size <= high)
        if outside := len(addresses) - int(inside.sum()):
            raise OutOfBounds(f"{self.kernel}, {_line()}, program {program}: {kind} of {outside} numbers out of bounds")
        numbers = len(addresses) * size
        accesses = self.loads if kind == "load" else self.stores
        accesses.setdefault(program, []).append((addresses[:, None] + np.arange(size)).ravel())
        name = self.names[extents[0]] if "extent" in pointers.attr and extents else ""
        if kind == "load":
            self.loaded_bytes += numbers
            self.loaded_from[name] += numbers
        else:
            self.stored_bytes += numbers
            self.stored_to[name] += numbers

    def check_races(self) -> None:
        """Raise Race. Addresses are compared byte by byte."""
        stores = {program: np.unique(np.concatenate(parts)) for program, parts in self.stores.items()}
        if not stores:
            return
        stored, times = np.unique(np.concatenate(list(stores.values())), return_counts=True)
        if (times > 1).any():
            raise Race(f"{self.kernel}: {int((times > 1).sum())} bytes are stored by several programs")
        for program, parts in self.loads.items():
            loaded = np.intersect1d(np.concatenate(parts), stored)
            others = np.setdiff1d(loaded, stores.get(program, loaded[:0]))
            if len(others):
                raise Race(f"{self.kernel}: program {program} loads {len(others)} bytes that others store")


def _line() -> str:
    """Return the line of the kernel, or of the function that it called, which is running."""
    frame = sys._getframe(2)
    while frame.f_back and (
        frame.f_globals["__name__"] == __name__ or frame.f_globals["__name__"].startswith("triton.")
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_name} line {frame.f_lineno}"


def _extents(argument: object) -> Iterator[_Extent]:
    if isinstance(argument, torch.Tensor) and argument.numel():
        last = sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride(), strict=True))
        yield _Extent(argument.data_ptr(), argument.data_ptr() + (last + 1) * argument.element_size())
    elif isinstance(argument, tuple | list):
        for one in argument:
            yield from _extents(one)


@contextlib.contextmanager
def checked_accesses() -> Iterator[list[Launch]]:
    """Check every launch in the `with` block, and append it to the list. Raises OutOfBounds and Race.

    Triton wraps what a program raises: `pytest.raises(InterpreterError, match="out of bounds")`.
    """
    launches: list[Launch] = []
    with contextlib.ExitStack() as stack:
        for name in _POINTERS_FROM:
            _replace(stack, _Builder, name, _keeping_extent)
        _replace(stack, interpreter, "_implicit_cvt", _with_extent)
        _replace(stack, _Builder, "create_masked_load", lambda load: _recording(load, "load", launches))
        _replace(stack, _Builder, "create_masked_store", lambda store: _recording(store, "store", launches))
        _replace(stack, interpreter.GridExecutor, "__call__", lambda call: _launching(call, launches))
        yield launches


def _replace(stack: contextlib.ExitStack, owner: object, name: str, wrap) -> None:
    before = getattr(owner, name)
    stack.callback(setattr, owner, name, before)
    setattr(owner, name, wrap(before))


def _keeping_extent(function):
    def wrapped(self, *arguments, **options):
        result = function(self, *arguments, **options)
        for argument in arguments:
            extent = argument.attr.get("extent") if isinstance(argument, interpreter.TensorHandle) else None
            if extent is not None:
                result.attr["extent"] = extent
        return result

    return wrapped


def _with_extent(convert):
    def wrapped(argument):
        result = convert(argument)
        if isinstance(argument, torch.Tensor):
            result.handle.attr["extent"] = list(_extents(argument))
        return result

    return wrapped


def _recording(access, kind: str, launches: list[Launch]):
    def wrapped(self, pointers, *rest, **options):
        mask = rest[0] if kind == "load" else rest[1]
        launches[-1].record(kind, pointers, getattr(mask, "data", mask), self.grid_idx)
        return access(self, pointers, *rest, **options)

    return wrapped


def _launching(call, launches: list[Launch]):
    def wrapped(self, *arguments, **options):
        named = zip([*self.arg_names[: len(arguments)], *options], [*arguments, *options.values()], strict=True)
        names = {extent: name for name, argument in named for extent in _extents(argument)}
        launches.append(Launch(self.fn.__name__, names))
        call(self, *arguments, **options)
        launches[-1].check_races()

    return wrapped
