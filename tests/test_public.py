"""The public surface of the package, and what importing it costs."""

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


def test_public_names():
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
def test_light_imports(code):
    assert loaded_by(code).isdisjoint(HEAVY)


def test_help_of_a_command_is_light():
    # some versions of typer import pydantic to read a command's arguments
    for command in (["run"], ["bench"], ["bench", "throughput"], ["bench", "host"], ["serve"]):
        code = f"from batchinfer.cli.main import main; main({[*command, '--help']})"
        assert loaded_by(code).isdisjoint({*HEAVY} - {"pydantic"}), command


def test_params_come_without_torch():
    assert "torch" not in loaded_by("from batchinfer import SamplingParams, Completion")
