"""Docstrings as Markdown for the API reference: references become links, doctests become code blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(func|class|mod|data|meth|attr):`(~?)([\w.]+)`")
DOCTEST = re.compile(r"^( *)(>>> .*(?:\n\1\S.*|\n\1 +\S.*)*)", re.M)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            owner = obj.parent if obj.parent is not None and obj.parent.is_class else obj
            obj.docstring.value = as_markdown(obj.docstring.value, obj.module.path, owner.path)


def as_markdown(docstring: str, module: str, owner: str) -> str:
    """A docstring with links and fenced doctests.

    Args:
        docstring: As it was written.
        module: Path of the module in which it stands, where short names are looked up.
        owner: Path of the class in which it stands, where methods are.
    """

    def link(role: re.Match[str]) -> str:
        kind, tilde, target = role.groups()
        shown = target.rsplit(".", 1)[-1] if tilde else target
        if not target.startswith("harmonize."):
            target = f"{owner if kind == 'meth' else module}.{target}"
        return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'

    docstring = ROLE.sub(link, docstring)
    return DOCTEST.sub(lambda block: f"{block[1]}```pycon\n{block[1]}{block[2]}\n{block[1]}```", docstring)
