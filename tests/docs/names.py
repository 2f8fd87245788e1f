"""Names of the source tree in the documentation: paths, modules, classes and their members."""

from __future__ import annotations

import ast
import functools
import re

from tests.docs.pages import ROOT

_ROOTS = r"(?:batchinfer|kernels|tests|docs|jobs|\.github)"
_PATH = re.compile(rf"(?<![\w/.-])({_ROOTS}/(?:[\w.*/-]*[\w*]/?)?)")
_DOTTED = re.compile(r"\bbatchinfer(?:_kernels)?(?:\.\w+)+\b")
_MEMBER = re.compile(r"^([A-Z]\w+)\.(\w+)(?:\(.*\))?$")


def check_paths(text: str, where: str) -> None:
    """Assert that every path of the tree that a text names exists; `*` is a glob."""
    for path in _PATH.findall(text):
        found = any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists()
        assert found, f"{where}: {path} does not exist"


def check_code(code: str, where: str) -> None:
    """Assert that a piece of inline code that names a module, a class or a member names one that exists."""
    check_paths(code, where)
    for dotted in _DOTTED.findall(code):
        assert _resolves(dotted), f"{where}: {dotted} does not exist"
    member = _MEMBER.match(code)
    if member and member[1] in classes():
        assert member[2] in classes()[member[1]], f"{where}: {code}: {member[1]} has no such member"


@functools.cache
def classes() -> dict[str, set[str]]:
    """Return the members of every class of the tree by its name; an enumeration's or dataclass's fields too."""
    found: dict[str, set[str]] = {}
    for node in _nodes():
        if isinstance(node, ast.ClassDef):
            found.setdefault(node.name, set()).update(filter(None, map(_member, ast.walk(node))))
    return found


def _member(node: ast.AST) -> str | None:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return node.name
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    return node.attr if isinstance(node, ast.Attribute) else None


def _nodes():
    for path in _sources():
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


@functools.cache
def _sources():
    return sorted([*ROOT.glob("batchinfer/**/*.py"), *ROOT.glob("kernels/**/*.py")])


def _resolves(dotted: str) -> bool:
    """Return True if a dotted name is a package, a module, or a name that one holds."""
    names = dotted.split(".")
    folder = ROOT / "kernels" if names[0] == "batchinfer_kernels" else ROOT
    while names and (folder / names[0]).is_dir():
        folder = folder / names.pop(0)
    if names and (folder / f"{names[0]}.py").is_file():
        module = folder / f"{names.pop(0)}.py"
    else:
        module = folder / "__init__.py"
    text = module.read_text(encoding="utf-8")
    return all(re.search(rf"\b{name}\b", text) for name in names)
