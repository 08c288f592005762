"""How Sphinx builds the guides and the API reference.

> sphinx-build -W docs results/docs
"""

import pathlib
import re

INIT = pathlib.Path(__file__).parents[1] / "lgl_plugin" / "__init__.py"

project = "lgl-plugin"
author = "the maintainers of lgl-plugin"
release = re.search(r'__version__ = "(.+)"', INIT.read_text("utf-8"))[1]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "Loss-gated learning for SpeechBrain"
html_show_sourcelink = False
html_show_copyright = False

# The guides link to sections by their headings, as they do on GitHub.
myst_heading_anchors = 3
# The tutorial's outputs are in its file: docs/run_tutorial.py, and a test.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # which knows tables

# Docstrings are NumPy's, with SpeechBrain's "Arguments"; a single backtick
# marks code.
napoleon_google_docstring = False
napoleon_custom_sections = [("Arguments", "params_style")]
napoleon_use_ivar = True
default_role = "code"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
# Only the synthetic corpus needs it.
autodoc_mock_imports = ["espeakng_loader"]


def setup(app):
    """Connects what follows."""
    app.connect("autodoc-skip-member", skip_imported)
    # Before napoleon, which reads sections.
    app.connect("autodoc-process-docstring", mark_code, priority=400)
    app.connect("source-read", link_here)


def skip_imported(app, what, name, member, skip, options):
    """Documents a thing where it is defined, and nowhere else."""
    defined = getattr(member, "__module__", None) or ""
    return skip or (what == "module" and not defined.startswith("lgl_plugin"))


def mark_code(app, what, name, thing, options, lines):
    """Makes literal blocks of commands (`> ...`) and of indented yaml."""
    text = "\n".join(lines)
    text = re.sub(
        r"^> .*(?:\n(?:> |    ).*)*",
        lambda found: "::\n\n" + found[0].replace("> ", "    ") + "\n",
        text,
        flags=re.M,
    )
    text = re.sub(r"(?<=\w):(?=\n\n {4,}\S)", "::", text)
    if what == "property":  # what stands before a colon would be its type
        text = text.replace(": ", ", ")
    lines[:] = text.split("\n")


def link_here(app, name, source):
    """Leads links out of this folder to the pages that include the files."""
    for file, page in (
        ("../benchmarks/README", "benchmarks"),
        ("../CONTRIBUTING", "contributing"),
        ("../CHANGELOG", "changelog"),
    ):
        source[0] = source[0].replace(f"({file}.md", f"({page}.md")
