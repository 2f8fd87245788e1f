"""Precisions of activations and weights: every combination of job settings, and none that the table lacks."""

from __future__ import annotations

import typing

import pytest
from batchinfer_kernels.formats import Precision

from batchinfer.models.precision import weight_precision
from batchinfer.spec import EngineSpec


def _choices(field: str) -> tuple[str | None, ...]:
    """Return the values that a field of the engine's settings takes: a Literal or None."""
    annotation = EngineSpec.model_fields[field].annotation
    return tuple(value for part in typing.get_args(annotation) for value in (typing.get_args(part) or (None,)))


@pytest.mark.parametrize(
    ("dtype", "quantization", "expected"),
    [
        (None, None, ("float32", "float32", "float32")),
        ("float32", None, ("float32", "float32", "float32")),
        ("bfloat16", None, ("float32", "bfloat16", "bfloat16")),
        ("float16", None, ("float16", "float16", "float16")),
        (None, "int8", ("float32", "int8", "float32")),
        ("float32", "int8", ("float32", "int8", "float32")),
        ("bfloat16", "int8", ("float32", "int8", "bfloat16")),
        ("float16", "int8", ("float16", "int8", "float16")),
    ],
)
def test_settings_name_precisions_of_activations_layers_and_ends(
    dtype: str | None, quantization: str | None, expected: tuple[str, ...]
) -> None:
    assert weight_precision(dtype, quantization) == tuple(map(Precision, expected))


def test_every_combination_of_settings_has_precisions() -> None:
    for dtype in _choices("dtype"):
        for quantization in _choices("quantization"):
            assert weight_precision(dtype, quantization).activations is not Precision.INT8
