"""Number formats of a model's activations and weight matrices, and the job settings that ask for them."""

from __future__ import annotations

from typing import NamedTuple

from batchinfer_kernels.contract import Capabilities
from batchinfer_kernels.formats import Precision

from batchinfer.errors import ModelError


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


_DTYPES_OF_ACTIVATIONS = frozenset({"float16", "bfloat16"})


def default_dtype(capabilities: Capabilities, stored: str | None) -> str:
    """Return the default of `engine.dtype`: float32, or on backends that compute activations in it the checkpoint's.

    `stored`: the checkpoint's dtype, None if it names none. bfloat16 stands in for all that has more than 16 bits.
    """
    if not capabilities.dtype_of_activations:
        return "float32"
    return stored if stored in _DTYPES_OF_ACTIVATIONS else "bfloat16"


def weight_precision(dtype: str, quantization: str | None, capabilities: Capabilities | None = None) -> WeightPrecision:
    """Return the precisions that a job's `engine.dtype` and `engine.quantization` ask for.

    Raises ModelError if the backend has no kernels for them.
    """
    if capabilities is None or not capabilities.dtype_of_activations:
        return _PRECISIONS[dtype, quantization]
    if quantization is not None:
        raise ModelError(
            f"engine.quantization: {quantization} has no kernels in {capabilities.name}: leave it out, or choose "
            "another engine.device"
        )
    return WeightPrecision.of_all(Precision(dtype))
