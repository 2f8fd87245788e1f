"""C++ (kernels/csrc) for float32 on CPUs; what it does not know goes to `eager`. Installed where a compiler is.

See `library.load`: `problem()` says why the backend cannot serve, if it cannot.
"""

from batchinfer_kernels.cpu.activation import gelu_mul, silu_mul
from batchinfer_kernels.cpu.copy_blocks import copy_blocks
from batchinfer_kernels.cpu.decoder_layers import DecoderLayers, decoder_layers
from batchinfer_kernels.cpu.gated_linear import GatedPanels, gated_linear, pack_gated
from batchinfer_kernels.cpu.library import has_vnni, problem, variant
from batchinfer_kernels.cpu.linear import (
    PackedBlocks,
    PackedLinear,
    QuantizedPanels,
    RoundedPanels,
    linear,
    pack_linear,
    packed_rows,
)
from batchinfer_kernels.cpu.linear_argmax import ArgmaxBounds, linear_argmax, screen
from batchinfer_kernels.cpu.memory import populate
from batchinfer_kernels.cpu.paged_attention import paged_attention
from batchinfer_kernels.cpu.rms_norm import add_rms_norm, rms_norm
from batchinfer_kernels.cpu.rope_kv_write import rope_kv_write
from batchinfer_kernels.cpu.step_index import step_index

__all__ = [
    "ArgmaxBounds",
    "DecoderLayers",
    "GatedPanels",
    "PackedBlocks",
    "PackedLinear",
    "QuantizedPanels",
    "RoundedPanels",
    "add_rms_norm",
    "copy_blocks",
    "decoder_layers",
    "gated_linear",
    "gelu_mul",
    "has_vnni",
    "linear",
    "linear_argmax",
    "pack_gated",
    "pack_linear",
    "packed_rows",
    "paged_attention",
    "populate",
    "problem",
    "rms_norm",
    "rope_kv_write",
    "screen",
    "silu_mul",
    "step_index",
    "variant",
]
