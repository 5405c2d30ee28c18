"""Sphinx' settings for the docs page, README.md and the notebook each as one page: `make docs`."""

project = "Deploy Llama-3.1-8B with Ray Serve LLM"
html_title = "Llama-3.1-8B serving"  # Short enough for the bar of a telephone
extensions = ["myst_nb", "sphinx_copybutton"]
root_doc = "README"
include_patterns = ["README.md", "*.ipynb", "TROUBLESHOOTING.md", "SECURITY.md", "benchmarks/README.md"]
suppress_warnings = ["toc.not_included"]  # Each is linked from the page instead.
nb_execution_mode = "off"
myst_heading_anchors = 4
html_theme = "pydata_sphinx_theme"
html_sidebars = {"**": []}
html_show_sourcelink = False
html_theme_options = {"show_toc_level": 2, "secondary_sidebar_items": ["page-toc"], "navbar_end": ["theme-switcher"]}
html_context = {"default_mode": "auto"}
