"""Griffe extension: docstrings are plain text for a terminal; this makes them Markdown where the two differ.

A doctest outside a section of its own would be read as a quotation, so it gets a code fence, and the
`::` before a literal block becomes a colon.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object


class PlainText(Extension):
    """Fence doctests and drop the second colon before literal blocks."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every object that Griffe has read."""
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    r"""The docstring `text` with its doctests fenced.

    >>> print(as_markdown("Add::\n\n    a + b\n\n>>> 1 + 1\n2"))
    Add:
    <BLANKLINE>
        a + b
    <BLANKLINE>
    ```pycon
    >>> 1 + 1
    2
    ```
    """
    lines: list[str] = []
    indent: str | None = None  # of the doctest that is open
    for line in text.splitlines():
        if indent is None and (start := re.match(r"( *)>>> ", line)):
            indent = start[1]
            lines.append(f"{indent}```pycon")
        elif indent is not None and not line.strip():
            lines.append(f"{indent}```")
            indent = None
        lines.append(re.sub(r"(?<=\S)::$", ":", line) if indent is None else line)
    return "\n".join(lines if indent is None else [*lines, f"{indent}```"])
