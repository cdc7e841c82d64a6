"""The documentation site: ``make docs``. It asks for nothing on the network, neither when built nor when read."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.logging import getLogger

import fnl_hf

logger = getLogger(__name__)

project = "fnl_hf"
author = "The fnl_hf authors"
copyright = "2026, The fnl_hf authors"
version = release = fnl_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_argparse_cli"]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # as GitHub writes a displayed formula

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autoclass_content = "class"
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 120
napoleon_numpy_docstring = False
nitpicky = True
# What other packages document; to link to it their inventories would have to be fetched.
nitpick_ignore_regex = [("py:.*", r"(torch|transformers|collections|pathlib|os)\..*|StrictDataclassError")]

html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"fnl_hf {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # it is fetched, which a page on the disk may not do


def visit_math(translator, node):
    """MathML, which browsers lay out by themselves: it takes no script and no font, and has the text's color."""
    try:
        mathml = tex2mathml(node.astext())
    except (SyntaxError, ValueError) as error:  # of docutils before and since 0.22
        logger.warning("formula %s: %s", node.astext(), error, location=node)
        raise nodes.SkipNode from error
    if isinstance(node, nodes.math_block):
        mathml = '<div class="math">' + mathml.replace("<math", '<math display="block"', 1) + "</div>"
    translator.body.append(mathml)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
