"""Lets mkdocs read docstrings whose names are Sphinx roles: each becomes a link where the site has a target."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([\w.]+)`")


class SphinxRoles(griffe.Extension):
    """Rewrites every docstring once it is found."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of ``obj``, if it has one."""
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(_link, obj.docstring.value)


def _link(role: re.Match[str]) -> str:
    short, target = role.groups()
    shown = target.rpartition(".")[2] if short else target
    return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'
