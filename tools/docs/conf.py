"""Settings of Sphinx for the site; `tools.docs.main` names this folder."""

import nnx
from tools.docs import docstrings

project = "fused_nnx"
version = release = nnx.__version__
html_title = f"{project} {version}"
extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx_copybutton",
]

# Pages: headings can be linked to.
myst_heading_anchors = 3

# Docstrings: what stands in backticks is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# What arguments are, their texts say. With types, a function that has overloads
# would show those, without its options.
autodoc_typehints = "none"
maximum_signature_line_length = 72
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [
  ("Attributes", "params_style"),
  ("Class keywords", "params_style"),
]
# A class has the name that users write and that of the module it is in.
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["code.css"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True


def setup(app):
  """Lets Sphinx read our docstrings; it calls this."""

  def translate(app, what, name, value, options, lines):
    lines[:] = docstrings.translate(lines)

  # Before napoleon, whose priority is 500.
  app.connect("autodoc-process-docstring", translate, priority=100)
