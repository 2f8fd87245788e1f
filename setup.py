"""Build of the CPU kernels with the system's C++ compiler; all other metadata is in pyproject.toml.

One source is compiled once per instruction set and linked into one library, which selects a variant at run time.
Without a working compiler the install succeeds without the library, and plain torch is used.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("kernels/csrc")
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-fvisibility=hidden"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
VARIANTS = {"baseline": list[str]()}
if platform.machine() in ("x86_64", "AMD64"):
    AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    VNNI = [*AVX512, "-mavx512vnni"]
    BF16 = [*VNNI, "-mavx512bf16"]
    AMX = [*BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
    VARIANTS |= {"avx2": AVX2, "avx512": AVX512, "avx512_vnni": VNNI, "avx512_bf16": BF16, "amx": AMX}


class BuildKernels(build_ext):
    """Build step that calls compiler and linker directly.

    The library needs no Python or torch headers and no OpenMP runtime (see csrc/parallel.h).
    """

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if compiler is None:
            raise CompileError("no C++ compiler: none of c++, g++ and clang++ is installed, and CXX is not set")
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        command = [*compiler.split(), *FLAGS]
        variants = {name: flags for name, flags in VARIANTS.items() if _accepts_flags([*command, *flags])}
        compiles = [
            [*command, *flags, f"-DVARIANT={name}", "-c", str(SOURCES / "ops.cpp"), "-o", str(objects / f"{name}.o")]
            for name, flags in variants.items()
        ]
        compiles.append([*command, "-c", str(SOURCES / "cpu_features.cpp"), "-o", str(objects / "cpu_features.o")])
        _run_all(compiles)
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        inputs = [str(objects / f"{name}.o") for name in (*variants, "cpu_features")]
        built = objects / "_ops.so"
        _run_all([[*command, "-shared", *inputs, "-o", str(built)]])
        shutil.copyfile(built, library.with_suffix(".new"))
        library.with_suffix(".new").replace(library)  # atomic: a process that has the old library loaded keeps it


def _accepts_flags(command: list[str]) -> bool:
    """Return True if the compiler accepts these flags: older compilers lack the newest instruction sets."""
    try:
        return subprocess.run([*command, "-E", "-x", "c++", os.devnull], capture_output=True).returncode == 0
    except OSError as error:
        raise CompileError(f"cannot run {command[0]}: {error}") from None


def _run_all(commands: list[list[str]]) -> None:
    """Run commands in parallel. Raises CompileError if one fails."""
    running = [subprocess.Popen(command) for command in commands]
    failed = [process.args for process in running if process.wait()]
    if failed:
        raise CompileError(f"failed: {failed[0]}")


setup(
    ext_modules=[
        Extension(
            "batchinfer_kernels.cpu._ops",
            sources=["kernels/csrc/ops.cpp", "kernels/csrc/cpu_features.cpp"],
            depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
