"""Eager backend: every op in plain torch, vectorised over sequences; runs on every device."""

from batchinfer_kernels.eager.activation import gelu_mul, silu_mul
from batchinfer_kernels.eager.block_matrix import BLOCK, BlockMatrix, stacked_blocks
from batchinfer_kernels.eager.copy_blocks import copy_blocks
from batchinfer_kernels.eager.gated_linear import gated_linear, pack_gated
from batchinfer_kernels.eager.linear import Matrix, linear, pack_linear, packed_rows
from batchinfer_kernels.eager.paged_attention import paged_attention
from batchinfer_kernels.eager.quantized_linear import QuantizedMatrix
from batchinfer_kernels.eager.rms_norm import add_rms_norm, rms_norm
from batchinfer_kernels.eager.rope_kv_write import rope_kv_write
from batchinfer_kernels.eager.rounded_linear import RoundedMatrix
from batchinfer_kernels.eager.step_index import step_index

__all__ = [
    "BLOCK",
    "BlockMatrix",
    "Matrix",
    "QuantizedMatrix",
    "RoundedMatrix",
    "add_rms_norm",
    "copy_blocks",
    "gated_linear",
    "gelu_mul",
    "linear",
    "pack_gated",
    "pack_linear",
    "packed_rows",
    "paged_attention",
    "rms_norm",
    "rope_kv_write",
    "silu_mul",
    "stacked_blocks",
    "step_index",
]
