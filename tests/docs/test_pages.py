"""Paths, names and links of the documentation exist, and nothing tells a user to install another project's package."""

from __future__ import annotations

import importlib.util
import re
import subprocess

import pytest

from tests import frozen
from tests.docs.names import check_code
from tests.docs.pages import DOCS, PAGES, ROOT, anchors_of, links_of, name_of, prose_of

by_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@by_page
def test_names_exist(page):
    if page.name == "CHANGELOG.md":
        return  # of its time
    for code in re.findall(r"`([^`\n]+)`", prose_of(page)):
        check_code(code, name_of(page))


@by_page
def test_links_lead_somewhere(page):
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in anchors_of(target), f"{name_of(page)}: {link}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        assert page.relative_to(DOCS).as_posix() in nav


def test_generated_parts():
    generated = frozen.generated
    text = generated.on_page_markdown((DOCS / "jobs" / "reference.md").read_text(encoding="utf-8"))
    assert "<!-- generated" not in text and "| `output.chunk_rows` | integer | `1000` |" in text
    text = generated.on_page_markdown((DOCS / "cli.md").read_text(encoding="utf-8"))
    assert "## batchinfer bench host" in text and "Exit codes:" not in text
    with pytest.raises(KeyError):
        generated.on_page_markdown("<!-- generated: nothing -->")


def test_nobody_is_told_to_install_another_package():
    """`batchinfer` on the package index is somebody else's, and ours is not there."""
    said = re.compile(r"pip3?\s+install\s+(?:-\S+\s+)*['\"]?batchinfer(?!\S*\.whl)", re.IGNORECASE)
    extra = re.compile(r"['\"]batchinfer(?:-runner)?\[")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in listed.decode().split("\0"):
        path = ROOT / name
        if not name or not path.is_file() or path.suffix in (".parquet", ".so") or name.startswith("tests/docs/"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        assert not said.search(text) and not extra.search(text), name


def test_the_distribution_is_not_the_import_name():
    assert '\nname = "batchinfer-runner"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert importlib.util.find_spec("batchinfer") is not None
