"""Tests of the package's public names and of its import time."""

from __future__ import annotations

import subprocess
import sys

import pytest

import batchinfer

HEAVY = (
    "torch",
    "numpy",
    "pyarrow",
    "pydantic",
    "fsspec",
    "s3fs",
    "tokenizers",
    "transformers",
    "jinja2",
    "rich",
    "fastapi",
    "uvicorn",
)


def test_all_lists_the_public_names_and_unknown_ones_raise():
    assert batchinfer.__all__ == ["LLM", "Completion", "SamplingParams", "__version__"]
    assert all(getattr(batchinfer, name) for name in batchinfer.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        _ = batchinfer.Llm


def loaded_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import batchinfer",
        "import batchinfer.cli.main",
        "from batchinfer.cli.main import main; main(['--help'])",
        "from batchinfer.job.drain import Drain; from batchinfer.job.shard import resolve_shard",
    ],
)
def test_import_loads_no_heavy_module(code):
    assert loaded_by(code).isdisjoint(HEAVY)


def test_command_help_loads_no_heavy_module():
    # some versions of typer import pydantic to read a command's arguments
    for command in (["run"], ["bench"], ["bench", "throughput"], ["bench", "host"], ["serve"]):
        code = f"from batchinfer.cli.main import main; main({[*command, '--help']})"
        assert loaded_by(code).isdisjoint({*HEAVY} - {"pydantic"}), command


def test_sampling_params_import_without_torch():
    assert "torch" not in loaded_by("from batchinfer import SamplingParams, Completion")
