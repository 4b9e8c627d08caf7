"""The notebooks of the examples run from the first cell to the last, and print what they are kept with."""

import json
from pathlib import Path

import pytest
from execute_notebooks import FOLDER, executed, texts

from helpers.printed import check_printed

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def stored(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["channel_numpy", "checking_the_paper", "fusing_checkpoints"]


@every_notebook
def test_it_is_kept_as_it_was_executed_and_small(path):
    notebook = stored(path)
    assert [cell["execution_count"] for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert path.stat().st_size < 300_000
    outputs = [output for cell in code(notebook) for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}  # no errors
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}  # no warnings


@every_notebook
def test_its_first_words_say_what_the_reader_will_have(path):
    cells = [cell for cell in stored(path)["cells"] if cell["cell_type"] == "markdown"]
    assert "At the end you will have" in "".join(cells[0]["source"])
    assert "## What comes next" in "".join(cells[-1]["source"])


@pytest.mark.slow
@every_notebook
@pytest.mark.filterwarnings("ignore")  # of the machinery in this process; the notebook runs in another one
def test_it_runs_and_prints_what_it_is_kept_with(path, monkeypatch):
    for package in ("nbclient", "nbformat", "ipykernel", "matplotlib"):
        pytest.importorskip(package, reason=f"needs {package}; python -m pip install -e '.[test]'")
    if any("transformers" in "".join(cell["source"]) for cell in code(stored(path))):
        pytest.importorskip("transformers", reason="needs transformers; python -m pip install -e '.[test]'")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbformat = pytest.importorskip("nbformat")
    fresh, kept = texts(executed(path)), texts(nbformat.read(path, as_version=4))
    assert len(fresh) == len(kept)
    for number, (printed, shown) in enumerate(zip(fresh, kept, strict=True), 1):
        check_printed(printed, shown, f"{path.name}, cell [{number}]")
