"""Outside kernels/ and batchinfer/ops no code names a device, an instruction set or a backend."""

from __future__ import annotations

import io
import re
import tokenize

from tests.test_budgets import ROOT

NAMES = re.compile(r"(?<![a-z])(cpu|cuda|gpu|avx\w*|amx|vnni|triton|eager)(?![a-z])", re.IGNORECASE)
NAMED = {
    # the processor of the machine that a benchmark describes
    "batchinfer/bench/machine.py": {"cpu", "cpu_count", "_cpu_name"},
    "batchinfer/cli/main.py": {"is_eager"},  # an option of click
}
"""Identifiers that may stand in a file."""

PROSE = {
    "batchinfer/bench/machine.py": {"{machine.cpu}, ", "/sys/devices/system/cpu/", "/proc/cpuinfo"},
    # help of options and job fields: users know their machine by these words
    "batchinfer/cli/bench.py": {"CPU threads. "},
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


def _named(source: str) -> list[tuple[int, str]]:
    """Return (line, text) of identifiers and string literals that name one, docstrings apart.

    `x.cpu()` is torch's name for a copy to the host, and counts as no name of a device.
    """
    found, before = [], ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string
        docstring = text.startswith('"""')
        kind = tokenize.tok_name[token.type]
        copy = text == "cpu" and before == "."
        if kind in ("NAME", "STRING", "FSTRING_MIDDLE") and NAMES.search(text) and not docstring and not copy:
            found.append((token.start[0], text))
        before = text
    return found


def _allowed(name: str, text: str) -> bool:
    return text in NAMED.get(name, ()) or any(part in text for part in PROSE.get(name, ()))
