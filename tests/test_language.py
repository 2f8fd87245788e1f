"""Docstrings open with a verb or a noun, and one name means one class."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator

from tests.test_budgets import ROOT, SOURCES

PREPOSITIONS = {"as", "at", "by", "for", "from", "in", "of", "on", "than", "to", "with", "without"}
INTERROGATIVES = {"how", "what", "when", "where", "whether", "which", "who", "whose", "why", "whatever", "whoever"}
NOUN_CLAUSE = PREPOSITIONS | INTERROGATIVES | {"if", "that", "those", "wherever", "whichever"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def noun_clauses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, first words) of each docstring that opens with a noun clause."""
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        words = (text or "").split()
        if words and words[0].lower().rstrip(",.:;") in NOUN_CLAUSE:
            yield getattr(node, "lineno", 1), " ".join(words[:8])


def test_docstrings_open_with_a_verb_or_a_noun():
    found = [
        f"{path.relative_to(ROOT)}:{line} {words}"
        for path in SOURCES
        for line, words in noun_clauses(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "say what it does, in the imperative:\n" + "\n".join(found)


def test_class_names_are_unique():
    definitions = re.compile(r"^ *class (\w+)", re.MULTILINE)
    names = Counter(name for path in SOURCES for name in definitions.findall(path.read_text(encoding="utf-8")))
    assert not [name for name, count in names.items() if count > 1]


def test_noun_clause_is_found_whatever_its_node():
    source = '"""Where, in a module."""\nclass A:\n    """In-memory store."""\n    def f(self):\n        """Of it."""\n'
    assert list(noun_clauses(ast.parse(source))) == [(1, "Where, in a module."), (4, "Of it.")]


def test_comments_of_the_kernels_open_with_a_verb_or_a_noun():
    found = []
    for path in sorted((ROOT / "kernels" / "csrc").iterdir()):
        before = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            comment = re.match(r"\s*//+\s*([A-Za-z]*)", line)
            if comment and not before and comment[1].lower() in NOUN_CLAUSE:
                found.append(f"{path.name}:{number} {line.strip()}")
            before = comment is not None
    assert not found, "say what it does, in the imperative:\n" + "\n".join(found)
