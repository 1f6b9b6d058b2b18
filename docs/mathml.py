"""A hook of mkdocs: formulas between dollar signs become MathML, which browsers draw without a script."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

# Fenced or inline code is left alone.
FORMULA = re.compile(r"(```.*?```|`[^`\n]*`)|\$([^$\n]+)\$", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each formula of a page."""
    return FORMULA.sub(lambda found: found[1] or convert(found[2]), markdown)
