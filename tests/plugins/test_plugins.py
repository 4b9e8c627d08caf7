"""What holds for all plug-ins: short, documented, tested, and nothing that the library itself would need."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for path in (ROOT / "examples" / "plugins").glob("*.py") if path.name != "__init__.py")
PACKAGES = {
    "channel_noise_training": set(),
    "federated_round": set(),
    "flower_messages": {"flwr"},
    "flower_strategy": {"flwr"},
    "fsdp2": {"safetensors"},
    "hf_accelerate": {"accelerate"},
    "hf_checkpoints": {"safetensors", "transformers"},
    "hf_trainer": {"transformers"},
    "lightning_callback": {"lightning"},
    "open_clip_finetuning": {"open_clip"},
    "peft_adapters": set(),  # PEFT's files are read without PEFT
    "timm_models": {"timm"},
}


def lines_of(path):
    """Every line that is not blank after the module docstring: comments and docstrings count too."""
    text = path.read_text(encoding="utf-8")
    docstring = ast.parse(text).body[0]
    return [line for line in text.splitlines()[docstring.end_lineno :] if line.strip()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_plug_in_has_at_most_30_lines_and_says_what_it_is_for(path):
    assert len(lines_of(path)) <= 30
    assert max(map(len, path.read_text(encoding="utf-8").splitlines())) <= 120
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert "::\n\n    " in docstring, "how to plug it in, as code"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_plug_in_imports_its_own_library_and_nothing_private(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    assert not [name for name in imported if re.search(r"\._", name)]
    packages = {name.partition(".")[0] for name in imported}
    assert packages - sys.stdlib_module_names - {"torch", "rmtllmf"} == PACKAGES[path.stem]


def test_every_plug_in_is_tested_and_shown():
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    shown = re.findall(r"```\{literalinclude\} \.\./examples/plugins/(\w+)\.py", page)
    assert sorted(shown) == [path.stem for path in FILES] == sorted(PACKAGES)
    for path in FILES:
        assert Path(__file__).with_name(f"test_{path.stem}.py").is_file()


def test_what_plug_ins_need_is_an_extra_and_no_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.split(">=", line)[0] for line in project["dependencies"]]
    extra = {re.split(">=", line)[0] for line in project["optional-dependencies"]["plugins"]}
    assert set().union(*PACKAGES.values()) - {"safetensors", "open_clip"} | {"peft"} == extra
    assert not extra & set(names)
