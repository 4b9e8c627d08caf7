"""What the front pages say is true: their Python runs, their commands stand there, their names exist."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from helpers.printed import check_printed

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "docs/index.md", "docs/channel.md", "docs/fusion.md", "docs/rules.md", "docs/protection.md"]
GUIDES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs" / "guides").glob("*.md"))
WITHOUT_PYTHON = ["docs/guides/index.md", "docs/guides/several_machines.md"]
COMMANDS = (
    "python -m pip install -e '.[examples]' && python examples/quickstart.py",
    "python -m pip install -e '.[test]' && python -m pytest",
)


def python_blocks(path):
    """First line, code, and the output shown in a ```text block right after it, of every ```python block."""
    text = path.read_text(encoding="utf-8")
    pattern = r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?"
    for match in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, match.start(1)), match.group(1), match.group(2)


@pytest.mark.parametrize("page", [*PAGES, "docs/design.md", *(page for page in GUIDES if page not in WITHOUT_PYTHON)])
def test_python_blocks_run_in_order(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a snippet must not depend on, or write to, the checkout
    blocks = list(python_blocks(ROOT / page))
    assert blocks
    namespace = {"__name__": "__main__"}
    for line, code, shown in blocks:
        packages = re.findall(r"^(?:from|import) (transformers|peft)\b", code, re.MULTILINE)
        if any(importlib.util.find_spec(package) is None for package in packages):
            continue  # nothing after such a block needs it
        exec(compile("\n" * line + code, str(ROOT / page), "exec"), namespace)
        printed = capsys.readouterr().out
        assert "nan" not in printed
        if shown:
            check_printed(printed, shown, f"{page}:{line}")


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
@pytest.mark.parametrize("command", COMMANDS)
def test_quick_start_commands_stand_alone_on_their_lines(page, command):
    lines = [line.strip() for line in (ROOT / page).read_text(encoding="utf-8").splitlines()]
    assert lines.count(command) == 1


def test_the_quick_start_is_exactly_these_two_commands():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Quick start")[1].split("\n## ")[0]
    shell = re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert tuple(block.strip() for block in shell) == COMMANDS


def test_every_name_in_the_readmes_table_exists():
    rows = re.findall(r"^\| `rmtllmf\.(\w+)` \|[^|]*\|([^|]*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [part for part, _ in rows] == [
        "channel",
        "taskvec",
        "resilience",
        "metrics",
        "clip",
        "plot",
        "errors",
    ]
    for part, cell in rows:
        public = importlib.import_module(f"rmtllmf.{part}").__all__
        assert set(re.findall(r"`(\w+)`", cell)) <= set(public)


def test_every_picture_is_shown_somewhere_and_small():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    pictures = sorted((ROOT / "docs" / "_static").glob("*.png"))
    assert len(pictures) >= 4
    for picture in pictures:
        assert f"](_static/{picture.name})" in pages
        assert picture.stat().st_size < 150_000
