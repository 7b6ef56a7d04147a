"""Globs on FQNs: the one pattern language of layouts, ``--include`` and ``--exclude`` (decision 8).

``*`` is any run of characters within one dot component and ``?`` one character of it; ``**`` stands alone between dots
for any number of components, none included; ``{a,b}`` is either. Everything else is literal. The time to match is
linear in the name for any pattern, and patterns are short: one can come from a stranger's job document, which is why
``re`` is never given one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from math import prod

from reshard_service.errors import UsageError

MAX_PATTERN_LENGTH = 512
MAX_ALTERNATIVES = 256


@dataclass(frozen=True, slots=True)
class _Automaton:
    """One component with wildcards. Token ``i`` is bit ``i`` of a set of states, so that a character is one step
    whatever the pattern; the masks say which states it moves on, and which keep (``*``) or may be skipped."""

    moves: dict[str, int]
    moves_always: int
    keeps: int
    accept: int

    def accepts(self, text: str) -> bool:
        # Stars never stand side by side, so skipping one is skipping all.
        states = 1 | ((1 & self.keeps) << 1)
        for character in text:
            states = ((states & (self.moves.get(character, 0) | self.moves_always)) << 1) | (states & self.keeps)
            if not states:
                return False
            states |= (states & self.keeps) << 1
        return bool(states & self.accept)


def _automaton(component: str) -> _Automaton:
    moves: dict[str, int] = {}
    moves_always = keeps = 0
    bit = 1
    for character in component:
        if character == "*":
            keeps |= bit
        elif character == "?":
            moves_always |= bit
        else:
            moves[character] = moves.get(character, 0) | bit
        bit <<= 1
    return _Automaton(moves, moves_always, keeps, accept=bit)


@dataclass(frozen=True, slots=True)
class _Component:
    """What one component of a name has to be: a text, or what an automaton accepts; neither is anything at all."""

    text: str | None = None
    automaton: _Automaton | None = None

    def matches(self, component: str) -> bool:
        if self.text is not None:
            return self.text == component
        return self.automaton is None or self.automaton.accepts(component)


@dataclass(frozen=True, slots=True)
class _Alternative:
    """One pattern without braces; None among its components is ``**``."""

    components: tuple[_Component | None, ...]
    tail: str
    """The literal components at the end, each after a dot: compared as one string it decides nearly every name."""

    def matches(self, components: list[str]) -> bool:
        """Greedy: where a component fails, the last ``**`` takes one more. Earlier ones never need to."""
        wanted = self.components
        at = here = 0
        last, resume = -1, 0
        while here < len(components):
            want = wanted[at] if at < len(wanted) else _NOTHING
            if want is None:
                last, resume = at, here
                at += 1
            elif want.matches(components[here]):
                at += 1
                here += 1
            elif last >= 0:
                resume += 1
                at, here = last + 1, resume
            else:
                return False
        return all(want is None for want in wanted[at:])


_NOTHING = _Component(automaton=_Automaton({}, 0, 0, accept=0))


@dataclass(frozen=True, slots=True)
class Glob:
    """A compiled pattern; equal patterns are equal globs."""

    pattern: str
    _alternatives: tuple[_Alternative, ...] = field(repr=False, compare=False)
    _tails: tuple[str, ...] = field(repr=False, compare=False)
    _tails_decide: bool = field(repr=False, compare=False)
    """Every alternative is ``**`` and literal components."""

    def matches(self, fqn: str) -> bool:
        """Whether the whole FQN matches."""
        if not f".{fqn}".endswith(self._tails):
            return False
        if self._tails_decide:
            return True
        components = fqn.split(".")
        return any(alternative.matches(components) for alternative in self._alternatives)


@lru_cache(maxsize=4096)
def compile_glob(pattern: str) -> Glob:
    """The glob of ``pattern``; :class:`UsageError` says what is wrong with one that follows no rule above."""
    if not pattern:
        raise UsageError("a glob can't be empty", hint="'**' matches every name")
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise UsageError(f"glob of {len(pattern)} characters is longer than {MAX_PATTERN_LENGTH}")
    for character in pattern:
        if character in "[]\\" or not character.isprintable():
            raise UsageError(
                f"glob {pattern!r} has {character!r}, which globs on tensor names don't have",
                hint="only * ** ? and {a,b} are special; write [01] as {0,1}",
            )
    alternatives = tuple(_alternative(pattern, text) for text in _expand(pattern))
    decide = all(
        len(each.components) > 1
        and not any(_is_wild(part) for part in each.components[1:])
        and each.components[0] is None
        for each in alternatives
    )
    return Glob(pattern, alternatives, tuple(each.tail for each in alternatives), decide)


def _expand(pattern: str) -> list[str]:
    """The pattern with every ``{a,b}`` written out."""
    parts: list[list[str]] = []
    rest = pattern
    while rest:
        literal, brace, rest = rest.partition("{")
        if "}" in literal:
            raise UsageError(f"glob {pattern!r} has '}}' without '{{'")
        parts.append([literal])
        if not brace:
            break
        inside, closing, rest = rest.partition("}")
        if not closing or "{" in inside:
            what = "braces inside braces" if "{" in inside else "'{' without '}'"
            raise UsageError(f"glob {pattern!r} has {what}", hint="write every alternative out: {a,b,c}")
        if not inside:
            raise UsageError(f"glob {pattern!r} has empty braces")
        parts.append(inside.split(","))
    count = prod(len(choices) for choices in parts)
    if count > MAX_ALTERNATIVES:
        raise UsageError(f"glob {pattern!r} stands for {count} patterns, more than {MAX_ALTERNATIVES}")
    return ["".join(choice) for choice in product(*parts)]


def _is_wild(component: _Component | None) -> bool:
    return component is None or component.text is None


def _alternative(pattern: str, text: str) -> _Alternative:
    components: list[_Component | None] = []
    for component in text.split("."):
        if component == "**":
            if not components or components[-1] is not None:
                components.append(None)
            continue
        if "**" in component:
            raise UsageError(
                f"glob {pattern!r} has '**' within {component!r}; it stands for whole components, alone between dots",
                hint="use * within a component, or a.**.b across components",
            )
        if not component:
            raise UsageError(f"glob {pattern!r} has an empty component (two dots, or a dot at an end)")
        if component == "*":
            components.append(_Component())
        elif "*" in component or "?" in component:
            components.append(_Component(automaton=_automaton(component)))
        else:
            components.append(_Component(component))
    tail = ""
    for wanted in reversed(components):
        if wanted is None or wanted.text is None:
            break
        tail = f".{wanted.text}{tail}"
    return _Alternative(tuple(components), tail)
