"""The documentation site: `make docs` builds it. It needs no network, when it is built or when it is read."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from recast_exp import __version__

# The notebook is run by a process that Jupyter starts: plain output, and no more threads than the rest.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")

project = "recast_exp"
version = release = __version__
copyright = "the authors of recast_exp, Apache-2.0"

extensions = ["configuration", "mathml", "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_ext", "_static"]

html_theme = "furo"
html_title = f"recast_exp {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
html_math_renderer = "mathml"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # would be fetched from elsewhere

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90
default_role = "code"  # single backquotes in docstrings
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def _as_they_look(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep of docstrings what reStructuredText would take for something else.

    A letter that explains an argument (`num_sets: K.`) is no first item of a list, and indented lines of a module's
    docstring are formulas and tables.
    """
    lines[:] = [re.sub(r"^(\s*\w+: )(\w)([.;])", r"\1`\2`\3", line) for line in lines]
    if what == "module":
        text = "\n".join(lines)
        lines[:] = re.sub(r"\n\n(?=    +[^\s>])", "\n\n::\n\n", text).split("\n")


def setup(app: Sphinx) -> None:
    """Change docstrings before the extension that reads their sections."""
    app.connect("autodoc-process-docstring", _as_they_look, priority=400)
