"""Fused layer stack: all layers of a decoder in one call (csrc/fused_layers.h), without Python between two ops.

State: addresses of the weights, built at load from LayerFacts, which stay alive here. A step whose tensors have another
form than C++ reads goes to the op-by-op stack, which is reported once.

T tokens of a step · N rows that come out, or blocks · E hidden size · K kv heads · B slots per block · D head size ·
R rotated pairs of a head
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from batchinfer_kernels.contract import CosSin, Fallbacks, LayerStack
from batchinfer_kernels.cpu.gated_linear import ACTIVATIONS, GatedPanels
from batchinfer_kernels.cpu.library import TYPES, Functions, checked
from batchinfer_kernels.cpu.linear import Panels, QuantizedPanels, type_of
from batchinfer_kernels.cpu.step_index import CPUStepIndex
from batchinfer_kernels.cpu.structs import (
    INT64,
    POINTER,
    LayerStruct,
    MatrixStruct,
    ModelStruct,
    NormStruct,
    StepStruct,
)
from batchinfer_kernels.formats import DecoderFacts, LayerFacts, LinearWeights, NormFacts


class FusedLayers:
    """Layer stack of `facts`, whose tensors it keeps. Made by `fuse_layers`."""

    def __init__(self, facts: DecoderFacts, functions: Functions, op_by_op: LayerStack, fallbacks: Fallbacks) -> None:
        self._facts = facts
        self._functions = functions
        self._op_by_op = op_by_op
        self._fallbacks = fallbacks
        self._layers = (LayerStruct * len(facts.layers))(*map(_layer, facts.layers))
        self._model = ModelStruct(
            self._layers,
            len(facts.layers),
            facts.hidden_size,
            facts.num_heads,
            facts.num_kv_heads,
            facts.head_size,
            facts.scale,
            facts.soft_cap or 0.0,
            facts.residual_multiplier,
        )

    def run_layers(
        self,
        x_TE: Tensor,
        cos_sin: Sequence[CosSin],
        caches: Sequence[Tensor],
        index: CPUStepIndex,
        rows_N: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See LayerStack."""
        rows_N = torch.arange(len(x_TE)) if rows_N is None else rows_N
        angles = [x for pair in cos_sin for x in pair]
        unknown = _unknown_argument(x_TE, angles, caches, rows_N)
        if unknown is not None:
            self._fallbacks.note("layer_stack", *unknown)
            return self._op_by_op.run_layers(x_TE, cos_sin, caches, index, rows_N)
        return self._run_fused(x_TE, angles, caches, index, rows_N)

    def _run_fused(
        self, x_TE: Tensor, angles: list[Tensor], caches: Sequence[Tensor], index: CPUStepIndex, rows_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        out_NE = torch.empty(len(rows_N), x_TE.shape[1])
        residual_NE = torch.empty_like(out_NE)
        step = StepStruct(
            x_TE.data_ptr(),
            len(x_TE),
            _addresses(angles),
            (INT64 * (len(angles) // 2))(*(cos_TR.shape[1] for cos_TR in angles[::2])),
            _addresses(caches),
            TYPES[caches[0].dtype],
            caches[0].shape[3],
            index.slots,
            index.tables,
            index.table_stride,
            index.query_starts,
            index.lengths,
            index.prompts,
            index.num_sequences,
            rows_N.data_ptr(),
            len(rows_N),
            out_NE.data_ptr(),
            residual_NE.data_ptr(),
        )
        threads = torch.get_num_threads()
        checked(self._functions.decoder_layers(ctypes.byref(self._model), ctypes.byref(step), threads))
        return out_NE, residual_NE


def _unknown_argument(
    x_TE: Tensor, angles: list[Tensor], caches: Sequence[Tensor], rows_N: Tensor
) -> tuple[str, Tensor] | None:
    """Return why C++ cannot take an argument, and the argument; None if it can take all."""
    first = caches[0]
    if first.dtype not in TYPES:
        return "a KV cache of this type", first
    for x in (x_TE, *angles):
        if x.dtype != torch.float32:
            return "activations or angles of this type", x
    if rows_N.dtype != torch.int64:
        return "row numbers of this type", rows_N
    for cache in caches:
        if cache.dtype != first.dtype or cache.shape != first.shape:
            return "layers with different KV caches", cache
    for x in (x_TE, rows_N, *angles, *caches):
        if not x.is_contiguous():
            return f"strides {x.stride()}", x
    return None


def fuse_layers(functions: Functions, facts: DecoderFacts, op_by_op: LayerStack, fallbacks: Fallbacks) -> LayerStack:
    """Return the fused stack, or `op_by_op` if C++ does not know a form in `facts`, which is reported."""
    pieces = [piece for layer in facts.layers for piece in layer]
    linears = [piece for piece in pieces if isinstance(piece, LinearWeights)]
    panels = [_panels(linear) for linear in linears]
    for linear, packed in zip(linears, panels, strict=True):
        if packed is None:
            form = type(linear.matrix).__name__
            gated = "" if linear.activation is None else " before an activation"
            fallbacks.note("layer_stack", f"a matrix held as {form}{gated}", linear.matrix)
            return op_by_op
    vectors = [piece.weight_E for piece in pieces if isinstance(piece, NormFacts)]
    vectors += [linear.bias_O for linear in linears if linear.bias_O is not None]
    for vector in vectors:
        if vector.dtype != torch.float32 or not vector.is_contiguous():
            fallbacks.note("layer_stack", "a norm or bias that is not dense float32", vector)
            return op_by_op
    assert all(packed is None or packed.functions is functions for packed in panels), "packed by another backend"
    return FusedLayers(facts, functions, op_by_op, fallbacks)


def _panels(facts: LinearWeights) -> Panels | None:
    """Return the panels that C++ reads, None for other forms. Before an activation they must hold gates and factors."""
    matrix = facts.matrix
    if facts.activation is None:
        return matrix if isinstance(matrix, Panels) else None
    return matrix.packed if isinstance(matrix, GatedPanels) else None


def _layer(facts: LayerFacts) -> LayerStruct:
    structs = [_matrix(piece) if isinstance(piece, LinearWeights) else _norm(piece) for piece in facts[:10]]
    return LayerStruct(*structs, facts.window or 0, -1 if facts.rope is None else facts.rope)


def _norm(facts: NormFacts | None) -> NormStruct:
    if facts is None:
        return NormStruct()
    return NormStruct(facts.weight_E.data_ptr(), len(facts.weight_E), facts.eps, facts.offset)


def _matrix(facts: LinearWeights) -> MatrixStruct:
    panels = _panels(facts)
    assert panels is not None
    made = MatrixStruct(panels.panels.data_ptr(), in_features=panels.in_features, out_features=panels.out_features)
    if isinstance(panels, QuantizedPanels):
        made.offsets, made.scales_O = panels.offsets.data_ptr(), panels.scales_O.data_ptr()
    else:
        made.type = type_of(panels)
    if facts.bias_O is not None:
        made.bias_O = facts.bias_O.data_ptr()
    if facts.activation is not None:
        made.activation = ACTIVATIONS[facts.activation]
    return made


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (POINTER * len(tensors))(*(x.data_ptr() for x in tensors))
