"""ctypes mirrors of the C++ structs that `decoder_layers` reads (csrc/fused_layers.h): same order, same field names.

`library.load` compares each one's size and field offsets with what was compiled.
"""

from __future__ import annotations

import ctypes

from batchinfer_kernels.formats import LayerFacts

POINTER, INT64, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


class NormStruct(ctypes.Structure):
    """Mirror of Norm."""

    _fields_ = (("weight", POINTER), ("size", INT64), ("eps", FLOAT), ("offset", FLOAT))


class MatrixStruct(ctypes.Structure):
    """Mirror of Matrix."""

    _fields_ = (
        ("panels", POINTER),
        ("offsets", POINTER),
        ("scales_O", POINTER),
        ("bias_O", POINTER),
        ("in_features", INT64),
        ("out_features", INT64),
        ("type", INT),
        ("activation", INT),
    )


class LayerStruct(ctypes.Structure):
    """Mirror of Layer."""

    _fields_ = (
        *((name, NormStruct) for name in LayerFacts._fields[:6]),
        *((name, MatrixStruct) for name in LayerFacts._fields[6:10]),
        ("window", INT64),
        ("rope", INT64),
    )


class ModelStruct(ctypes.Structure):
    """Mirror of Model."""

    _fields_ = (
        ("layers", ctypes.POINTER(LayerStruct)),
        *((name, INT64) for name in ("num_layers", "hidden_size", "heads", "kv_heads", "head_size")),
        *((name, FLOAT) for name in ("scale", "soft_cap", "residual_multiplier")),
    )


class StepStruct(ctypes.Structure):
    """Mirror of Step."""

    _fields_ = (
        ("x_TE", POINTER),
        ("tokens", INT64),
        ("angles", ctypes.POINTER(POINTER)),
        ("pairs", ctypes.POINTER(INT64)),
        ("caches", ctypes.POINTER(POINTER)),
        ("kv_type", INT64),
        ("block_size", INT64),
        ("slots_T", POINTER),
        ("tables", POINTER),
        ("table_stride", INT64),
        ("query_starts", POINTER),
        ("lengths", POINTER),
        ("prompts", POINTER),
        ("num_sequences", INT64),
        ("rows_N", POINTER),
        ("outputs", INT64),
        ("out_NE", POINTER),
        ("residual_NE", POINTER),
    )


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "Norm": NormStruct,
    "Matrix": MatrixStruct,
    "Layer": LayerStruct,
    "Model": ModelStruct,
    "Step": StepStruct,
}
"""Mirrors by the name of their C++ struct."""


def layout_text(struct: type[ctypes.Structure]) -> str:
    """Return size, then letter and offset of each field, as csrc/abi.h writes them."""
    offsets = (f"{_letter(field[1])}{getattr(struct, field[0]).offset}" for field in struct._fields_)
    return " ".join((str(ctypes.sizeof(struct)), *offsets))


def _letter(kind: type) -> str:
    if issubclass(kind, ctypes.Structure):
        return "s"
    return {INT64: "n", INT: "i", FLOAT: "f"}.get(kind, "p")
