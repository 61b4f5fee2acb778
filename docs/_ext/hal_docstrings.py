"""Docstrings in Google's form, with the ``Fields:`` section that dataclasses here have.

The extension ``sphinx.ext.napoleon`` reads the docstring of an attribute as ``type: text``; ours are sentences, which
may hold a colon. So its parser is used for everything but attributes.
"""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config
from sphinx.ext.napoleon.docstring import GoogleDocstring

_CONFIG: Any = Config(
    napoleon_custom_sections=[("Fields", "params_style")],
    napoleon_use_param=False,
    napoleon_use_rtype=False,
)
_KINDS = ("module", "class", "exception", "function", "method")


def setup(app: Sphinx) -> dict[str, Any]:
    """Parse docstrings when autodoc reads them."""
    app.connect("autodoc-process-docstring", _parse)
    return {"parallel_read_safe": True}


def _parse(app: Sphinx, what: Any, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what in _KINDS:
        lines[:] = GoogleDocstring(lines, _CONFIG, app, what, name, obj, options).lines()
