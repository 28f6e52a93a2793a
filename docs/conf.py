"""Settings of the documentation: ``make docs`` builds it, with every warning an error."""

import re
from importlib.metadata import version as installed

project = "pyro_sinkhorn"
author = "the pyro_sinkhorn maintainers"
release = version = installed("pyro-sinkhorn")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# Links into the repository are right on GitHub, where these pages are read as well.
suppress_warnings = ["myst.xref_missing"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
add_module_names = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "pyro_sinkhorn"
html_static_path: list[str] = []

# What a record holds is written "name:  what it is" in its docstring, further lines of it indented.
_ENTRY = re.compile(r"^([A-Za-z_][\w, ()]*):\s+(\S.*)$")


def _field_lists(app, what, name, obj, options, lines):
    """Paragraphs of such entries become field lists."""
    found, inside = [], False
    for i, line in enumerate(lines):
        blank_before = i == 0 or not lines[i - 1].strip()
        entry = _ENTRY.match(line)
        following = lines[i + 1] if i + 1 < len(lines) else ""
        starts = blank_before and entry and (_ENTRY.match(following) or following.startswith("  "))
        inside = bool(line.strip()) and (inside or bool(starts))
        if inside and entry:
            found.append(f":{entry[1]}: {entry[2]}")
        elif inside:
            found.append("    " + line.strip())
        else:
            found.append(line)
    lines[:] = found


def setup(app):
    app.connect("autodoc-process-docstring", _field_lists, priority=900)
