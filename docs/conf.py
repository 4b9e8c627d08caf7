"""Sphinx configuration. Build with: sphinx-build -W -b html docs docs/_build/html."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rmtllmf

project = "rmtllmf"
author = "rmtllmf developers"
copyright = "rmtllmf developers"
version = release = rmtllmf.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

# The tutorials are the notebooks of the examples, with the outputs that they are kept with: nothing is executed here.
# They are copied to where Sphinx looks for pages, and only if they have changed, so that it does not read them anew.
nb_execution_mode = "off"
nb_merge_streams = True
DOCS = Path(__file__).resolve().parent
for notebook in (DOCS.parent / "examples" / "notebooks").glob("*.ipynb"):
    # links are written for where the notebooks are
    page = notebook.read_text(encoding="utf-8").replace("](../../docs/", "](../")
    shown = DOCS / "tutorials" / notebook.name
    if not shown.exists() or shown.read_text(encoding="utf-8") != page:
        shown.write_text(page, encoding="utf-8")

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
# short names in signatures; api/index.md says what they stand for
ALIASES = "Array ArrayLike Batches Correlation Fading Head Loss MakeOptimizer PathLoss Placement Seed "
ALIASES += "StateLike Tasks Template Tensors"
autodoc_type_aliases = {name: name for name in (*ALIASES.split(), "Tokenizer")}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]
# `name` in single backquotes in a docstring is code
default_role = "code"

html_theme = "furo"
html_title = f"rmtllmf {release}"
