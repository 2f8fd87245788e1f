"""Number formats of a model's activations and weight matrices, and the job settings that ask for them."""

from __future__ import annotations

from typing import NamedTuple

from batchinfer_kernels.formats import Precision


class WeightPrecision(NamedTuple):
    """Precision of the weight matrices in the decoder layers, and of the `ends`: embedding and LM head.

    `activations` is the format of all that lies between the matrices: residual stream, norms and biases included. A
    weight is converted to it first, then rounded to its own precision.
    """

    activations: Precision = Precision.FLOAT32
    layers: Precision = Precision.FLOAT32
    ends: Precision = Precision.FLOAT32

    @classmethod
    def of_all(cls, precision: Precision) -> WeightPrecision:
        """Return one precision for everything."""
        return cls(precision, precision, precision)


EXACT = WeightPrecision()

# bfloat16 is for what is multiplied: sums and all that lies between the matrices gain nothing by it. int8 is
# for the layers: errors of embedding and LM head reach the logits at once.
_PRECISIONS = {
    ("float32", None): EXACT,
    ("float32", "int8"): WeightPrecision(layers=Precision.INT8),
    ("bfloat16", None): WeightPrecision(layers=Precision.BFLOAT16, ends=Precision.BFLOAT16),
    ("bfloat16", "int8"): WeightPrecision(layers=Precision.INT8, ends=Precision.BFLOAT16),
    ("float16", None): WeightPrecision.of_all(Precision.FLOAT16),
    ("float16", "int8"): WeightPrecision(Precision.FLOAT16, Precision.INT8, Precision.FLOAT16),
}


def weight_precision(dtype: str | None, quantization: str | None) -> WeightPrecision:
    """Return the precisions that a job's `engine.dtype` (default float32) and `engine.quantization` ask for."""
    return _PRECISIONS[dtype or "float32", quantization]
