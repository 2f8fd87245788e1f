"""GPU targets, the table of launch configurations, and cases of ahead-of-time compilation.

Wrappers ask `config` with the device they run on; `batchinfer_kernels.aot` asks it with every target. Nothing is tuned
at run time. This file imports no triton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True, slots=True)
class Target:
    """GPU architecture that kernels are compiled for, with the limits of one multiprocessor (CU at AMD)."""

    name: str
    backend: str  # of Triton: cuda or hip
    arch: int | str  # as Triton's GPUTarget takes it
    warp_size: int
    shared_bytes: int  # that one program can use
    warps: int  # resident on one multiprocessor, at most
    programs: int  # likewise
    float8_e4m3fn: bool  # Triton converts it: in hardware from sm_89 on, in software on gfx942


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, 64, 32, float8_e4m3fn=False),
        Target("sm_89", "cuda", 89, 32, 99 * 1024, 48, 24, float8_e4m3fn=True),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, 64, 32, float8_e4m3fn=True),
        Target("sm_100", "cuda", 100, 32, 227 * 1024, 64, 32, float8_e4m3fn=True),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, 32, 16, float8_e4m3fn=True),
    )
}
"""Targets that the gate compiles for; other devices run as the nearest of them (`target_of`)."""


class Launch(NamedTuple):
    """Launch configuration of a kernel. Block sizes that a kernel does not have are 0."""

    num_warps: int = 4
    num_stages: int = 1  # of the software pipeline
    block_n: int = 0  # keys, columns or vocabulary entries of one iteration
    block_m: int = 0  # rows of a program: of hidden states, or queries times heads of a group
    up_to_bytes: int = 1 << 30  # widest row (of K or V of a head, of hidden states) that the configuration is for

    @property
    def options(self) -> dict[str, int]:
        """Return what Triton's launch takes beside a kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


_LAUNCHES: Mapping[str, Mapping[str, Sequence[Launch]]] = {
    # kernel → target, or "" for targets without a line → configurations, narrow rows first
    "decode_attention": {  # block_m follows from the queries and the group
        "": (
            Launch(4, 4, block_n=64, up_to_bytes=256),
            Launch(4, 4, block_n=32, up_to_bytes=512),
            Launch(4, 2, block_n=32),
        ),
        "sm_80": (
            Launch(4, 3, block_n=64, up_to_bytes=128),
            Launch(4, 4, block_n=32, up_to_bytes=256),
            Launch(4, 3, block_n=32, up_to_bytes=512),
            Launch(4, 2, block_n=32),
        ),
        "sm_89": (
            Launch(4, 3, block_n=64, up_to_bytes=128),
            Launch(4, 3, block_n=32, up_to_bytes=512),
            Launch(4, 2, block_n=16),
        ),
        "gfx942": (Launch(4, 2, block_n=64, up_to_bytes=256), Launch(4, 2, block_n=32)),
    },
    "draft_attention": {  # decode attention with more than 16 rows
        "": (
            Launch(4, 3, block_n=64, up_to_bytes=256),
            Launch(4, 3, block_n=32, up_to_bytes=512),
            Launch(4, 2, block_n=32),
        ),
        "sm_80": (
            Launch(4, 3, block_n=32, up_to_bytes=256),
            Launch(8, 3, block_n=32, up_to_bytes=512),
            Launch(4, 2, block_n=16),
        ),
        "sm_89": (
            Launch(4, 3, block_n=32, up_to_bytes=256),
            Launch(8, 3, block_n=16, up_to_bytes=512),
            Launch(4, 2, block_n=16),
        ),
        "gfx942": (Launch(4, 2, block_n=32),),
    },
    "prompt_attention": {
        "": (
            Launch(4, 3, block_n=64, block_m=128, up_to_bytes=128),
            Launch(8, 3, block_n=64, block_m=128, up_to_bytes=256),
            Launch(8, 3, block_n=32, block_m=64, up_to_bytes=512),
            Launch(8, 2, block_n=32, block_m=64),
        ),
        "sm_80": (
            Launch(4, 3, block_n=64, block_m=64, up_to_bytes=128),
            Launch(4, 3, block_n=32, block_m=64, up_to_bytes=256),
            Launch(8, 3, block_n=32, block_m=64, up_to_bytes=512),
            Launch(8, 2, block_n=32, block_m=32),
        ),
        "sm_89": (
            Launch(4, 3, block_n=64, block_m=64, up_to_bytes=128),
            Launch(4, 3, block_n=32, block_m=64, up_to_bytes=256),
            Launch(4, 3, block_n=32, block_m=32, up_to_bytes=512),
            Launch(4, 2, block_n=16, block_m=32),
        ),
        "gfx942": (
            Launch(4, 2, block_n=64, block_m=64, up_to_bytes=128),
            Launch(4, 2, block_n=32, block_m=64, up_to_bytes=256),
            Launch(4, 2, block_n=32, block_m=32),
        ),
    },
    "merge_splits": {"": (Launch(4),)},
    "rms_norm": {
        "": (Launch(4, up_to_bytes=4096), Launch(8, up_to_bytes=16384), Launch(16)),
        "gfx942": (Launch(4, up_to_bytes=8192), Launch(8)),
    },
    "activation": {"": (Launch(4, block_n=2048),)},
    "rope_kv_write": {"": (Launch(4),)},
    "copy_blocks": {"": (Launch(4, block_n=2048),)},
    "step_inputs": {"": (Launch(4),)},
    "update_seats": {"": (Launch(4),)},
    "sample_rows": {"": (Launch(8, block_n=2048),)},
    "gather_logprobs": {"": (Launch(8, block_n=4096),)},
}


def config(kernel: str, device: torch.device | Target, row_bytes: int = 0) -> Launch:
    """Return the launch configuration of a kernel for rows of `row_bytes` bytes."""
    target = device if isinstance(device, Target) else target_of(device)
    lines = _LAUNCHES[kernel]
    launches = lines.get(target.name, lines.get("", ()))
    return next(launch for launch in launches if row_bytes <= launch.up_to_bytes)


@cache
def target_of(device: torch.device) -> Target:
    """Return the target whose limits and configurations hold on a device; for the CPU, with the interpreter, sm_90."""
    if device.type == "cpu":
        return TARGETS["sm_90"]
    if torch.version.hip:
        return TARGETS["gfx942"]
    capability = torch.cuda.get_device_capability(device)
    if capability in ((8, 0), (8, 7)):  # the others of 8.x, and 12.x, have the shared memory of 8.9
        return TARGETS["sm_80"]
    return TARGETS[{9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(capability[0], "sm_89")]


class Needs(NamedTuple):
    """Properties that a compiled kernel must have, beside the bounds of docs/design/kernels-gpu.md."""

    tensor_cores: bool = False
    async_copies: bool = False  # from global to shared memory (not on AMD, whose pipeline prefetches into registers)
    kv_buffers: int = 0  # of keys and values each, that loads run ahead into


NOTHING = Needs()
ATTENTION = Needs(tensor_cores=True, async_copies=True, kv_buffers=2)


@dataclass(frozen=True, slots=True)
class AotCase:
    """One compilation of a kernel for one target.

    Each kernel file has a function `aot_cases(target: Target) -> list[AotCase]`: about the shapes and dtypes that are
    run most, without those that the target lacks.
    """

    name: str  # kernel and variant, as in "decode_attention bfloat16 128": its row in the table of bounds
    function: Any  # of @triton.jit
    signature: Mapping[str, str]  # type of each argument but the constexprs: "*bf16", "*i64", "i32", "fp32"
    constexprs: Mapping[str, Any]
    launch: Launch
    divisible: Sequence[str] = ()  # arguments whose address or value is a multiple of 16
    needs: Needs = NOTHING
