"""Corrections of Triton's interpreter, so that what a kernel computes in it is what a GPU would compute.

Triton runs kernels on the CPU where TRITON_INTERPRET=1. It keeps bfloat16 and float8 as raw bits and computes with the
bits as integers, casts with truncation, ignores NaN otherwise than a GPU, and loads 0 in masked lanes, which a GPU
leaves undefined. `install` replaces these parts of its builder: numbers of at most 16 bits are computed in float32 and
rounded to the nearest once, casts are torch's, masked lanes hold NaN or -0x5A5A5A5A. It also patches `triton.language`
once instead of at every call of a nested function, which makes launches several times as fast; nothing can be compiled
in the same process afterwards.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TORCH = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp8e5": torch.float8_e5m2,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e4b8": torch.float8_e4m3fnuz,
}
"""Name of a float of Triton → torch's dtype."""
_FLOAT8 = {"fp8e5", "fp8e4nv", "fp8e4b8"}
_RAW = _FLOAT8 | {"bf16"}  # held as bits
_BITS = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
_INT_POISON, _BYTE_POISON, _BFLOAT16_NAN = -0x5A5A5A5A, 0x5A, 0x7FC0

_HELD: dict[str, np.dtype] = {}
_upstream_dtype = interpreter._get_np_dtype
_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle


def cast(data: np.ndarray, source: str, target: str) -> np.ndarray:
    """Return floats in another format, rounded to nearest even by torch. float8 overflows as on GPUs: it saturates."""
    values = torch.from_numpy(np.ascontiguousarray(data).reshape(-1).view(np.uint8).copy()).view(_TORCH[source])
    if source in _FLOAT8 or target in _FLOAT8:
        values = values.float()
    if target in _FLOAT8:
        largest = torch.finfo(_TORCH[target]).max
        values = values.clamp(-largest, largest)  # keeps NaN
    raw = values.to(_TORCH[target]).view(torch.uint8).numpy()
    kind = "u" if target in _RAW else "f"
    return raw.view(f"{kind}{_TORCH[target].itemsize}").reshape(data.shape)


def wide(handle: interpreter.TensorHandle) -> np.ndarray:
    """Return a handle's numbers in a format that NumPy computes with."""
    return cast(handle.data, _name(handle), "fp32") if _name(handle) in _RAW else handle.data


def _name(handle: interpreter.TensorHandle) -> str:
    return handle.dtype.scalar.name


def _narrow(data: np.ndarray, dtype: tl.dtype) -> interpreter.TensorHandle:
    """Round results of `wide` numbers to their format; truth values stay as they are."""
    raw = data if data.dtype == bool else cast(data.astype(np.float32, copy=False), "fp32", dtype.name)
    return _Handle(raw, dtype)


@functools.cache
def install() -> None:
    """Correct the interpreter in this process, once."""
    for name in ("create_fp_to_fp", "create_fp_ext", "create_fp_trunc"):
        setattr(_Builder, name, _cast_floats)
    for name in ("create_si_to_fp", "create_ui_to_fp", "create_fp_to_si", "create_fp_to_ui"):
        setattr(_Builder, name, _cast_any)
    _Builder.cast_impl = _cast_any
    _Builder.create_masked_load = _masked_load
    _Builder.create_dot = _dot
    _Builder.create_fma = _fma
    _Builder.get_bf16 = lambda self, value: _narrow(np.array([value], np.float32), tl.bfloat16)
    _correct_arithmetic()
    _correct_reductions()
    _patch_language_once()


def _numpy_dtype(dtype: tl.dtype) -> np.dtype:
    scalar = dtype.scalar
    held = _HELD.get(scalar.name)
    if held is None:
        held = _HELD[scalar.name] = _upstream_dtype(scalar)
    return held


def _cast_any(self, source, target):
    of, to = source.dtype.scalar, target.scalar
    if of.name in _TORCH and to.name in _TORCH:
        return source if of == to else _Handle(cast(source.data, of.name, to.name), to)
    if to.name in _RAW:  # from an integer
        return _narrow(source.data, to)
    return _Handle(wide(source).astype(_numpy_dtype(to)), to)


def _cast_floats(self, source, target, rounding=None):
    return _cast_any(self, source, target)


def _correct_arithmetic() -> None:
    binary, unary, ternary = _Builder.binary_op, _Builder.unary_op, _Builder.ternary_op

    def binary_op(self, left, right, op):
        if _name(left) in _RAW and op not in _BITS:
            return _narrow(op(wide(left), wide(right)), left.dtype.scalar)
        return binary(self, left, right, op)

    def unary_op(self, value, op):
        if _name(value) in _RAW:
            return _narrow(op(wide(value)), value.dtype.scalar)
        return unary(self, value, op)

    def ternary_op(self, first, second, third, op):
        if _name(third) in _RAW and op is not np.where:
            return _narrow(op(wide(first), wide(second), wide(third)), third.dtype.scalar)
        return ternary(self, first, second, third, op)

    def clamp(self, value, low, high, propagate_nans):
        kept = self.create_minnumf(self.create_maxnumf(value, low), high)
        if propagate_nans == tl.PropagateNan.NONE:
            return kept
        return self.create_select(self.create_fcmpUNE(value, value), value, kept)

    _Builder.binary_op, _Builder.unary_op, _Builder.ternary_op = binary_op, unary_op, ternary_op
    # of a number and NaN, a GPU returns the number
    _Builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    _Builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    _Builder.create_clampf = clamp


def _fma(self, first, second, third):
    dtype = third.dtype.scalar
    total = wide(first) * wide(second) + wide(third)
    return _narrow(total, dtype) if dtype.name in _RAW else _Handle(total, dtype)


def _dot(self, left, right, total, input_precision, max_num_imprecise_acc):
    of = np.promote_types(total.data.dtype, np.float32) if total.dtype.is_floating() else total.data.dtype
    product = wide(left).astype(of) @ wide(right).astype(of)
    return _Handle((product + total.data).astype(total.data.dtype), total.dtype.scalar)


def _masked_load(self, pointers, mask, other, cache_modifier, eviction_policy, is_volatile):
    dtype = pointers.get_element_ty()
    held = _numpy_dtype(dtype)
    shape = np.shape(pointers.data)
    filled = np.full(shape, _poison(dtype, held), held) if other is None else other.data
    mask = np.broadcast_to(mask.data, shape)
    return _Handle(interpreter._interpreter.load(pointers.data, mask, filled, held), dtype)


def _poison(dtype: tl.dtype, held: np.dtype) -> np.generic:
    """Return the value of lanes that are not loaded."""
    if dtype == tl.bfloat16:
        return held.type(_BFLOAT16_NAN)
    if held.kind == "f":
        return held.type(np.nan)
    return np.array(_INT_POISON if held.itemsize >= 4 else _BYTE_POISON, np.int64).astype(held)[()]


def _correct_reductions() -> None:
    min_max = interpreter.ReduceOps.min_max
    quiet = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}  # the same, without a warning where all are NaN

    def corrected_min_max(self, values, val_reduce_op, idx_reduce_op=None):
        return min_max(self, values, quiet.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    def corrected_sum(self, values):
        dtype = values.dtype.scalar
        numbers = wide(values.handle)
        added = np.sum(numbers, axis=self.axis, keepdims=self.keep_dims, dtype=numbers.dtype)  # integers wrap around
        raw = _narrow(np.atleast_1d(added), dtype).data if dtype.name in _RAW else np.atleast_1d(added)
        return self.to_tensor(raw if added.ndim else raw[0], dtype)

    interpreter.ReduceOps.min_max, interpreter.ReduceOps.sum = corrected_min_max, corrected_sum


def _patch_language_once() -> None:
    """Patch `triton.language` for good, and leave out what every call does again, or does for nothing."""
    patched: set[str] = set()
    patch_language, run = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch(function):
        names = {value.__name__ for value in function.__globals__.values() if value in (tl, tl.core)}
        if not names <= patched:
            patch_language(function)
            patched.update(names)
        return _Nothing()

    def run_quietly(self, *args, **options):
        with np.errstate(all="ignore"):
            return run(self, *args, **options)

    interpreter._patch_lang = patch
    interpreter.GridExecutor.__call__ = run_quietly
    interpreter._get_np_dtype = _numpy_dtype
    builder = interpreter.interpreter_builder
    # checks that have no effect without options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


class _Nothing:
    """Scope of patches that stay."""

    def restore(self) -> None:
        pass
