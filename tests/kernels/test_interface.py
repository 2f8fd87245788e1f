"""The C++ interface and its ctypes mirror: parsed from the sources, and compared when the library is loaded."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
from batchinfer_kernels.cpu import library, structs

CSRC = Path(__file__).parents[2] / "kernels" / "csrc"
CODE = "\n".join(re.sub(r"//.*", "", path.read_text()) for path in sorted(CSRC.glob("*.[hc]*")))
NUMBERS = {"int64_t": "n", "int": "i", "float": "f"}


def letter_of(declaration: str) -> str:
    """Return the letter of a parameter or field such as `const float* x`."""
    return "p" if "*" in declaration else NUMBERS[declaration.split()[0]]


def ops_in_source() -> dict[str, str]:
    found = re.findall(r"^OP\((\w+)\)\(([^)]*)\)", CODE, re.MULTILINE)
    return {name: "".join(letter_of(one.strip()) for one in args.split(",") if one.strip()) for name, args in found}


def fields_in_source(struct: str) -> list[str]:
    body = re.search(rf"^struct {struct} \{{(.*?)^\}};", CODE, re.MULTILINE | re.DOTALL)
    assert body, struct
    declared = [line.strip() for line in body[1].split(";") if line.strip()]
    return [re.findall(r"\w+", name)[-1] for line in declared for name in line.split(",")]


def loaded_with(monkeypatch: pytest.MonkeyPatch, **changes: object) -> str | None:
    """Return the message of `problem` if parts of `library` are replaced."""
    for name, value in changes.items():
        monkeypatch.setattr(library, name, value)
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    return library.problem()


def test_signatures_are_those_of_the_source():
    assert ops_in_source() == library._SIGNATURES


@pytest.mark.parametrize("name", structs.STRUCTS)
def test_mirrored_fields_have_the_names_and_order_of_the_source(name):
    assert [field[0] for field in structs.STRUCTS[name]._fields_] == fields_in_source(name)


@pytest.mark.usefixtures("compiled")
class TestCompiled:
    def test_every_variant_has_the_interface_that_python_expects(self):
        for variant in library.variants():
            assert library.interface_of(library.load(variant)) == library.expected_interface()

    def test_an_argument_of_another_type_is_a_problem_and_no_call(self, monkeypatch):
        signatures = library._SIGNATURES | {"rms_norm": library._SIGNATURES["rms_norm"].replace("f", "n")}
        assert "see rms_norm" in loaded_with(monkeypatch, _SIGNATURES=signatures)

    def test_a_function_that_was_not_compiled_is_a_problem(self, monkeypatch):
        problem = loaded_with(monkeypatch, _SIGNATURES={**library._SIGNATURES, "newer_op": "p"})
        assert problem == "they were compiled from other sources (no newer_op): install again"

    @pytest.mark.parametrize(
        "fields",
        [
            [("weight", structs.POINTER), ("size", structs.INT64), ("offset", structs.FLOAT)],
            [("weight", structs.POINTER), ("eps", structs.FLOAT), ("offset", structs.FLOAT), ("size", structs.INT64)],
            [("weight", structs.INT64), ("size", structs.INT64), ("eps", structs.FLOAT), ("offset", structs.FLOAT)],
        ],
        ids=["size", "order", "type"],
    )
    def test_a_struct_laid_out_otherwise_is_a_problem(self, monkeypatch, fields):
        other = type("Other", (ctypes.Structure,), {"_fields_": fields})
        assert "see Norm" in loaded_with(monkeypatch, STRUCTS={**structs.STRUCTS, "Norm": other})
