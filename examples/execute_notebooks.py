"""Run the notebooks in examples/notebooks from the first cell to the last, and store what they print and draw.

They are kept with their outputs, so that they can be read without being run, and so that the documentation shows them
as they are. After a change to a notebook, or to what the library prints:

    python examples/execute_notebooks.py                          all of them, about a minute on one core
    python examples/execute_notebooks.py channel_numpy            one of them

It needs the extra `test`. A test runs them afresh and compares the text of their outputs with what is stored.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "notebooks"
SECONDS = 600  # that a cell may take

# Pictures go into the notebook, whatever this shell prefers, and tqdm need not tell that there are no widgets.
ENVIRONMENT = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONWARNINGS": "ignore:IProgress"}
# What Jupyter writes down about the machine is left out, so that a notebook that is run again is the same file.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def executed(path: Path) -> Any:
    """The notebook after a fresh run, in a folder that is gone afterwards; whatever a cell raises is raised."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        client.execute(env=os.environ | ENVIRONMENT)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = _merged(cell.outputs)
    return notebook


def _merged(outputs: list[Any]) -> list[Any]:
    """What was printed in several pieces, of which the number depends on the machine's speed, as one."""
    merged: list[Any] = []
    for output in outputs:
        last = merged[-1] if merged else None
        if output.output_type == "stream" and last and last.get("name") == output.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def texts(notebook: Any) -> list[str]:
    """What each cell of code has printed, and its value as text; not its pictures."""
    return ["".join(map(_text, cell.outputs)) for cell in notebook.cells if cell.cell_type == "code"]


def _text(output: Any) -> str:
    if output.output_type == "stream":
        return output.text
    data = output.get("data", {})
    return "" if "image/png" in data else data.get("text/plain", "") + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run, write."""
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)}; default: all of them")
    options = parser.parse_args(arguments)
    for name in options.names or names:
        if name not in names:
            parser.error(f"NAME: expected one of {', '.join(names)}, got {name!r}")
        begin = time.monotonic()
        path = FOLDER / f"{name}.ipynb"
        notebook = executed(path)
        nbformat.write(notebook, path)
        print(f"{name}: {time.monotonic() - begin:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
