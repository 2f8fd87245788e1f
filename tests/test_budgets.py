"""Style budgets: lengths of files and functions, parameters, attributes, nesting, annotations, import cycles.

Lengths are physical lines. A function runs from `def` to its last line; decorators, `self` and `cls` do not count.
Nesting counts if, for, while, with, try and match; an elif is as deep as its if.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("batchinfer/**/*.py"), *ROOT.glob("kernels/**/*.py")])

FILE_LINES = 450
FUNCTION_LINES = 70
KERNEL_LINES = 150  # a kernel's body is one long sequence of steps
FUNCTION_LINES_P95 = 40
PARAMETERS = 6
CONSTRUCTOR_PARAMETERS = 8
ATTRIBUTES = 15
DECLARATIONS = {"SamplingParams", "SamplingBody"}  # lists of user-settable fields, as long as the API is
NESTING = 3

Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)


@dataclass(frozen=True)
class FunctionFacts:
    where: str
    name: str
    lines: int
    parameters: int
    nesting: int
    annotated: bool


def functions_of(tree: ast.AST, where: str, method: bool = False) -> Iterator[FunctionFacts]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield _facts(node, f"{where}:{node.lineno} {node.name}", method)
        yield from functions_of(node, where, isinstance(node, ast.ClassDef))


def _facts(node: Function, where: str, method: bool) -> FunctionFacts:
    args = node.args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    if method and every and every[0].arg in ("self", "cls"):
        every = every[1:]
    annotated = (node.returns is not None or node.name == "__init__") and all(arg.annotation for arg in every)
    assert node.end_lineno is not None
    return FunctionFacts(where, node.name, node.end_lineno - node.lineno + 1, len(every), nesting(node), annotated)


def nesting(node: ast.AST) -> int:
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.ClassDef | ast.Lambda):
            continue  # measured on its own
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def attributes_of(node: ast.ClassDef) -> set[str]:
    """Return the attributes that methods assign on self and the annotated names of the class body."""
    declared = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    stored = {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
        if isinstance(n.value, ast.Name) and n.value.id == "self"
    }
    return declared | stored


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, known: set[str]) -> set[str]:
    """Return the modules of this tree that `tree` imports, inside functions too.

    An import of a name from a package counts as the package only if no module has that name.
    """
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {name if name in known else node.module for name in names}
    return imported & known


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


@pytest.fixture(scope="module")
def functions(trees: dict[Path, ast.Module]) -> list[FunctionFacts]:
    return [facts for path, tree in trees.items() for facts in functions_of(tree, str(path.relative_to(ROOT)))]


def assert_none(violations: Iterable[object]) -> None:
    lines = [str(violation) for violation in violations]
    assert not lines, "over budget:\n" + "\n".join(lines)


def test_files_are_short():
    long = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert_none(f"{where}: {lines} lines" for where, lines in long.items() if lines > FILE_LINES)


def test_functions_are_short(functions):
    def limit(facts: FunctionFacts) -> int:
        return KERNEL_LINES if facts.where.startswith("kernels/") else FUNCTION_LINES

    assert_none(f"{f.where}: {f.lines} lines" for f in functions if f.lines > limit(f))
    lengths = sorted(f.lines for f in functions)
    assert lengths[max(0, -(-len(lengths) * 95 // 100) - 1)] <= FUNCTION_LINES_P95


def test_functions_take_few_parameters(functions):
    def limit(facts: FunctionFacts) -> int:
        return CONSTRUCTOR_PARAMETERS if facts.name in ("__init__", "__new__") else PARAMETERS

    ours = [f for f in functions if not f.where.startswith("kernels/")]
    assert_none(f"{f.where}: {f.parameters} parameters" for f in ours if f.parameters > limit(f))


def test_nesting_is_shallow(functions):
    assert_none(f"{f.where}: nesting {f.nesting}" for f in functions if f.nesting > NESTING)


def test_everything_is_annotated(functions):
    assert_none(f"{f.where}: not fully annotated" for f in functions if not f.annotated)


def test_classes_own_few_attributes(trees):
    assert_none(
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {len(attributes_of(node))} attributes"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name not in DECLARATIONS and len(attributes_of(node)) > ATTRIBUTES
    )


def test_no_import_cycles(trees):
    known = {module_name(path) for path in trees}
    graph = {module_name(path): imports_of(tree, known) - {module_name(path)} for path, tree in trees.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_measures_of_a_sample_source_are_as_counted_by_hand():
    source = """
class Wide:
    declared: int = 0
    def method(self, a: int, *rest: int, key: str = "", **more: int) -> None:
        self.stored = 1
        if a:
            pass
        elif key:
            for _ in rest:
                with open("x"):
                    pass
def bare(x):
    def inner() -> None:
        while True:
            pass
"""
    tree = ast.parse(source)
    method, bare, inner = functions_of(tree, "x.py")
    assert (method.parameters, method.nesting, method.annotated, method.lines) == (4, 3, True, 8)
    assert (bare.parameters, bare.nesting, bare.annotated, bare.lines) == (1, 0, False, 4)
    assert (inner.nesting, inner.annotated) == (1, True)
    cls = tree.body[0]
    assert isinstance(cls, ast.ClassDef) and attributes_of(cls) == {"declared", "stored"}
    known = {"batchinfer.a", "batchinfer.b", "batchinfer"}
    text = "def f():\n    from batchinfer import a\n    from batchinfer.b import c\n    import batchinfer.b, os"
    assert imports_of(ast.parse(text), known) == {"batchinfer.a", "batchinfer.b"}
