"""Are two checkpoints the same tensors? Compared by identity, whatever formats and layouts, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reshard_service.catalogue import ByteObject, Catalogue, Identity, Notice, Section
from reshard_service.engine.source import Source
from reshard_service.errors import NameCollision, SelectionEmpty
from reshard_service.globs import compile_glob
from reshard_service.identity import strip_wrappers
from reshard_service.verify.compare import compare_pairs

_HOLDS_OBJECTS = ("dcp", "torch")
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Diff:
    """``same`` is true if everything compared is equal. ``not_compared`` names what only one side can have."""

    same: bool
    compared: int
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    different: tuple[Notice, ...]
    not_compared: tuple[str, ...]


def diff(
    a: Catalogue,
    b: Catalogue,
    *,
    everything: bool = False,
    only: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    threads: int = 2,
    progress: Callable[[int], None] = lambda compared: None,
) -> Diff:
    """Compare sections present on both sides (decision 10); ``everything`` makes one-sided ones count as well.

    ``only`` restricts it to one section.
    """
    wanted = _wanted(include, exclude)
    sections_a, sections_b = _sections(a), _sections(b)
    compared = set(Section) if everything else sections_a & sections_b
    if only in (Section.MODEL, Section.OPTIMIZER):
        compared &= {Section(only)}
    tensors_a, tensors_b = _by_identity(a, compared, wanted), _by_identity(b, compared, wanted)
    not_compared = [
        f"{side}:{section.value}"
        for side, sections in (("a", sections_a), ("b", sections_b))
        for section in sorted(sections - compared)
    ]
    only_a = [a.tensors[tensors_a[i]].key for i in tensors_a if i not in tensors_b]
    only_b = [b.tensors[tensors_b[i]].key for i in tensors_b if i not in tensors_a]
    pairs = [(tensors_a[i], tensors_b[i]) for i in tensors_a if i in tensors_b]
    objects_a, objects_b = _objects(a, compared, wanted), _objects(b, compared, wanted)
    if everything or (a.format in _HOLDS_OBJECTS and b.format in _HOLDS_OBJECTS):
        only_a += [objects_a[i].key for i in objects_a if i not in objects_b]
        only_b += [objects_b[i].key for i in objects_b if i not in objects_a]
    else:
        not_compared += [f"{side}:objects" for side, found in (("a", objects_a), ("b", objects_b)) if found]
        objects_a, objects_b = {}, {}
    if not (pairs or only_a or only_b or objects_a):
        raise SelectionEmpty(
            f"{a.uri!r} and {b.uri!r} have nothing in common that was asked for, so there is nothing to compare",
            hint="look at both with `reshard inspect`; --part all counts what only one of them has",
        )
    different = compare_pairs(a, b, pairs, threads, progress) + _compare_objects(a, b, objects_a, objects_b)
    same = not (only_a or only_b or different)
    return Diff(same, len(pairs), tuple(only_a), tuple(only_b), tuple(different), tuple(not_compared))


def _wanted(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    takes, drops = [compile_glob(p) for p in include], [compile_glob(p) for p in exclude]
    return lambda fqn: (
        not any(glob.matches(fqn) for glob in drops) and (not takes or any(glob.matches(fqn) for glob in takes))
    )


def _sections(catalogue: Catalogue) -> set[Section]:
    tensors = {tensor.identity.section for tensor in catalogue.tensors}
    return tensors | {item.identity.section for item in catalogue.objects}


def _bare(identity: Identity) -> Identity:
    return Identity(identity.section, strip_wrappers(identity.fqn), identity.slot)


def _by_identity(catalogue: Catalogue, sections: set[Section], wanted: Callable[[str], bool]) -> dict[Identity, int]:
    found: dict[Identity, int] = {}
    for index, tensor in enumerate(catalogue.tensors):
        identity = _bare(tensor.identity)
        if identity.section not in sections or not wanted(identity.fqn):
            continue
        if identity in found:
            raise NameCollision(
                f"{catalogue.uri!r} holds {tensor.key!r} and {catalogue.tensors[found[identity]].key!r}, "
                "which are the same tensor once wrapper names are dropped",
                tensor=tensor.key,
            )
        found[identity] = index
    return found


def _objects(catalogue: Catalogue, sections: set[Section], wanted: Callable[[str], bool]) -> dict[Identity, ByteObject]:
    return {
        _bare(item.identity): item
        for item in catalogue.objects
        if item.identity.section in sections and wanted(_bare(item.identity).fqn)
    }


def _compare_objects(
    a: Catalogue, b: Catalogue, objects_a: dict[Identity, ByteObject], objects_b: dict[Identity, ByteObject]
) -> list[Notice]:
    sources = Source(a), Source(b)
    try:
        different = [
            Notice("object", "the stored bytes differ", objects_a[identity].key)
            for identity in objects_a.keys() & objects_b.keys()
            if not _same_bytes(*sources, objects_a[identity], objects_b[identity])
        ]
    finally:
        for source in sources:
            source.close()
    return sorted(different, key=lambda notice: notice.name or "")


def _same_bytes(a: Source, b: Source, mine: ByteObject, other: ByteObject) -> bool:
    """Compared a block at a time: the state of a dataloader can be large."""
    if mine.length != other.length:
        return False
    blocks = memoryview(bytearray(_BLOCK)), memoryview(bytearray(_BLOCK))
    for at in range(0, mine.length, _BLOCK):
        length = min(_BLOCK, mine.length - at)
        here, there = (block[:length] for block in blocks)
        a.read_into(mine.file, mine.start + at, here)
        b.read_into(other.file, other.start + at, there)
        if here != there:
            return False
    return True
