"""The compiled library: its variants, one per instruction set, and the signatures of their functions.

Each function exists once per variant, as `name_variant`. Its threads are those of the OpenMP runtime that torch has
loaded, so torch must have been imported (see csrc/parallel.h).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from batchinfer_kernels.cpu.structs import STRUCTS, layout_text

VARIANTS = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "baseline")  # the best first
WITH_VNNI = {"amx", "avx512_bf16", "avx512_vnni"}  # with an instruction for sums of products of 8-bit integers
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_PATH = Path(__file__).with_name("_ops.so")
_SIGNATURES = {  # p pointer, n int64, i int, f float
    "paged_attention": "pnnppipnpppnnnnnfnfi",
    "rms_norm": "pnnnnppnffpni",
    "rope_kv_write": "pnnnpnnpnnppnpipnnnni",
    "copy_blocks": "pnnppni",
    "populate": "pnnni",
    "silu_mul": "pnnpi",
    "gelu_mul": "pnnpi",
    "linear_panel": "",
    "quantized_group": "",
    "rounded_together": "",
    "pack_linear": "pnnpii",
    "linear": "pnpippninnni",
    "block_bytes": "i",
    "pack_blocks": "pppnnpii",
    "block_rows": "pinpnpi",
    "make_screen": "pinnpppi",
    "linear_argmax": "pnppppippnnni",
    "pack_quantized": "pnnppi",
    "quantized_linear": "pnpppppninnni",
    "decoder_layers": "ppi",
    "interface": "pn",
}
_CTYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}

Function = Callable[..., int]


class InterfaceMismatch(Exception):
    """The compiled library was built from other sources than this Python code."""


class Functions:
    """The functions of one variant, by name.

    `interface` and functions without a pointer return sizes, all others 0, or 1 for want of memory.
    """

    def __init__(self, by_name: dict[str, Function]) -> None:
        self.__dict__.update(by_name)

    def __getattr__(self, name: str) -> Function:
        raise AttributeError(f"the compiled library has no function {name}")


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_PATH))


@cache
def variants() -> list[str]:
    """Return the compiled variants that this processor can run, the best first. Raises OSError without the library."""
    library = _library()
    compiled = [name for name in VARIANTS if hasattr(library, f"linear_{name}")]
    return [name for name in compiled if name == "baseline" or getattr(library, f"has_variant_{name}")()]


@cache
def load(variant: str) -> Functions:
    """Return the functions of `variant`. Raises InterfaceMismatch if C++ declares them, or a struct, differently."""
    functions = Functions({name: _function(name, variant) for name in _SIGNATURES})
    difference = interface_of(functions) ^ expected_interface()
    if difference:
        raise InterfaceMismatch(f"they were compiled from other sources (see {min(difference)}): install again")
    return functions


def _function(name: str, variant: str) -> Function:
    try:
        found = getattr(_library(), f"{name}_{variant}")
    except AttributeError:
        raise InterfaceMismatch(f"they were compiled from other sources (no {name}): install again") from None
    found.argtypes = [_CTYPES[letter] for letter in _SIGNATURES[name]]
    found.restype = ctypes.c_int
    made: Function = found
    return made


def interface_of(functions: Functions) -> set[str]:
    """Return what was compiled: one line per function and struct, as csrc/abi.h writes them."""
    text = ctypes.create_string_buffer(1 << 14)
    assert functions.interface(text, len(text)) < len(text)
    return set(text.value.decode().splitlines())


def expected_interface() -> set[str]:
    """Return the same lines of the tables on the Python side."""
    signatures = {f"{name} {letters}" for name, letters in _SIGNATURES.items()}
    return signatures | {f"{name} {layout_text(struct)}" for name, struct in STRUCTS.items()}


def checked(status: int) -> None:
    """Raise MemoryError if a function returned that its workspace could not be allocated."""
    if status:
        raise MemoryError("no memory for the workspace of a kernel")


def problem() -> str | None:
    """Return why the library cannot be used, None if it can."""
    if not _PATH.exists():
        return "they were not compiled when this was installed: it takes a C++ compiler"
    try:
        load(variants()[0])
    except (OSError, InterfaceMismatch) as error:
        return str(error)
    return None
