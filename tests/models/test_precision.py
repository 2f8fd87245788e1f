"""Precisions of activations and weights: every combination of job settings, and none that the table lacks."""

from __future__ import annotations

import typing
from dataclasses import replace

import pytest
import torch
from batchinfer_kernels.eager import EagerBackend
from batchinfer_kernels.formats import Precision

from batchinfer.errors import ModelError
from batchinfer.models.precision import WeightPrecision, default_dtype, weight_precision
from batchinfer.spec import EngineSpec

MATRICES_ALONE = EagerBackend(torch.device("cpu")).capabilities
ACTIVATIONS_TOO = replace(MATRICES_ALONE, name="narrow", dtype_of_activations=True)


def _choices(field: str) -> tuple[str | None, ...]:
    """Return the values that a field of the engine's settings takes: a Literal or None."""
    annotation = EngineSpec.model_fields[field].annotation
    return tuple(value for part in typing.get_args(annotation) for value in (typing.get_args(part) or (None,)))


@pytest.mark.parametrize(
    ("dtype", "quantization", "expected"),
    [
        ("float32", None, ("float32", "float32", "float32")),
        ("bfloat16", None, ("float32", "bfloat16", "bfloat16")),
        ("float16", None, ("float16", "float16", "float16")),
        ("float32", "int8", ("float32", "int8", "float32")),
        ("bfloat16", "int8", ("float32", "int8", "bfloat16")),
        ("float16", "int8", ("float16", "int8", "float16")),
    ],
)
def test_settings_name_precisions_of_activations_layers_and_ends(
    dtype: str, quantization: str | None, expected: tuple[str, ...]
) -> None:
    assert weight_precision(dtype, quantization, MATRICES_ALONE) == tuple(map(Precision, expected))


def test_every_combination_of_settings_has_precisions() -> None:
    for dtype in _dtypes():
        for quantization in _choices("quantization"):
            assert weight_precision(dtype, quantization).activations is not Precision.INT8


def test_one_dtype_is_that_of_matrices_and_activations_where_a_backend_computes_in_it() -> None:
    for dtype in _dtypes():
        assert weight_precision(dtype, None, ACTIVATIONS_TOO) == WeightPrecision.of_all(Precision(dtype))
        with pytest.raises(ModelError, match=r"engine\.quantization: int8 has no kernels in narrow"):
            weight_precision(dtype, "int8", ACTIVATIONS_TOO)


@pytest.mark.parametrize(
    ("stored", "default"),
    [
        *(("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16"), ("float64", "bfloat16")),
        *(("float8_e4m3fn", "bfloat16"), (None, "bfloat16")),
    ],
)
def test_the_default_is_the_checkpoints_dtype_where_activations_have_it(stored: str | None, default: str) -> None:
    assert default_dtype(ACTIVATIONS_TOO, stored) == default
    assert default_dtype(MATRICES_ALONE, stored) == "float32"


def _dtypes() -> list[str]:
    return [dtype for dtype in _choices("dtype") if dtype is not None]
