"""Sphinx' settings for the docs page, README.md and the executed notebook each as one page: `make docs`."""

import sys
from pathlib import Path

import nbformat

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
html_theme_options = {"show_toc_level": 2, "secondary_sidebar_items": ["page-toc"], "navbar_end": ["theme-switcher"]}
html_context = {"default_mode": "auto"}


def prepare(app, docname: str, source: list[str]) -> None:
    """Show the notebook as the records' runs left it. No page is in a table of contents: each is linked instead."""
    if docname == "next_steps":
        return
    if docname not in ("notebook", "beyond_chat"):
        # Notebooks have this in their metadata. In README.md, GitHub would show it as a table.
        source[0] = f"---\norphan: true\n---\n{source[0]}"
    else:
        notebook = nbformat.reads(source[0], as_version=4)
        notebook.cells = record.with_outputs(notebook)
        source[0] = nbformat.writes(notebook)


def setup(app) -> None:
    app.connect("source-read", prepare)
