"""Sphinx' settings for the docs pages: `make docs`."""

import re
import sys
from pathlib import Path

import nbformat
from docutils import nodes
from pygments.lexers import get_lexer_for_filename

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from ci.tools import record  # noqa: E402

project = "Deploy Llama-3.1-8B with Ray Serve LLM"
html_title = "Llama-3.1-8B serving"  # Short enough for the bar of a telephone
extensions = ["myst_nb", "sphinx_copybutton"]
copybutton_selector = "div:not(.highlight-text):not(.output) > div.highlight pre"  # Code, and no output
root_doc = "README"
include_patterns = ["README.md", "*.ipynb", "TROUBLESHOOTING.md", "SECURITY.md", "benchmarks/README.md"]
nb_execution_mode = "off"
myst_heading_anchors = 4
html_theme = "pydata_sphinx_theme"
html_sidebars = {"**": []}
html_show_sourcelink = False
html_theme_options = {
    "header_links_before_dropdown": 6,
    "navbar_end": ["theme-switcher"],
    "navbar_persistent": ["search-button"],
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
}
html_context = {"default_mode": "auto"}


MENU = """
```{toctree}
:hidden:

Executed notebook <notebook>
Beyond chat <beyond_chat>
More machines <next_steps>
Troubleshooting <TROUBLESHOOTING>
Benchmarks <benchmarks/README>
Security <SECURITY>
```
"""


def prepare(app, docname: str, source: list[str]) -> None:
    """Show the notebooks as the records' runs left them, and a menu of the pages. GitHub would show that as code."""
    if docname == root_doc:
        source[0] += MENU
    elif docname in ("notebook", "beyond_chat"):
        notebook = nbformat.reads(source[0], as_version=4)
        notebook.cells = record.with_outputs(notebook)
        source[0] = nbformat.writes(notebook)


def color(app, doctree) -> None:
    """Show each file that a cell writes in its own language, to which the cell's first line doesn't belong."""
    for block in doctree.findall(nodes.literal_block):
        if match := re.match(r"%%writefile (\S+)\n", block.astext()):
            block["language"], block["force"] = get_lexer_for_filename(match[1]).aliases[0], True


def setup(app) -> None:
    app.connect("source-read", prepare)
    app.connect("doctree-read", color)
