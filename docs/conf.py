"""The documentation site: ``make docs``. It asks for nothing on the network, neither when built nor when read."""

import fnl_hf

project = "fnl_hf"
author = "The fnl_hf authors"
copyright = "2026, The fnl_hf authors"
version = release = fnl_hf.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_argparse_cli"]
myst_heading_anchors = 3

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
html_title = f"fnl_hf {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
