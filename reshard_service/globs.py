"""Globs on FQNs: the one pattern language of layouts, ``--include`` and ``--exclude`` (decision 8).

``*`` is any run of characters within one dot component and ``?`` one character of it; ``**`` stands alone between dots
for any number of components, none included; ``{a,b}`` is either. Everything else is literal. Matching is a simulated
automaton, so its time is linear in the name whatever the pattern: a pattern can come from a stranger's job document,
which is why ``re`` is never given one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from itertools import product
from math import prod

from reshard_service.errors import UsageError

MAX_PATTERN_LENGTH = 512
MAX_ALTERNATIVES = 256


class _Wild(Enum):
    ONE = "?"
    RUN = "*"
    COMPONENTS = "**"


_Token = str | _Wild


@dataclass(frozen=True, slots=True)
class _Automaton:
    """Token ``i`` is bit ``i`` of a set of states; the masks say which states a character moves on or keeps."""

    moves: dict[str, int]
    moves_within: int
    keeps: int
    keeps_within: int
    skips_one: int
    skips_two: int
    accept: int

    def accepts(self, text: str) -> bool:
        states = self._skip(1)
        for character in text:
            moving = self.moves.get(character, 0)
            keeping = self.keeps
            if character != ".":
                moving |= self.moves_within
                keeping |= self.keeps_within
            states = self._skip(((states & moving) << 1) | (states & keeping))
            if not states:
                return False
        return bool(states & self.accept)

    def _skip(self, states: int) -> int:
        # At most three wildcards stand side by side (see _tokens), so this loop is short.
        while True:
            reached = states | ((states & self.skips_one) << 1) | ((states & self.skips_two) << 2)
            if reached == states:
                return states
            states = reached


def _automaton(tokens: list[_Token]) -> _Automaton:
    moves: dict[str, int] = {}
    moves_within = keeps = keeps_within = skips_one = skips_two = 0
    bit = 1
    for token in tokens:
        if token is _Wild.ONE:
            moves_within |= bit
        elif token is _Wild.RUN:
            keeps_within |= bit
            skips_one |= bit
        elif token is _Wild.COMPONENTS:
            # Two states: the first takes the dot that opens a component or is skipped with the second, the second
            # takes anything. What follows is the end or a dot, so whole components are taken.
            moves["."] = moves.get(".", 0) | bit
            skips_two |= bit
            bit <<= 1
            keeps |= bit
            skips_one |= bit
        else:
            assert isinstance(token, str)
            moves[token] = moves.get(token, 0) | bit
        bit <<= 1
    return _Automaton(moves, moves_within, keeps, keeps_within, skips_one, skips_two, accept=bit)


@dataclass(frozen=True, slots=True)
class _Alternative:
    """One pattern without braces, matched against ``"." + fqn`` so that every component opens with a dot.

    Literal ends are compared as strings, which decides nearly every name; only what lies between them is simulated.
    """

    prefix: str
    suffix: str
    single: _Wild | None = None
    """The only wildcard between the literal ends, if there is just one; None with no automaton means none at all."""
    automaton: _Automaton | None = field(default=None, repr=False)

    def matches(self, dotted: str) -> bool:
        if self.single is None and self.automaton is None:
            return dotted == self.prefix
        end = len(dotted) - len(self.suffix)
        if end < len(self.prefix) or not dotted.endswith(self.suffix) or not dotted.startswith(self.prefix):
            return False
        if self.automaton is not None:
            return self.automaton.accepts(dotted[len(self.prefix) : end])
        if self.single is _Wild.RUN:
            return dotted.find(".", len(self.prefix), end) < 0
        return end == len(self.prefix) or dotted[len(self.prefix)] == "."


@dataclass(frozen=True, slots=True)
class Glob:
    """A compiled pattern; equal patterns are equal globs."""

    pattern: str
    _alternatives: tuple[_Alternative, ...] = field(repr=False, compare=False)

    def matches(self, fqn: str) -> bool:
        """Whether the whole FQN matches."""
        dotted = "." + fqn
        return any(alternative.matches(dotted) for alternative in self._alternatives)


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
    return Glob(pattern, tuple(_alternative(pattern, text) for text in _expand(pattern)))


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


def _tokens(pattern: str, text: str) -> list[_Token]:
    tokens: list[_Token] = []
    for component in text.split("."):
        if component == "**":
            if not tokens or tokens[-1] is not _Wild.COMPONENTS:
                tokens.append(_Wild.COMPONENTS)
            continue
        if "**" in component:
            raise UsageError(
                f"glob {pattern!r} has '**' within {component!r}; it stands for whole components, alone between dots",
                hint="use * within a component, or a.**.b across components",
            )
        if not component:
            raise UsageError(f"glob {pattern!r} has an empty component (two dots, or a dot at an end)")
        tokens.append(".")
        tokens += [{"*": _Wild.RUN, "?": _Wild.ONE}.get(character, character) for character in component]
    return tokens


def _alternative(pattern: str, text: str) -> _Alternative:
    tokens = _tokens(pattern, text)
    wild = [at for at, token in enumerate(tokens) if isinstance(token, _Wild)]
    if not wild:
        return _Alternative("".join(map(str, tokens)), "")
    prefix = "".join(map(str, tokens[: wild[0]]))
    suffix = "".join(map(str, tokens[wild[-1] + 1 :]))
    between = tokens[wild[0] : wild[-1] + 1]
    only = between[0] if len(between) == 1 else None
    if isinstance(only, _Wild) and only is not _Wild.ONE:
        return _Alternative(prefix, suffix, single=only)
    return _Alternative(prefix, suffix, automaton=_automaton(between))
