"""Static figures of a compiled kernel, read from its machine code and from Triton's GPU dialect (TTGIR).

K/V buffers are counted in TTGIR: the pipeliner allocates the shared memory of a load that it runs ahead with as
`ttg.local_alloc : () -> !ttg.memdesc<2x64x128xbf16, …, mutable>`, where the first of three axes counts the buffers. The
figure is the smallest such count over all pipelined loads of keys and values in each of the kernel's loops: floats,
or bytes that hold float8 (32-bit integers are block ids). On AMD the loads of the next iteration wait in registers
until its buffer is free, one more than shared memory holds.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from batchinfer_kernels.triton.targets import Target

_RESERVED = 1024  # bytes of shared memory that the driver takes for each program (sm_80 and later)
_REGISTERS = 65536  # of one multiprocessor
_SASS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", re.MULTILINE)
_MMA = re.compile(r"[A-Z]G?MMA|UTC[A-Z]*MMA")
_ASYNC = ("LDGSTS", "UTMALDG", "UBLKCP")  # cp.async, and TMA's two forms
_BUFFERS = re.compile(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x(?:bf16|f16|f32|f8\w+|i8)\W.*mutable>")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")


class Figures(NamedTuple):
    """Figures of one kernel on one target."""

    registers: int  # of a thread; AMD's include accumulation registers
    spilled_bytes: int  # of a thread, to local memory
    shared_bytes: int
    mma: int  # tensor-core instructions
    async_copies: int  # from global to shared memory
    kv_buffers: int  # of the load with the fewest; 0: no load is pipelined
    pipelined_loads: int
    occupancy: float  # resident warps, of those that a multiprocessor can hold
    limit: str  # of the occupancy


def figures_of(compiled: Any, target: Target) -> Figures:
    """Return the figures of what `triton.compile` returned."""
    buffers = [int(count) for count in _BUFFERS.findall(compiled.asm["ttgir"])]
    if target.backend == "hip":
        return _amd_figures(compiled.asm["amdgcn"], compiled.metadata.shared, [count + 1 for count in buffers])
    return _nvidia_figures(compiled, target, buffers)


def _nvidia_figures(compiled: Any, target: Target, buffers: list[int]) -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = _RESOURCES.search(_run("cuobjdump", "--dump-resource-usage", str(cubin)))
        opcodes = _SASS.findall(_run("nvdisasm", "-c", str(cubin)))
    if resources is None or not opcodes:
        raise ValueError("cuobjdump or nvdisasm printed nothing that this version of the gate can read")
    registers, stack = map(int, resources.groups())
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    occupancy, limit = _occupancy(target, registers, shared, warps)
    return Figures(
        registers=registers,
        spilled_bytes=stack or 4 * sum(opcode in ("LDL", "STL") for opcode in opcodes),
        shared_bytes=shared,
        mma=sum(_MMA.fullmatch(opcode) is not None for opcode in opcodes),
        async_copies=sum(opcode in _ASYNC for opcode in opcodes),
        kv_buffers=min(buffers, default=0),
        pipelined_loads=len(buffers),
        occupancy=occupancy,
        limit=limit,
    )


def _run(tool: str, *arguments: str) -> str:
    import triton.backends.nvidia

    path = Path(triton.backends.nvidia.__file__).parent / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _occupancy(target: Target, registers: int, shared: int, warps: int) -> tuple[float, str]:
    """Return the share of resident warps, and what limits it.

    A warp's registers are given out in units of 256, shared memory in units of 128 bytes (CUDA's occupancy calculator).
    """
    per_warp = -(-registers * target.warp_size // 256) * 256
    per_program = -(-(shared + _RESERVED) // 128) * 128
    programs, limit = min(
        (_REGISTERS // per_warp // warps, "registers"),
        ((target.shared_bytes + _RESERVED) // per_program, "shared memory"),
        (target.warps // warps, "warps"),
        (target.programs, "programs"),
    )
    return programs * warps / target.warps, limit


def _amd_figures(assembly: str, shared: int, buffers: list[int]) -> Figures:
    def number(key: str) -> int:
        found = re.findall(rf"\.{key}:\s+(\d+)", assembly)
        if not found:
            raise ValueError(f"the assembly does not state {key}: this version of the gate cannot read it")
        return int(found[-1])

    def count(pattern: str) -> int:
        return len(re.findall(rf"^\s+{pattern}", assembly, re.MULTILINE))

    waves = re.findall(r"; Occupancy: (\d+)", assembly)  # of one SIMD, which holds 8; the compiler knows all limits
    return Figures(
        registers=number("vgpr_count"),
        spilled_bytes=number("private_segment_fixed_size") or 4 * number("vgpr_spill_count"),
        shared_bytes=shared,
        mma=count(r"v_mfma"),
        async_copies=count(r"(?:global|buffer)_load\S* .*\blds\b"),
        kv_buffers=min(buffers, default=0),
        pipelined_loads=len(buffers),
        occupancy=int(waves[-1]) / 8 if waves else 0.0,
        limit="",
    )
