"""Docstrings as Markdown: sections of parameters become lists, examples become code.

Docstrings are written for a terminal: a heading underlined by dashes, a line `name : description` for each parameter,
and examples that begin with >>>.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_SECTION = re.compile(r"^(?P<title>[A-Z]\w+)\n-+\n(?P<body>(?:.+\n?)+)", re.MULTILINE)
_ENTRY = re.compile(r"^(?P<names>[\w, ]+?) : ", re.MULTILINE)
_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class Docstrings(Extension):
    """Converts every docstring when it is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """The docstring `text` as Markdown."""
    text = _SECTION.sub(lambda found: f"**{found['title']}**\n\n{_entries(found['body'])}", text)
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```", text)


def _entries(body: str) -> str:
    def item(found: re.Match[str]) -> str:
        names = ", ".join(f"`{name.strip()}`" for name in found["names"].split(","))
        return f"- {names}: "

    return _ENTRY.sub(item, body)
