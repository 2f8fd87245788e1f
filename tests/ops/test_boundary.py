"""Outside kernels/ and batchinfer/ops no code names a device, an instruction set or a backend."""

from __future__ import annotations

import ast
import io
import re
import tokenize

import pytest

from tests.test_budgets import ROOT

NAMES = re.compile(
    r"(?i:(?<![a-z])(cpu|cuda|gpu|avx\w*|amx|vnni|triton|eager)(?![a-z]))"
    r"|(CPU|Cpu|CUDA|Cuda|GPU|Gpu|AVX|Avx|AMX|Amx|VNNI|Vnni|Triton|Eager)(?![a-z])"  # within a class's name
)
NAMED = {
    # the processor of the machine that a benchmark describes
    "batchinfer/bench/machine.py": {"cpu", "cpu_count", "_cpu_name"},
    # a roofline is a bound of a processor by name, and needs none of its kernels
    "batchinfer/bench/processors.py": {"CPU", "CPU_DTYPES", "GPUS", "_gpu", "cpu", "find_gpu", "this_cpu"},
    "batchinfer/bench/roofline.py": {"CPU_DTYPES", "gpu"},
    "batchinfer/cli/bench.py": {"CPU", "_measure_cpu", "find_gpu", "gpu", "this_cpu"},
    "batchinfer/cli/main.py": {"is_eager"},  # an option of click
}
"""Identifiers that may stand in a file."""

PROSE = {
    "batchinfer/bench/machine.py": {"{machine.cpu}, ", "/sys/devices/system/cpu/", "/proc/cpuinfo"},
    "batchinfer/bench/processors.py": {'"cpu"', "--gpu {name}", "NVIDIA Ada GPU architecture white paper"},
    "batchinfer/bench/roofline.py": {'"a CPU"'},
    # help of options and job fields: users know their machine by these words
    "batchinfer/cli/bench.py": {"CPU threads. ", "Such as h200; or cpu", "Weights and activations"},
    "batchinfer/cli/help.py": {"Compute the least time that a GPU's bandwidth"},
    "batchinfer/spec.py": {"faster with AMX or AVX512_BF16", "CPU threads of the model"},
}
"""Parts of string literals that may."""


def test_no_code_above_the_boundary_names_a_device():
    found = []
    for path in sorted((ROOT / "batchinfer").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if not name.startswith("batchinfer/ops/"):
            found += [f"{name}:{line}: {text}" for line, text in _named(path.read_text()) if not _allowed(name, text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        *('x = "cuda:0"', "x = '''cpu'''", 'x = """cpu"""', 'f(f"{name}:cpu")', "x.is_cuda", "torch.device(CPU)"),
        *("import kernels.cpu", "from kernels.cpu import linear", "x = kernels.cpu.linear", "run = x.cpu"),
        *(
            "CPUBackend()",
            "from kernels import EagerBackend",
            "make_cpu_backend()",
            "isinstance(x, CudaGraphs)",
            "onCPU",
        ),
    ],
)
def test_a_name_of_a_device_is_found_however_it_is_written(source):
    assert _named(source)


def test_prose_and_copies_to_the_host_name_no_device():
    assert not _named('def f():\n    """On a GPU."""\n    return x.cpu()  # from the GPU')


def _named(source: str) -> list[tuple[int, str]]:
    """Return (line, text) of identifiers and string literals that name one, docstrings apart.

    A call `x.cpu()` is torch's name for a copy to the host, and counts as no name of a device.
    """
    docstrings = {
        (node.lineno, node.col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    found = []
    for at, token in enumerate(tokens):
        text = token.string
        copy = text == "cpu" and tokens[at - 1].string == "." and tokens[at + 1].string == "("
        kind = tokenize.tok_name[token.type]
        code = kind in ("NAME", "STRING", "FSTRING_MIDDLE") and not copy and token.start not in docstrings
        if code and NAMES.search(text):
            found.append((token.start[0], text))
    return found


def _allowed(name: str, text: str) -> bool:
    return text in NAMED.get(name, ()) or any(part in text for part in PROSE.get(name, ()))
