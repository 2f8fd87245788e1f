"""All layers of a decoder in one call (csrc/fused_layers.h): between two ops lies no Python.

T tokens of a step · N rows that come out, or blocks · E hidden size · K kv heads · B slots per block · D head size ·
R rotated pairs of a head
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

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
from batchinfer_kernels.eager.layer_facts import DecoderFacts, LayerFacts, LinearWeights, NormFacts
from batchinfer_kernels.eager.step_index import StepIndex


class DecoderLayers:
    """The layers of `facts`, whose tensors it keeps. Made by `decoder_layers`."""

    def __init__(self, facts: DecoderFacts, functions: Functions) -> None:
        self._facts = facts
        self._functions = functions
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

    def run(
        self,
        x_TE: Tensor,
        angles: Sequence[tuple[Tensor, Tensor]],
        caches: Sequence[Tensor],
        index: StepIndex,
        rows_N: Tensor,
    ) -> tuple[Tensor, Tensor] | None:
        """The last branch and the residual that it is to be added to, [N, E]; None if an argument has another form."""
        kv_N2KBD = caches[0]
        kv_type = TYPES.get(kv_N2KBD.dtype)
        turns = [x for pair in angles for x in pair]
        if not isinstance(index, CPUStepIndex) or kv_type is None or len(caches) != self._model.num_layers:
            return None
        if not all(x.dtype == torch.float32 for x in (x_TE, *turns)) or rows_N.dtype != torch.int64:
            return None
        if not all(x.dtype == kv_N2KBD.dtype and x.shape == kv_N2KBD.shape for x in caches):
            return None
        if not all(x.is_contiguous() for x in (x_TE, rows_N, *turns, *caches)):
            return None
        tables, query_starts, lengths, prompts = index.addresses
        out_NE = torch.empty(len(rows_N), x_TE.shape[1])
        residual_NE = torch.empty_like(out_NE)
        step = StepStruct(
            x_TE.data_ptr(),
            len(x_TE),
            _addresses(turns),
            (INT64 * len(angles))(*(cos_TR.shape[1] for cos_TR, _ in angles)),
            _addresses(caches),
            kv_type,
            kv_N2KBD.shape[3],
            index.slots_T.data_ptr(),
            tables,
            index.tables_SB.shape[1],
            query_starts,
            lengths,
            prompts,
            len(index.lengths_S),
            rows_N.data_ptr(),
            len(rows_N),
            out_NE.data_ptr(),
            residual_NE.data_ptr(),
        )
        threads = torch.get_num_threads()
        checked(self._functions.decoder_layers(ctypes.byref(self._model), ctypes.byref(step), threads))
        return out_NE, residual_NE


def decoder_layers(facts: DecoderFacts) -> DecoderLayers | None:
    """None if something in them has a form that C++ does not know."""
    parts = [part for layer in facts.layers for part in layer]
    panels = [_panels(part) for part in parts if isinstance(part, LinearWeights)]
    vectors = [part.weight_E for part in parts if isinstance(part, NormFacts)]
    vectors += [part.bias_O for part in parts if isinstance(part, LinearWeights) and part.bias_O is not None]
    plain = all(x.dtype == torch.float32 and x.is_contiguous() for x in vectors)
    variants = {id(p.functions): p.functions for p in panels if p is not None}
    if None in panels or not plain or len(variants) != 1:
        return None
    return DecoderLayers(facts, *variants.values())


def _panels(facts: LinearWeights) -> Panels | None:
    """What of the matrix C++ reads: packed, and with gates in its panels where there is an activation."""
    matrix = facts.matrix
    if facts.activation is None:
        return matrix if isinstance(matrix, Panels) else None
    return matrix.packed if isinstance(matrix, GatedPanels) else None


def _layer(facts: LayerFacts) -> LayerStruct:
    parts = [_matrix(part) if isinstance(part, LinearWeights) else _norm(part) for part in facts[:10]]
    return LayerStruct(*parts, facts.window or 0, -1 if facts.rope is None else facts.rope)


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
        made.activation, _ = ACTIVATIONS[facts.activation]
    return made


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (POINTER * len(tensors))(*(x.data_ptr() for x in tensors))
