"""Sphinx configuration: Markdown pages, API reference from docstrings, tables from bench/results."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import measured  # noqa: E402

from lingbot_kernels._version import __version__  # noqa: E402

project = "lingbot-kernels"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"lingbot-kernels {__version__}"
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = ["triton"]
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
toc_object_entries = False
if not (HERE / "case_parser.md").is_file():
    suppress_warnings = ["toc.not_readable"]

measured.write(HERE.parent / "bench" / "results", HERE / "_generated")
