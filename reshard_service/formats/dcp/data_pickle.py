"""What the ``data.pkl`` of one stored tensor says: element type, storage, shape and strides, without unpickling it.

``torch.save`` of one tensor pickles a call of ``torch._utils._rebuild_tensor_v2`` (typed storages) or of
``_rebuild_tensor_v3`` (``UntypedStorage`` and a dtype; torch 2.13 ``_tensor.py``, ``_reduce_ex_internal``), perhaps
inside a ``_rebuild_parameter``. The few opcodes that takes are read here one by one; every name stays a name and
nothing is called. Only the bytes given are looked at, so the work is bounded by their number.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NoReturn

from reshard_service.dtypes import by_torch_name
from reshard_service.errors import SourceCorrupt, UnsafeSource, UnsupportedSource
from reshard_service.formats.pickles.standins import Opaque

_PARAMETER_CALLS = frozenset({"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"})
_V2 = "torch._utils._rebuild_tensor_v2"
_V3 = "torch._utils._rebuild_tensor_v3"
_V1 = "torch._utils._rebuild_tensor"
FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_PLAIN_CLASSES = frozenset(
    {"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
)

TENSOR_CALLS = frozenset({_V1, _V2, _V3, FROM_TYPE}) | _PARAMETER_CALLS
"""What torch's reducers of a plain tensor or parameter call."""

TYPED_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
"""Classes of the ``torch`` namespace that name a storage's element type (torch ``storage.py``)."""

_WHY_UNSUPPORTED = {
    "torch._utils._rebuild_qtensor": "is quantised: its scale and zero point are not part of its bytes",
    "torch._utils._rebuild_sparse_tensor": "is sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "is sparse",
    "torch._utils._rebuild_nested_tensor": "is a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "is a meta tensor: it has no bytes",
    "torch._utils._rebuild_device_tensor_from_numpy": "is stored as a numpy array of another device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "is stored by another device's own encoding",
    "torch._utils._rebuild_wrapper_subclass": "is a tensor subclass",
    "torch._tensor._rebuild_from_type": "is a tensor subclass",
}


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One tensor as ``data.pkl`` describes it; ``strides`` and ``offset`` count elements of the storage."""

    torch_dtype: str
    storage_key: str
    """The storage lies in the zip member ``data/<storage_key>``."""
    storage_bytes: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Named(Opaque):
    """Stands for one global: the class itself where the pickle only names it, an instance where it calls it."""

    __slots__ = ()
    dotted: ClassVar[str] = ""
    args: tuple[object, ...]


@lru_cache(maxsize=4096)
def named(dotted: str) -> type[Named]:
    """The stand-in for the global ``dotted``."""
    return type("Named", (Named,), {"__slots__": (), "dotted": dotted})


def name_of(value: object) -> str | None:
    """The global that a value of the pickle names without calling it."""
    return value.dotted if isinstance(value, type) and issubclass(value, Named) else None


@dataclass(frozen=True, slots=True)
class Persistent:
    """A persistent id: torch's reference to a storage."""

    value: object


def read_array_pickle(data: bytes, at: int = 0) -> tuple[StoredArray, int]:
    """The tensor that the pickle at ``data[at:]`` describes, and where the pickle ends.

    Raises :class:`SourceCorrupt` where it is no such pickle, :class:`UnsupportedSource` for a tensor that is more than
    its bytes (quantised, sparse, subclass, conjugate or negative view), :class:`UnsafeSource` for any other name.
    """
    reader = _Reader(data, at)
    try:
        value = reader.run()
    except (IndexError, struct.error, UnicodeDecodeError, TypeError):
        raise SourceCorrupt("data.pkl is cut short or not a pickle of one tensor") from None
    return described_array(value), reader.at


def described_array(value: object) -> StoredArray:
    """The tensor that a value of a loaded pickle describes; raises what :func:`read_array_pickle` does."""
    while isinstance(value, Named):
        if value.dotted in _PARAMETER_CALLS and value.args:
            value = value.args[0]
        elif value.dotted == FROM_TYPE and len(value.args) == 4:
            function, kind, args, _ = value.args
            if name_of(kind) not in _PLAIN_CLASSES:
                _unsupported("is a tensor subclass")
            if name_of(function) is None or not isinstance(args, tuple):
                _malformed()
            return _rebuilt(name_of(function), args)
        else:
            return _rebuilt(value.dotted, value.args)
    raise SourceCorrupt("data.pkl does not hold a tensor")


def _rebuilt(function: str | None, args: tuple[object, ...]) -> StoredArray:
    if function == _V2 and 6 <= len(args) <= 7:
        metadata = args[6] if len(args) == 7 else None
        dtype: object = None
    elif function == _V3 and 7 <= len(args) <= 8:
        metadata = args[7] if len(args) == 8 else None
        dtype = args[6]
    elif function == _V1 and len(args) == 4:
        metadata = dtype = None
    elif why := _WHY_UNSUPPORTED.get(function or ""):
        _unsupported(why)
    else:
        _malformed()
    if metadata:
        _unsupported("is a conjugate or negative view: its values are not its bytes")
    storage, offset, sizes, strides = args[:4]
    if type(offset) is not int or not _counts(sizes) or not _counts(strides) or offset < 0:
        _malformed()
    assert isinstance(sizes, tuple)
    assert isinstance(strides, tuple)
    if len(sizes) != len(strides):
        _malformed()
    kind, key, count = _storage(storage)
    if kind == "torch.storage.UntypedStorage":
        dtype_name = name_of(dtype)
        if dtype_name is None or not dtype_name.startswith("torch."):
            _malformed()
        return StoredArray(dtype_name[len("torch.") :], key, count, sizes, strides, offset)
    typed = TYPED_STORAGES.get(kind.removeprefix("torch."))
    if typed is None:
        _unsupported(f"lies in a {kind}")
    if dtype is not None and name_of(dtype) != f"torch.{typed}":
        _malformed()
    return StoredArray(typed, key, count * by_torch_name(typed).itemsize, sizes, strides, offset)


def _storage(value: object) -> tuple[str, str, int]:
    """Class name, key and length of ``("storage", class, key, location, length[, view])``."""
    parts = value.value if isinstance(value, Persistent) else None
    if (
        not isinstance(parts, tuple)
        or not 5 <= len(parts) <= 6
        or parts[0] != "storage"
        or parts[5:] not in ((), (None,))
    ):
        _malformed()
    kind, key, location, count = name_of(parts[1]), *parts[2:5]
    if kind is None or not isinstance(key, str) or type(count) is not int or count < 0:
        _malformed()
    if location == "meta":
        _unsupported("is a meta tensor: it has no bytes")
    return kind, key, count


def _counts(value: object) -> bool:
    return isinstance(value, tuple) and all(type(item) is int and item >= 0 for item in value)


def _malformed() -> NoReturn:
    raise SourceCorrupt("data.pkl does not describe a tensor the way torch does")


def _unsupported(why: str) -> NoReturn:
    raise UnsupportedSource(f"the stored tensor {why}", hint="save it again as a plain dense tensor")


_MARK = object()


class _Reader:
    """The stack machine of pickle, for the opcodes that torch's picklers use in one tensor (protocols 2 to 5)."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data = data
        self.at = at
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        opcodes = _OPCODES
        while True:
            opcode = self.data[self.at]
            self.at += 1
            if opcode == 0x2E:  # STOP
                if len(self.stack) != 1:
                    _malformed()
                return self.stack[0]
            action = opcodes.get(opcode)
            if action is None:
                raise SourceCorrupt(f"data.pkl uses the opcode 0x{opcode:02x}, which no stored tensor needs")
            action(self)

    def take(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise IndexError
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def line(self) -> str:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise IndexError
        text = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return text

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def push_signed(self, width: int) -> None:
        self.stack.append(int.from_bytes(self.take(width), "little", signed=True))

    def push_text(self, width: int) -> None:
        self.stack.append(self.take(self.unsigned(width)).decode("utf-8"))

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            _malformed()
        self.stack.append(self.memo[index])

    def to_mark(self) -> list[object]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        return _malformed()

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            _malformed()
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.stack.append(items)

    def push_name(self, name: str) -> None:
        if why := _WHY_UNSUPPORTED.get(name):
            _unsupported(why)
        self.stack.append(named(name))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            _malformed()
        self.push_name(f"{module}.{name}")

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, type) or not issubclass(function, Named) or not isinstance(args, tuple):
            _malformed()
        name = function.dotted
        if name == "collections.OrderedDict":
            self.stack.append({})
        elif name in TENSOR_CALLS:
            self.stack.append(function(*args))
        elif name.startswith("torch"):
            _unsupported(f"is made by {name}")
        else:
            raise UnsafeSource(
                f"data.pkl wants to call {name!r}, which no stored tensor needs; nothing of it was run",
                hint="don't trust this file",
            )

    def set_items(self) -> None:
        items = self.to_mark()
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            _malformed()
        # Only whether there is anything in a dict is ever asked (hooks, metadata, a parameter's attributes).
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                _malformed()
            target[key] = value

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack += [_MARK, key, value]
        self.set_items()

    def proto(self) -> None:
        if self.take(1)[0] > 5:
            _malformed()


_OPCODES: dict[int, Callable[[_Reader], object]] = {
    0x80: _Reader.proto,
    0x95: lambda r: r.take(8),  # FRAME: its length binds nothing here
    ord("c"): lambda r: r.push_name(f"{r.line()}.{r.line()}"),
    0x93: _Reader.stack_global,
    ord("("): lambda r: r.stack.append(_MARK),
    ord("t"): lambda r: r.stack.append(tuple(r.to_mark())),
    ord(")"): lambda r: r.stack.append(()),
    0x85: lambda r: r.tuple_of(1),
    0x86: lambda r: r.tuple_of(2),
    0x87: lambda r: r.tuple_of(3),
    ord("}"): lambda r: r.stack.append({}),
    ord("s"): _Reader.set_item,
    ord("u"): _Reader.set_items,
    ord("X"): lambda r: r.push_text(4),
    0x8C: lambda r: r.push_text(1),
    ord("K"): lambda r: r.stack.append(r.unsigned(1)),
    ord("M"): lambda r: r.stack.append(r.unsigned(2)),
    ord("J"): lambda r: r.push_signed(4),
    0x8A: lambda r: r.push_signed(r.unsigned(1)),
    0x88: lambda r: r.stack.append(True),
    0x89: lambda r: r.stack.append(False),
    ord("N"): lambda r: r.stack.append(None),
    ord("q"): lambda r: r.put(r.unsigned(1)),
    ord("r"): lambda r: r.put(r.unsigned(4)),
    0x94: lambda r: r.put(len(r.memo)),
    ord("h"): lambda r: r.get(r.unsigned(1)),
    ord("j"): lambda r: r.get(r.unsigned(4)),
    ord("Q"): lambda r: r.stack.append(Persistent(r.stack.pop())),
    ord("R"): _Reader.reduce,
}
