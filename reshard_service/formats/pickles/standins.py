"""Inert objects that take the place of what a pickle names.

Standard library only: the child process that loads a large ``.metadata`` imports this file by path.
"""

from __future__ import annotations

from typing import Any


class Opaque:
    """Stands for anything whose content nobody needs: takes every argument and every state, and keeps the arguments."""

    __slots__ = ("args",)

    def __new__(cls, *args: Any) -> Opaque:
        made = object.__new__(cls)
        object.__setattr__(made, "args", args)
        return made

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a stand-in can't be changed: {name}")

    def __setstate__(self, state: object) -> None:
        """Whatever state the pickle carries is dropped."""


class InertDict(dict[Any, Any]):
    """Stands for ``collections.OrderedDict`` and its like: the items are kept, attributes (``_metadata``) dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """Attributes hung on the dict are dropped."""
