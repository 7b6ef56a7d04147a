"""Walk a pickle's opcodes without performing any, and refuse what could hurt the C unpickler or this process.

What is guarded against, beyond malformed streams: ``LONG_BINPUT`` with a huge index (nine bytes make CPython claim
gigabytes of memo), tuples nested so deep or shared so often that hashing them overflows the stack or never ends,
opcodes that call (``INST``, ``OBJ``, ``EXT*``) or that set attributes on what is no instance (``BUILD`` on a class).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Never

from reshard_service.errors import SourceCorrupt, UnsafeSource


@dataclass(frozen=True, slots=True)
class PickleLimits:
    """How much a pickle may ask for; the defaults are generous for any real checkpoint."""

    data_bytes: int = 64 << 20
    opcodes: int = 40_000_000
    tuple_depth: int = 100
    tuple_cost: int = 1_000_000
    """Cost of hashing one tuple; see below."""
    stack: int = 4_000_000


DEFAULT_LIMITS = PickleLimits()

# An abstract stack value is an int: the cost of using it as a dict key in the low 32 bits, its tuple depth above, and
# two flags for what BUILD, REDUCE and NEWOBJ may be applied to. Numbers whose hash an attacker can choose, and tuples
# (whose hash is computed anew each time, through everything they share), cost something as keys; all keys of a pickle
# together may cost what 7,800 such keys do, so that colliding ones take a second, not hours. Strings are free: their
# hash is salted.
_DEPTH = 1 << 32
_PLAIN = (1 << 62) - 1
_GLOBAL = 1 << 62
_INSTANCE = 1 << 63
_ATOM = 1
_CHOSEN = 64
_KEYS_COST = 500_000

# Argument bytes of the opcodes that push one atom.
_ATOMS = {
    op[0]: size
    for op, size in (
        (b"K", 1), (b"M", 2), (b"J", 4), (b"G", 8),
        (b"N", 0), (b"\x88", 0), (b"\x89", 0), (b"]", 0), (b"}", 0), (b")", 0),
    )
}  # fmt: skip
# Size of the length field of the opcodes that push one atom of that many bytes.
_SIZED = {op[0]: size for op, size in ((b"\x8c", 1), (b"X", 4), (b"\x8d", 8), (b"C", 1), (b"B", 4), (b"\x8e", 8),
                                       (b"U", 1), (b"T", 4), (b"\x8a", 1))}  # fmt: skip
_GETS = {b"h"[0]: 1, b"j"[0]: 4}
_PUTS = {b"q"[0]: 1, b"r"[0]: 4}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_PROTO, _FRAME, _STOP, _MARK, _MEMOIZE = 0x80, 0x95, b"."[0], b"("[0], 0x94
_TUPLE, _LIST, _DICT = b"t"[0], b"l"[0], b"d"[0]
_APPEND, _SETITEM, _APPENDS, _SETITEMS = b"a"[0], b"s"[0], b"e"[0], b"u"[0]
_GLOBAL_OP, _STACK_GLOBAL, _NEWOBJ, _REDUCE, _BUILD = b"c"[0], 0x93, 0x81, b"R"[0], b"b"[0]
_BINFLOAT, _LONG1 = b"G"[0], 0x8A
_POP, _POP_MARK, _BINPERSID = b"0"[0], b"1"[0], b"Q"[0]

_NEVER = {
    b"i"[0]: "INST", b"o"[0]: "OBJ", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", b"P"[0]: "PERSID", 0x92: "NEWOBJ_EX",
    0x96: "BYTEARRAY8", 0x97: "NEXT_BUFFER", 0x98: "READONLY_BUFFER", 0x8F: "EMPTY_SET", 0x90: "ADDITEMS",
    0x91: "FROZENSET", b"2"[0]: "DUP", 0x8B: "LONG4", b"I"[0]: "INT", b"L"[0]: "LONG", b"F"[0]: "FLOAT",
    b"S"[0]: "STRING", b"V"[0]: "UNICODE", b"g"[0]: "GET", b"p"[0]: "PUT",
}  # fmt: skip


def scan(
    data: bytes | memoryview, *, file: str, persistent: bool = False, limits: PickleLimits = DEFAULT_LIMITS
) -> int:
    """Walk the whole pickle; the number of opcodes. Raises ``UnsafeSource`` or ``SourceCorrupt``, nothing else."""
    if len(data) > limits.data_bytes:
        raise UnsafeSource(
            f"the pickle in {file!r} has {len(data)} bytes; at most {limits.data_bytes} are read", file=file
        )
    try:
        return _walk(bytes(data), file, persistent, limits)
    except IndexError:
        raise SourceCorrupt(
            f"the pickle in {file!r} is truncated, or takes more off its stack than is there", file=file
        ) from None


def _walk(data: bytes, file: str, persistent: bool, limits: PickleLimits) -> int:
    stack: list[int] = []
    marks: list[int] = []
    memo: list[int] = []
    position, end, count = 0, len(data), 0
    deepest, most = limits.tuple_depth * _DEPTH, limits.tuple_cost
    keys = -_KEYS_COST

    def corrupt(what: str) -> Never:
        raise SourceCorrupt(f"the pickle in {file!r} {what}, at byte {position}", file=file)

    def unsafe(what: str) -> Never:
        raise UnsafeSource(
            f"the pickle in {file!r} {what}, at byte {position}; no checkpoint needs that", file=file,
            hint="don't trust this file",
        )  # fmt: skip

    def taken(start: int) -> list[int]:
        """Pops what lies above the stack height ``start``; never below the topmost mark."""
        if start < (marks[-1] if marks else 0):
            corrupt("takes more off its stack than is there")
        values = stack[start:]
        del stack[start:]
        return values

    def tupled(values: list[int]) -> int:
        cost, depth = _CHOSEN, 0
        for value in values:
            cost += value & (_DEPTH - 1)
            depth = max(depth, value & _PLAIN)
        made = (depth & -_DEPTH) + _DEPTH
        if made > deepest or cost > most:
            unsafe(f"nests tuples deeper than {limits.tuple_depth}, or shares too many elements between them")
        return made + cost

    def keyed(values: list[int]) -> int:
        cost = sum([cost for value in values if (cost := value & (_DEPTH - 1)) > _ATOM])
        if keys + cost > 0:
            unsafe("uses dict keys that cost too much to look up")
        return cost

    while True:
        op = data[position]
        position += 1
        count += 1
        if count > limits.opcodes or len(stack) > limits.stack:
            unsafe("has more opcodes, or a higher stack, than is allowed")
        if op == _MEMOIZE:
            memo.append(stack[-1])
        elif op in _GETS:
            size = _GETS[op]
            index = int.from_bytes(data[position : position + size], "little")
            position += size
            if index >= len(memo):
                corrupt(f"refers to memo entry {index} of {len(memo)}")
            stack.append(memo[index])
        elif op in _ATOMS:
            position += _ATOMS[op]
            stack.append(_CHOSEN if op == _BINFLOAT else _ATOM)
        elif op in _SIZED:
            size = _SIZED[op]
            length = int.from_bytes(data[position : position + size], "little")
            position += size + length
            stack.append(_CHOSEN if op == _LONG1 else _ATOM)
        elif op in _TUPLES:
            stack.append(tupled(taken(len(stack) - _TUPLES[op])))
        elif op == _MARK:
            marks.append(len(stack))
        elif op == _TUPLE:
            stack.append(tupled(taken(marks.pop())))
        elif op == _BUILD:
            taken(len(stack) - 1)
            if not stack[-1] & _INSTANCE:
                unsafe("sets the state of something that is not an instance (BUILD)")
        elif op in (_NEWOBJ, _REDUCE):
            callable_, arguments = taken(len(stack) - 2)
            if not callable_ & _GLOBAL:
                unsafe("calls something that is not one of its globals")
            stack.append(arguments & _PLAIN | _INSTANCE)
        elif op in (_SETITEMS, _APPENDS):
            items = taken(marks.pop())
            if not stack or (op == _SETITEMS and len(items) % 2):
                corrupt("fills a container with the wrong number of items")
            if op == _SETITEMS:
                keys += keyed(items[::2])
        elif op in (_SETITEM, _APPEND):
            items = taken(len(stack) - (2 if op == _SETITEM else 1))
            if not stack:
                corrupt("fills a container that is not there")
            if op == _SETITEM:
                keys += keyed(items[:1])
        elif op in (_DICT, _LIST):
            items = taken(marks.pop())
            if op == _DICT:
                if len(items) % 2:
                    corrupt("makes a dict of an odd number of items")
                keys += keyed(items[::2])
            stack.append(_ATOM)
        elif op in _PUTS:
            size = _PUTS[op]
            index = int.from_bytes(data[position : position + size], "little")
            position += size
            if index > len(memo):
                unsafe(f"claims memo entry {index} after {len(memo)} entries")
            memo[index : index + 1] = [stack[-1]]
        elif op == _STACK_GLOBAL:
            taken(len(stack) - 2)
            stack.append(_ATOM | _GLOBAL)
        elif op == _GLOBAL_OP:
            line = data.find(b"\n", position)
            after = data.find(b"\n", line + 1)
            if line < 0 or after < 0:
                corrupt("ends within a global's name")
            position = after + 1
            stack.append(_ATOM | _GLOBAL)
        elif op == _BINPERSID:
            if not persistent:
                unsafe("refers to objects outside itself (BINPERSID)")
            taken(len(stack) - 1)
            stack.append(_ATOM)
        elif op == _FRAME:
            length = int.from_bytes(data[position : position + 8], "little")
            position += 8
            if length > end - position:
                corrupt(f"announces a frame of {length} bytes, but {end - position} are left")
        elif op == _PROTO:
            if data[position] > 5:
                corrupt(f"has protocol {data[position]}")
            position += 1
        elif op == _POP:
            if marks and marks[-1] == len(stack):
                marks.pop()
            else:
                taken(len(stack) - 1)
        elif op == _POP_MARK:
            taken(marks.pop())
        elif op == _STOP:
            if position != end:
                corrupt(f"goes on for {end - position} bytes after its end")
            taken(len(stack) - 1)
            return count
        elif op in _NEVER:
            unsafe(f"uses the opcode {_NEVER[op]}")
        else:
            corrupt(f"has the unknown opcode 0x{op:02x}")
        if position > end:
            corrupt("is truncated")
