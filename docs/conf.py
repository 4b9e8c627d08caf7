"""Sphinx configuration. Build with: sphinx-build -W -b html docs docs/_build/html."""

import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx.domains.python import PyXRefRole

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
# `name` in single backquotes in a docstring is code, and a link where the name is one of the library's
default_role = "name"
# long formulas are broken into lines where the page is narrow
mathjax4_config = {"output": {"displayOverflow": "linebreak"}}

html_theme = "furo"
html_title = f"rmtllmf {release}"
html_static_path = ["_css"]
html_css_files = ["site.css"]


RAISES = re.compile(r"(?:\w*(?:Error|Warning), )*\w*(?:Error|Warning): ")
RAISED = re.compile(rf"(?<=[;.]) (?={RAISES.pattern})")


class Name(PyXRefRole):
    """A name in single backquotes in a docstring is looked up; anything else is code as it stands."""

    def run(self):
        if re.fullmatch(r"[A-Za-z_][\w.]*", self.text):
            self.name = "py:obj"
            return super().run()
        return [nodes.literal(self.rawtext, self.text)], []


def tidy(app, what, name, obj, options, lines):
    """Before napoleon reads the docstring: an entry for each exception under Raises, and a source as one paragraph."""
    sections = [[]]
    for line in lines:
        after = sections[-1][:1] == ["Raises:"] or sections[-1][-1:] == [""]
        if line.startswith(("Raises:", "Source:")) or (after and line and not line.startswith(" ")):
            sections.append([])
        sections[-1].append(line)
    lines[:] = []
    for section in sections:
        if section[:1] == ["Raises:"]:
            entries = RAISED.split(" ".join(line.strip() for line in section[1:]).strip())
            others = [entry for entry in entries if not RAISES.match(entry)]  # such as "As `realign`."
            lines += [f"Raises: {other[0].lower()}{other[1:].rstrip(';')}" for other in others]
            if len(others) < len(entries):
                lines += ["", "Raises:", *(f"    {entry.rstrip(';')}" for entry in entries if RAISES.match(entry))]
            lines.append("")
        elif section[:1] and section[0].startswith("Source:"):
            lines += [" ".join(line.strip() for line in section).strip(), ""]
        else:
            lines += section


def plain_aliases(app, what, name, obj, options, signature, returns):
    """Sphinx shows a short name within a union or a list by its repr."""
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (signature, returns))


def setup(app):
    app.add_role("name", Name())
    app.connect("autodoc-process-docstring", tidy, priority=400)
    app.connect("autodoc-process-signature", plain_aliases)
