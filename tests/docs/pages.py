"""The documentation as data: its pages, fenced blocks, headings and links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    *sorted(DOCS.rglob("*.md")),
]

_FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")
_TITLE = re.compile(r'title="([^"]+)"')
_HEADING = re.compile(r"^#{1,6} +(.+?) *$")
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block. `line` is that of its first line of text, from 1."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str

    @property
    def where(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order; an unclosed one fails."""
    return _split(page)[0]


def prose_of(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return _split(page)[1]


def anchors_of(page: Path) -> set[str]:
    """Return the ids that headings get, as GitHub and mkdocs build them."""
    found = (_HEADING.match(line) for line in prose_of(page).splitlines())
    return {_slug(match[1]) for match in found if match}


def links_of(page: Path) -> list[str]:
    """Return the targets of links that are no URLs."""
    return [target for target in _LINK.findall(prose_of(page)) if "://" not in target]


def _slug(heading: str) -> str:
    text = re.sub(r"[^\w\- ]", "", heading.lower())
    return re.sub(r"[\s-]+", "-", text).strip("-")


def _split(page: Path) -> tuple[list[Block], str]:
    blocks: list[Block] = []
    prose: list[str] = []
    inside: list[str] | None = None
    fence, info, start = "", "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        match = _FENCE.match(line)
        if inside is None and match:
            assert not match[1], f"{page}:{number}: indented fences are not read"
            inside, fence, info, start = [], match[2], match[3].strip(), number + 1
        elif inside is not None and match and match[2].startswith(fence) and not match[3].strip():
            title = _TITLE.search(info)
            language = info.split()[0] if info else ""
            blocks.append(Block(page, start, language, title[1] if title else None, "\n".join(inside) + "\n"))
            inside = None
        elif inside is not None:
            inside.append(line)
        else:
            prose.append(line)
    assert inside is None, f"{page}:{start}: this block has no end"
    return blocks, "\n".join(prose)
