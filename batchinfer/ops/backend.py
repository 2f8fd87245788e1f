"""Backend protocol: the ops of a forward pass by name, packing of weights, step index, layer stack and KV memory.

State: a backend owns its compiled code and what it packed or allocated; nothing of a step survives the step, except
keys and values. Owner: load makes one (`choose.load_backend`) and hands it to the decoder, its layers and the runner.
Flow of a step: `prepare` once, then the layer stack that `layer_stack` gave at load, or the ops one by one.
Failure: an op that a backend cannot do is handed to a slower backend, which is logged once with op, dtype and shape;
MemoryError or torch's OutOfMemoryError if memory runs out; the step then failed as a whole and may be run again.

T tokens of a step · S sequences · N blocks (or rows, in norms and linear layers) · K kv heads · H query heads ·
B slots per block · D head size · R rotated pairs of a head · E hidden size · F feed-forward size · G = 2F ·
O, I features out and in
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from batchinfer_kernels.contract import (
    ArgmaxBounds,
    AttentionFacts,
    BlockNumbers,
    Capabilities,
    CosSin,
    KVMemory,
    LayerStack,
    Report,
    ScoreRule,
    StepIndex,
    StepInputs,
)
from batchinfer_kernels.formats import Activation, BlockMatrix, DecoderFacts, PackedMatrix, Precision
from torch import Tensor

from batchinfer.ops.step_kernels import StepKernels


class Backend(Protocol):
    """Kernels of one device. Every backend gives an op the same meaning: that of tests/kernels/naive.py."""

    @property
    def device(self) -> torch.device:
        """Return the device that tensors given to the ops are on."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def steps(self) -> StepKernels | None:
        """Return the ops of steps whose tokens stay on the device; None: the host waits for each step."""

    # -- norms and activations ------------------------------------------------------------------------------------

    def rms_norm(self, x_NE: Tensor, weight_E: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """Return x / rms(x) * (offset + weight), computed in float32, in x's dtype. Any leading shape; new memory.

        Rows of two axes may lie farther apart than E.
        """

    def add_rms_norm(
        self, x_NE: Tensor, residual_NE: Tensor, weight_E: Tensor, eps: float, offset: float = 0.0
    ) -> Tensor:
        """Add x to the residual in place; return rms_norm(residual)."""

    def silu_mul(self, x_T2F: Tensor) -> Tensor:
        """Return silu(first half) * second half along the last axis, [T, F]."""

    def gelu_mul(self, x_T2F: Tensor) -> Tensor:
        """Return gelu(first half, tanh approximation) * second half along the last axis, [T, F]."""

    # -- matrices -------------------------------------------------------------------------------------------------

    def pack(self, weight_OI: Tensor | BlockMatrix, precision: Precision) -> PackedMatrix:
        """Return the matrix in the form that `linear` is fastest with: a copy, or the matrix itself.

        Blocks give the results of their float32 numbers, whether a backend keeps them or not. Raises ValueError for a
        precision that does not go with the weight's dtype (see Precision).
        """

    def pack_gated(self, weight_GI: Tensor | BlockMatrix, precision: Precision) -> PackedMatrix:
        """Pack a matrix [2F, I], gates and then what they multiply, for `gated_linear`. See `pack`."""

    def pack_rows(self, weight_OI: Tensor | BlockMatrix) -> PackedMatrix:
        """Pack a matrix for `packed_rows` alone: an embedding that is not the LM head as well."""

    def linear(self, x_NI: Tensor, matrix_OI: PackedMatrix, bias_O: Tensor | None) -> Tensor:
        """Return x Wᵀ + b. With a matrix that was rounded, x is rounded alike."""

    def gated_linear(
        self, x_NI: Tensor, matrix_GI: PackedMatrix, bias_G: Tensor | None, activation: Activation
    ) -> Tensor:
        """Return `silu_mul` or `gelu_mul` of `linear`, [N, F]; the row stride may exceed F."""

    def packed_rows(self, matrix_OI: PackedMatrix, rows_N: Tensor) -> Tensor:
        """Return rows of the matrix by number, [N, I]: an embedding's lookup."""

    def argmax_bounds(self, matrix_OI: PackedMatrix) -> ArgmaxBounds | None:
        """Return what `linear_argmax` needs beside the matrix, in more memory. None if it would save no time."""

    def linear_argmax(self, x_NI: Tensor, bounds: ArgmaxBounds) -> tuple[Tensor, Tensor]:
        """Return the largest output feature of each row of `linear`, and its index, [N] each.

        Of equal ones the first; a NaN is the largest. Products in bfloat16 rule out features that cannot be the
        largest; the rest is multiplied as `linear` does it.
        """

    # -- attention ------------------------------------------------------------------------------------------------

    def prepare(self, step: StepInputs, kv_N2KBD: Tensor, attention: AttentionFacts) -> StepIndex:
        """Build what `rope_kv_write` and `paged_attention` of every layer share in one step, before the first layer.

        `kv_N2KBD` is any layer's cache: its shape and dtype count, not its data.
        """

    def rope_kv_write(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        cos_sin: CosSin | None,
        kv_N2KBD: Tensor,
        index: StepIndex,
    ) -> None:
        """Rotate the first 2R numbers of each head of q and k in place: pairs (i, i + R), as in GPT-NeoX.

        Then write each token's key and value into its slot, cast to the cache's dtype. `cos_sin` None: no rotation.
        """

    def paged_attention(
        self, q_THD: Tensor, kv_N2KBD: Tensor, index: StepIndex, rule: ScoreRule, out_THD: Tensor | None = None
    ) -> Tensor:
        """Return attention of each token over its sequence's cached context, itself included (so write first).

        Query head h reads kv head h // (H / K). Slots beyond a sequence's length never influence it, NaN included.
        `out_THD`, contiguous and of q's shape and dtype, is where the result is written if given.
        """

    # -- layers and KV cache --------------------------------------------------------------------------------------

    def layer_stack(self, facts: DecoderFacts, op_by_op: LayerStack) -> LayerStack:
        """Return the layers in the fastest form there is for them, once at load: `op_by_op` itself, or one around it.

        A step that the faster form cannot do is handed to `op_by_op`.
        """

    def allocate_kv(self, shape: Sequence[int], num_layers: int, dtype: torch.dtype) -> KVMemory:
        """Allocate kv_N2KBD of every layer, uninitialised: a slot is written before it is read.

        Raises RuntimeError if there is no room.
        """

    def copy_blocks(self, caches: Sequence[Tensor], sources: BlockNumbers, targets: BlockNumbers) -> None:
        """Copy whole blocks within each layer's cache; a target may be a source too, and is read first.

        With numbers on the device nothing waits for it.
        """


class BackendModule(Protocol):
    """Module of a backend, as the table of devices names it."""

    def problem(self, device: str) -> str | None:
        """Return why the backend cannot serve the device on this machine, None if it can. Never raises."""

    def make_backend(self, device: str, report: Report) -> Backend:
        """Return the backend of a device; it calls `report` once for each kind of fallback (see contract.Fallbacks)."""
