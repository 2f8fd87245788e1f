"""Name resolution in templates over a row, and the columns that a template needs.

A name is a column. `row` is the mapping of all columns, for names that Jinja cannot parse: `row['user-id']`. The name
of a Jinja function (`range`, `dict`, …) is the function if called, and a column otherwise; the same holds for methods
and keys of a mapping. A column named `row` shadows the mapping, but `row['user-id']` still finds the other columns.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.visitor import NodeTransformer

from batchinfer.text.sandbox import Sandbox

ROW = "row"
# names that no template can write: the variable with all columns, and the filter that converts a value to text
COLUMNS, TEXT = "columns of the row", "text of a value"
_FUNCTIONS = frozenset(Sandbox().globals)
_WORDS = frozenset(["true", "false", "none", "True", "False", "None", "not", "and", "or", "in", "is", "if", "else"])


@dataclass(frozen=True)
class Uses:
    """Names that a template reads from the row.

    variables: columns by their names. own: columns whose names Jinja resolves differently or cannot distinguish. keys:
    constant subscripts of `row`. whole: `row` is used in other ways, so that any column may be needed.
    """

    variables: frozenset[str]
    own: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()
    whole: bool = False

    def columns(self, known: Iterable[str]) -> frozenset[str]:
        """Return the columns needed from an input with the columns `known`, missing ones included."""
        known = frozenset(known)
        needed = {*self.variables, *self.own}
        for key in self.keys - known:
            if ROW in known:
                needed.add(ROW)
            elif not self.whole:
                needed.add(key)
        if self.whole:
            needed |= {ROW} if ROW in known else known
        return frozenset(needed | (self.keys & known))


def uses_of(source: str) -> Uses:
    tree = _PARSER.parse(source)
    loads = [node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"]
    called = [call.node.name for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name)]
    local = _local(tree)
    names = {
        name
        for name in meta.find_undeclared_variables(tree)
        if name not in _FUNCTIONS or loads.count(name) > called.count(name)
    }
    if "self" in loads and "self" not in local:
        names.add("self")
    own = frozenset(name for name in names if _is_own(name, local))
    variables = frozenset(names - own - {ROW})
    if ROW not in names or ROW in local:
        return Uses(variables, own, whole=ROW in names)
    methods = {id(call.node) for call in tree.find_all(nodes.Call)}
    parts = [node for node in tree.find_all((nodes.Getattr, nodes.Getitem)) if id(node) not in methods]
    keys = [key for key in map(_key_of_row, parts) if key is not None]
    return Uses(variables, own, frozenset(keys), loads.count(ROW) > len(keys))


def rewrite(tree: nodes.Template) -> None:
    """Rewrite a parsed template so that its names resolve by this module's rules."""
    _NameRewriter(_local(tree)).visit(tree)


def spelling(source: str, known: Iterable[str]) -> str:
    """Return a hint, for the end of a message, on how to write a column whose name Jinja cannot parse."""
    odd = [name for name in known if name in _WORDS or not name.isidentifier()]
    mentioned = [name for name in odd if name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", source)]
    name = max(mentioned, key=len, default=None)
    return "" if name is None else f"; the column {name!r} is written row[{name!r}]"


def _local(tree: nodes.Template) -> frozenset[str]:
    """Return the names that the template assigns somewhere; `self` is one of them if it has blocks."""
    stored = {node.name for node in tree.find_all(nodes.Name) if node.ctx != "load"}
    return frozenset(stored | {"self"} if tree.find(nodes.Block) is not None else stored)


def _is_own(name: str, local: frozenset[str]) -> bool:
    r"""Return True if a column of this name must be looked up as a key.

    Jinja compiles names to Python identifiers, which are equal if their NFKC forms are: "ü" and "u\u0308".
    """
    if name in local:
        return False
    return name in _FUNCTIONS or name == "self" or not unicodedata.is_normalized("NFKC", name) or name in _forms(local)


def _forms(names: Iterable[str]) -> frozenset[str]:
    return frozenset(unicodedata.normalize("NFKC", name) for name in names)


def _key_of_row(node: nodes.Node) -> str | None:
    """Return `x` of `row.x` and `row['x']`, or None."""
    if not isinstance(node, nodes.Getattr | nodes.Getitem) or not isinstance(node.node, nodes.Name):
        return None
    key = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
    return key if node.node.name == ROW and isinstance(key, str) else None


def _column(name: str) -> nodes.Expr:
    columns = nodes.Getitem(nodes.ContextReference(), nodes.Const(COLUMNS), "load")
    return nodes.Getitem(columns, nodes.Const(name), "load")


class _NameRewriter(NodeTransformer):
    def __init__(self, local: frozenset[str]) -> None:
        self._local = local
        self._changes: dict[type[nodes.Node], Callable[[Any], nodes.Node]] = {
            nodes.Name: self._name,
            nodes.Getattr: self._part,
            nodes.Getitem: self._part,
            nodes.Call: self._call,
            nodes.Concat: self._concat,
        }

    def get_visitor(self, node: nodes.Node) -> Any:
        return self._changes.get(type(node))

    def _name(self, node: nodes.Name) -> nodes.Node:
        return _column(node.name) if node.ctx == "load" and _is_own(node.name, self._local) else node

    def _part(self, node: nodes.Getattr | nodes.Getitem) -> nodes.Node:
        key = None if ROW in self._local else _key_of_row(node)
        return self.generic_visit(node) if key is None else _column(key)

    def _call(self, node: nodes.Call) -> nodes.Node:
        function = node.node
        node.node = nodes.Const(None)
        self.generic_visit(node)
        if isinstance(function, nodes.Getattr):
            parts = [self.visit(function.node), nodes.Const(function.attr)]
            node.node = nodes.Call(nodes.EnvironmentAttribute("method"), parts, [], None, None)
        else:
            node.node = function if isinstance(function, nodes.Name) else self.visit(function)
        return node

    def _concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [nodes.Filter(part, TEXT, [], [], None, None) for part in node.nodes]
        return node


_PARSER: jinja2.Environment = Sandbox()
_PARSER.globals.clear()  # so that columns with the name of a Jinja function count as undeclared
