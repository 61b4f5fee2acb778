"""How the documentation is built. It needs no network: no inventory of another project is read."""

from __future__ import annotations

import doctest
import logging
import os
import sys
import tempfile
from pathlib import Path

import hal

DOCS = Path(__file__).parent
FOLDER = tempfile.TemporaryDirectory(prefix="hal-docs-")

# What is written here depends on no setting, ledger or measurement of the machine that builds it.
for name in [n for n in os.environ if n.startswith("HAL_")]:
    del os.environ[name]
os.environ.update(XDG_CONFIG_HOME=FOLDER.name, XDG_CACHE_HOME=FOLDER.name)
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent / "examples" / "acme_platform")]
logging.getLogger("hal").setLevel(logging.ERROR)  # examples take the slow reference on purpose

project = "HAL"
author = "the HAL authors"
copyright = "the HAL authors"  # noqa: A001 - the name is Sphinx's
version = release = hal.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "hal_docstrings",
    "hal_references",
    "hal_tables",
]
exclude_patterns = ["_build"]
nitpicky = True

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
python_maximum_signature_line_length = 100

doctest_default_flags = doctest.ELLIPSIS
doctest_test_doctest_blocks = "default"
doctest_global_setup = f"import os; _before = os.getcwd(); os.chdir({FOLDER.name!r})"
doctest_global_cleanup = "os.chdir(_before)"

html_theme = "furo"
html_title = f"HAL {version}"
html_copy_source = False
html_show_sphinx = False
