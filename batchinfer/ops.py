"""The ops of a forward pass: one name each, whatever the backend. The backend follows the tensors' device.

`eager` (plain torch, after the naive float64 code of tests/kernels) runs on every device that has no backend of its
own; `cpu` is C++, and serves where an install could compile it.

T tokens of a step · S sequences · N blocks (or rows, in norms) · K kv heads · H query heads · B slots per block ·
D head size · R rotated part of a head · E hidden size · F feed-forward size · I, O features in and out
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from types import ModuleType
from typing import Literal, NamedTuple

import numpy.typing as npt
from batchinfer_kernels import cpu, eager
from batchinfer_kernels.eager.block_matrix import BLOCK, BlockMatrix, stacked_blocks
from batchinfer_kernels.eager.layer_facts import DecoderFacts, LayerFacts, LinearWeights, NormFacts
from batchinfer_kernels.eager.step_index import StepIndex
from batchinfer_kernels.formats import Precision
from torch import Tensor

from batchinfer.log import log

__all__ = [
    "BLOCK",
    "ArgmaxBounds",
    "BlockMatrix",
    "DecoderFacts",
    "DecoderLayers",
    "Gated",
    "LayerFacts",
    "LinearWeights",
    "NormFacts",
    "Packed",
    "Precision",
    "Quantized",
    "ScoreRule",
    "StepIndex",
    "add_rms_norm",
    "backends",
    "compute_layers",
    "copy_blocks",
    "decoder_layers",
    "gated_linear",
    "gelu_mul",
    "int8_is_faster",
    "keeping_backend",
    "linear",
    "linear_argmax",
    "pack_gated",
    "pack_linear",
    "packed_rows",
    "paged_attention",
    "populate",
    "rms_norm",
    "rope_kv_write",
    "rows_are_exact",
    "screen",
    "silu_mul",
    "stacked_blocks",
    "step_index",
    "stored_bytes",
    "use_eager",
]

Packed = Tensor | eager.RoundedMatrix | cpu.PackedLinear | cpu.RoundedPanels | cpu.PackedBlocks
"""A matrix [O, I]: as it is, rounded, or in a backend's own form."""

Quantized = eager.QuantizedMatrix | cpu.QuantizedPanels
"""A matrix [O, I] in 8 bits, with a scale per row."""

Gated = cpu.GatedPanels
"""A matrix [2F, I] in the form of `gated_linear`."""

DecoderLayers = cpu.DecoderLayers
"""A decoder's layers in a form that `compute_layers` knows."""

ArgmaxBounds = cpu.ArgmaxBounds
"""A matrix [O, I], and what tells `linear_argmax` where to look."""

_CPU_FORMS = cpu.PackedLinear | cpu.RoundedPanels | cpu.PackedBlocks | cpu.QuantizedPanels

_BACKENDS: dict[str, ModuleType] = {}  # device type → its kernels, from its first op on


def _backend(x: Tensor | BlockMatrix) -> ModuleType:
    device = "cpu" if x.is_cpu else x.device.type  # the longer way takes a tenth of a short op
    return _backend_of(device)


def _backend_of(device: str) -> ModuleType:
    return _BACKENDS.get(device) or _choose(device)


def _choose(device: str) -> ModuleType:
    chosen: ModuleType = eager
    if device == "cpu":
        problem = cpu.problem()
        if problem is None:
            chosen = cpu
        else:
            log.warning("the C++ kernels are not there: plain torch serves, more slowly", why=problem)
    _BACKENDS[device] = chosen
    return chosen


def use_eager(device: str, wanted: bool = True) -> None:
    """From now on, `device` runs plain torch, or again what is best for it."""
    if wanted:
        _BACKENDS[device] = eager
    else:
        _choose(device)


def rows_are_exact(device: str) -> bool:
    """Whether a row's result does not depend on the rows beside it, to the last bit."""
    return _backend_of(device) is cpu


def int8_is_faster(device: str) -> bool:
    """Return True if a device multiplies 8-bit matrices faster than float32: on CPUs, where C++ has VNNI to use.

    With AVX2 alone int8 has 0.97 of float32's throughput (`bench throughput`, workload mixed); plain torch only checks.
    """
    return _backend_of(device) is cpu and cpu.has_vnni()


@contextmanager
def keeping_backend(device: str) -> Iterator[None]:
    """Whatever is chosen inside, `device` then runs what it ran before."""
    before = _BACKENDS.get(device)
    try:
        yield
    finally:
        _BACKENDS.pop(device, None)
        if before is not None:
            _BACKENDS[device] = before


def backends(device: str) -> dict[str, bool]:
    """What can run on a device, the best first: name → what `use_eager` takes to choose it."""
    there = {"eager": True}
    if device == "cpu" and cpu.problem() is None:
        there = {f"C++ {cpu.variant()}": False} | there
    return there


class ScoreRule(NamedTuple):
    """How attention scores are made: (q · k) * scale, then soft_cap * tanh(score / soft_cap), then the mask.

    A token at position p sees the positions p - window + 1 .. p; without a window 0 .. p.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None


def step_index(
    slots_T: Tensor,
    block_tables_SB: Tensor,
    query_starts_X: npt.ArrayLike,
    lengths_S: npt.ArrayLike,
    kv_N2KBD: Tensor,
    prompt_S: npt.ArrayLike | None = None,
) -> StepIndex:
    """What `rope_kv_write` and `paged_attention` of every layer share in one step; see layers.attention.StepInputs.

    `query_starts_X`, `lengths_S` and `prompt_S` (default: of more than one token) are on the host. `kv_N2KBD` is any
    layer's cache: its shape counts, not its data.
    """
    made: StepIndex = _backend(slots_T).step_index(
        slots_T, block_tables_SB, query_starts_X, lengths_S, kv_N2KBD, prompt_S
    )
    return made


def rms_norm(x_NE: Tensor, weight_E: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / rms(x) * (offset + weight), computed in float32, in x's dtype. Any leading shape; new memory.

    Rows of two axes may lie farther apart than E.
    """
    out: Tensor = _backend(x_NE).rms_norm(x_NE, weight_E, eps, offset)
    return out


def add_rms_norm(x_NE: Tensor, residual_NE: Tensor, weight_E: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """residual += x, in place; then rms_norm(residual)."""
    out: Tensor = _backend(x_NE).add_rms_norm(x_NE, residual_NE, weight_E, eps, offset)
    return out


def rope_kv_write(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    cos_sin: tuple[Tensor, Tensor] | None,
    kv_N2KBD: Tensor,
    index: StepIndex,
) -> None:
    """Turns the first 2R numbers of each head of q and k in place: pairs (i, i + R), as in GPT-NeoX. cos, sin [T, R].

    Then puts each token's key and value into its slot; casts to the cache's dtype.
    """
    _backend(q_THD).rope_kv_write(q_THD, k_TKD, v_TKD, cos_sin, kv_N2KBD, index)


def paged_attention(
    q_THD: Tensor, kv_N2KBD: Tensor, index: StepIndex, rule: ScoreRule, out_THD: Tensor | None = None
) -> Tensor:
    """Attention of each token over its sequence's cached context, itself included (so write first). out_THD.

    Query head h reads kv head h // (H / K). Slots beyond a sequence's length never influence it, NaN included.
    Where `out_THD` is given, contiguous and of q's shape and dtype, the result is written there.
    """
    out: Tensor = _backend(q_THD).paged_attention(q_THD, kv_N2KBD, index, *rule, out_THD)
    return out


def copy_blocks(caches: Sequence[Tensor], sources: Sequence[int], targets: Sequence[int]) -> None:
    """Whole blocks within each layer's cache; a target may be a source too, and is read first."""
    _backend(caches[0]).copy_blocks(caches, sources, targets)


def populate(caches: Sequence[Tensor], first: int, last: int) -> None:
    """Blocks first .. last - 1 of each layer's cache get their memory now, where writing to it is what makes it."""
    if _backend(caches[0]) is cpu:
        cpu.populate(caches, first, last)


def silu_mul(x_T2F: Tensor) -> Tensor:
    """silu(first half) * second half along the last axis. out_TF."""
    out: Tensor = _backend(x_T2F).silu_mul(x_T2F)
    return out


def gelu_mul(x_T2F: Tensor) -> Tensor:
    """gelu(first half, tanh approximation) * second half along the last axis. out_TF."""
    out: Tensor = _backend(x_T2F).gelu_mul(x_T2F)
    return out


def pack_linear(weight_OI: Tensor | BlockMatrix, precision: Precision) -> Packed | Quantized:
    """Return the matrix in the form that `linear` multiplies with fastest on its device: a copy, or the matrix itself.

    A matrix in blocks gives the results of its float32 numbers, whether a backend keeps the blocks or not.
    Raises ValueError for a precision that a matrix of this dtype is not rounded to (see Precision).
    """
    packed: Packed | Quantized = _backend(weight_OI).pack_linear(weight_OI, precision)
    return packed


def pack_gated(weight_GI: Tensor | BlockMatrix, precision: Precision) -> Packed | Quantized | Gated:
    """The matrix [2F, I] of gates and then of what they multiply, in the form that `gated_linear` is fastest with."""
    packed: Packed | Quantized | Gated = _backend(weight_GI).pack_gated(weight_GI, precision)
    return packed


def gated_linear(
    x_NI: Tensor, matrix_GI: Packed | Quantized | Gated, bias_G: Tensor | None, activation: Literal["silu", "gelu"]
) -> Tensor:
    """`silu_mul` or `gelu_mul` of `linear`. out_NF; from row to row it may be farther than F."""
    backend = cpu if isinstance(matrix_GI, _CPU_FORMS | Gated) else _backend(x_NI)
    out: Tensor = backend.gated_linear(x_NI, matrix_GI, bias_G, activation)
    return out


def linear(x_NI: Tensor, matrix_OI: Packed | Quantized, bias_O: Tensor | None) -> Tensor:
    """x Wᵀ + b. With a matrix that was rounded, x is rounded alike. What was packed stays with its backend."""
    backend = cpu if isinstance(matrix_OI, _CPU_FORMS) else _backend(x_NI)
    out: Tensor = backend.linear(x_NI, matrix_OI, bias_O)
    return out


def screen(matrix_OI: Packed | Quantized) -> ArgmaxBounds | None:
    """The matrix as `linear_argmax` takes it, with more memory; None where that would be no faster than `linear`."""
    return cpu.screen(matrix_OI)


def linear_argmax(x_NI: Tensor, screen: ArgmaxBounds) -> tuple[Tensor, Tensor]:
    """The largest output feature of each row of `linear`, and its number, the first of equals. A NaN is the largest.

    Rounded products rule out all that cannot be the largest; what is left is multiplied as `linear` does it. [N], [N].
    """
    return cpu.linear_argmax(x_NI, screen)


def stored_bytes(matrix_OI: Packed | Quantized | Gated) -> int:
    """Bytes that the matrix is held in, scales and the like included: what a product reads of it."""
    if isinstance(matrix_OI, Gated):
        matrix_OI = matrix_OI.packed
    if isinstance(matrix_OI, Tensor):
        return matrix_OI.nbytes
    held = matrix_OI if isinstance(matrix_OI, tuple) else [getattr(matrix_OI, f.name) for f in fields(matrix_OI)]
    return sum(part.nbytes for part in held if isinstance(part, Tensor))


def packed_rows(matrix_OI: Packed, rows_N: Tensor) -> Tensor:
    """Rows of the matrix by number, [N, I]: an embedding's lookup in the matrix that is the LM head as well."""
    backend = cpu if isinstance(matrix_OI, _CPU_FORMS) else _backend(rows_N)
    out: Tensor = backend.packed_rows(matrix_OI, rows_N)
    return out


def decoder_layers(facts: DecoderFacts, device: str) -> DecoderLayers | None:
    """The layers as `compute_layers` takes them, once their matrices are packed; None if the device cannot."""
    return cpu.decoder_layers(facts) if _backend_of(device) is cpu else None


def compute_layers(
    layers: DecoderLayers,
    x_TE: Tensor,
    cos_sin: Sequence[tuple[Tensor, Tensor]],
    caches: Sequence[Tensor],
    index: StepIndex,
    rows_N: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """All layers at once, with the results of their ops one by one. `cos_sin` of each rope, `caches` of each layer.

    The last branch and the residual that it is to be added to, of the rows that come out, [N, E]. None if the backend
    in use cannot do it.
    """
    return layers.run(x_TE, cos_sin, caches, index, rows_N) if _backend(x_TE) is cpu else None
