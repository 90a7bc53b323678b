"""How the site is built: ``make docs``."""

import importlib.metadata
from typing import Any

import latex2mathml.converter
from docutils import nodes

project = "numpyro_rad"
author = "the numpyro_rad developers"
version = release = importlib.metadata.version("numpyro_rad")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

# Pages
html_theme = "sphinx_book_theme"
html_title = "numpyro_rad"
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": False,
    "navbar_persistent": [],  # the sidebar has the search
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3

# Notebooks are executed; a cell that fails, or takes too long, ends the build
nb_execution_mode = "cache"
nb_execution_cache_path = "docs/_build/.jupyter_cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_output_stderr = "warn"  # and that ends the build too
nb_merge_streams = True  # what a cell prints is one box, however slowly it comes

# Signatures are those of the source, a line for each parameter
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "fully-qualified"  # of which the last part is shown
maximum_signature_line_length = 80
add_module_names = False
toc_object_entries_show_parents = "hide"  # there is no room for Class.method
python_use_unqualified_type_names = True
suppress_warnings = ["ref.python"]  # a name may live in several packages: where it is made, and where it is offered

# Formulas become MathML, which browsers show by themselves: a page needs nothing from elsewhere
html_math_renderer = "mathml"


def show_inline(translator: Any, node: nodes.math) -> None:
    """A formula in a line of text."""
    translator.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def show_block(translator: Any, node: nodes.math_block) -> None:
    """A formula between two lines; a wide one scrolls."""
    formula = latex2mathml.converter.convert(node.astext(), display="block")
    translator.body.append(f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> None:
    """What Sphinx asks for."""
    app.add_html_math_renderer("mathml", (show_inline, None), (show_block, None))
