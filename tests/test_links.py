"""Relative links in the pages and the notebooks lead somewhere, anchors included."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "examples" / "notebooks"
PAGES = [
    *ROOT.glob("*.md"),
    *(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
    *NOTEBOOKS.glob("*.ipynb"),
]
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")


@cache
def prose(path):
    """The Markdown of a page, without its code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    text = re.sub(r"^(`{3,}|~{3,})[^\n]*\n.*?^\1\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda code: code.group().replace("](", "] ("), text)


def anchors(text):
    """What headings can be linked to by: as GitHub makes them, and as Sphinx does for its own."""
    found, seen = set(), {}
    for title in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        again = seen[slug] = seen.get(slug, -1) + 1
        found |= {f"{slug}-{again}" if again else slug, re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")}
    return found | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


def broken(path):
    """The links of a page that lead nowhere."""
    for target in LINK.findall(prose(path)):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):  # of the web
            continue
        name, _, anchor = target.partition("#")
        where = (path.parent / name).resolve() if name else path
        if where.parent == ROOT / "docs" / "tutorials" and where.suffix == ".ipynb":
            where = NOTEBOOKS / where.name  # copied there when the documentation is built
        if not where.exists() or (anchor and anchor not in anchors(prose(where))):
            yield target


@pytest.mark.parametrize("path", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES])
def test_relative_links_and_anchors_lead_somewhere(path):
    assert list(broken(path)) == []


def test_broken_links_are_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# The paper's title\n\n## Twice\n\n## Twice\n\n```md\n## In code\n```\n")
    good = "[a](other.md) [b](other.md#the-papers-title) [c](other.md#the-paper-s-title) [d](other.md#twice-1)"
    bad = ["none.md", "other.md#in-code", "#nowhere", "other.md#twice-2"]
    code = "```python\nx[0](none.md)\n```\n`[x](none.md)`"
    links = " ".join(f"[x]({target})" for target in bad)
    page.write_text(f"# Page\n\n{good} [e](https://example.org/none) [f](#page)\n\n{links}\n\n{code}\n")
    assert list(broken(page)) == bad


def test_there_are_links_to_look_at():
    assert sum(len(LINK.findall(prose(path))) for path in PAGES) > 30
