"""The nested dict that a ``torch.save`` file pickles, flattened to its leaves, with nothing of it run.

Every global of torch becomes an inert stand-in (:class:`~reshard_service.formats.dcp.data_pickle.Named`), so that a
tensor we can't read is refused by its own name, not by that of a class. A DTensor (torch 2.13
``distributed/tensor/_api.py``) pickles as a wrapper subclass whose state holds ``_local_tensor``: this rank's piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from reshard_service.catalogue import Path
from reshard_service.errors import NameCollision, ReshardError, UnsafeSource, UnsupportedSource
from reshard_service.formats.dcp.data_pickle import (
    FROM_TYPE,
    Named,
    Persistent,
    StoredArray,
    described_array,
    name_of,
    named,
)
from reshard_service.formats.pickles import InertDict, safe_load

_MAX_DEPTH = 64
_MAX_KEY = 4096
_WRAPPER = "torch._utils._rebuild_wrapper_subclass"

# Values that training scripts put beside the weights. They are never looked at, only listed.
_HARMLESS = frozenset(
    {
        "_codecs.encode",
        "argparse.Namespace",
        "builtins.bytearray",
        "builtins.complex",
        "builtins.frozenset",
        "builtins.set",
        "builtins.slice",
        "collections.Counter",
        "collections.defaultdict",
        "collections.deque",
        "datetime.datetime",
        "datetime.timedelta",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "numpy.ndarray",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",
        "__builtin__.set",
        "__builtin__.complex",
    }
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor leaf: where it sits, the array that holds it, and for a DTensor the shape of the whole."""

    key: str
    path: Path
    array: StoredArray
    global_shape: tuple[int, ...] | None = None


@dataclass(slots=True)
class StateDict:
    """The leaves by key, in the order of the dicts; ``others`` are the paths of what is no tensor."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    others: dict[str, Path] = field(default_factory=dict)


class _Allowed(Mapping[str, Callable[..., Any]]):
    """Dicts as inert dicts, everything of torch and the harmless rest as named stand-ins."""

    def __getitem__(self, dotted: str) -> Callable[..., Any]:
        if dotted == "collections.OrderedDict":
            return InertDict
        if dotted.startswith("torch.") or dotted in _HARMLESS:
            return named(dotted)
        raise KeyError(dotted)

    def __iter__(self) -> Iterator[str]:
        return iter(("collections.OrderedDict", *_HARMLESS))

    def __len__(self) -> int:
        return 1 + len(_HARMLESS)


def read_state_dict(data: bytes, file: str) -> StateDict:
    """The leaves of the pickle ``data``.

    Dicts are always descended into, lists and tuples where a tensor or a dict lies in them, as DCP does (torch 2.13
    ``_traverse.py``; it keeps tuples whole). Raises :class:`UnsafeSource`, :class:`UnsupportedSource`,
    :class:`SourceCorrupt` and, for two leaves of one key, :class:`NameCollision`.
    """
    value = safe_load(data, allowed=_Allowed(), persistent=Persistent, file=file)
    found = StateDict()
    if _is_tensor(value) or not isinstance(value, (dict, list, tuple)):
        raise UnsupportedSource(f"{file!r} holds no state dict", file=file, hint="save model.state_dict()")
    # A pickle can hold one dict in many places: what is walked may not be much more than what was written.
    _Walk(file, found, budget=4 * len(data) + 1000).walk(value, (), "", 0)
    return found


@dataclass(slots=True)
class _Walk:
    file: str
    found: StateDict
    budget: int

    def walk(self, value: object, path: Path, key: str, depth: int) -> None:
        self._spend(depth, key)
        if _is_tensor(value):
            self._must_be_new(key)
            self.found.tensors[key] = _tensor(value, key, path, self.file)
        elif isinstance(value, dict):
            for name, inner in value.items():
                if type(name) not in (str, int, float, bool, type(None)):
                    raise UnsupportedSource(
                        f"a dict in {self.file!r}, at {key!r}, has a key that is neither text nor a number",
                        file=self.file,
                    )
                self.walk(inner, (*path, str(name)), _below(key, str(name)), depth + 1)
        elif isinstance(value, (list, tuple)) and self._holds_leaves(value, depth):
            for index, inner in enumerate(value):
                self.walk(inner, (*path, index), _below(key, str(index)), depth + 1)
        else:
            self._must_be_new(key)
            self.found.others[key] = path

    def _spend(self, depth: int, key: str) -> None:
        self.budget -= 1
        if self.budget < 0 or depth > _MAX_DEPTH or len(key) > _MAX_KEY:
            raise UnsafeSource(
                f"{self.file!r} nests its values deeper, or shares them more often, than any checkpoint does",
                file=self.file,
                hint="don't trust this file",
            )

    def _must_be_new(self, key: str) -> None:
        if key in self.found.tensors or key in self.found.others:
            raise NameCollision(f"{self.file!r} has two values with the key {key!r}", tensor=key, file=self.file)

    def _holds_leaves(self, values: list[object] | tuple[object, ...], depth: int) -> bool:
        self._spend(depth, "")
        for value in values:
            if isinstance(value, dict) or _is_tensor(value):
                return True
            if isinstance(value, (list, tuple)) and self._holds_leaves(value, depth + 1):
                return True
        return False


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _is_tensor(value: object) -> bool:
    return isinstance(value, Named) and (value.dotted.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_")))


def _tensor(value: object, key: str, path: Path, file: str) -> StoredTensor:
    try:
        whole = _distributed(value)
        if whole is None:
            return StoredTensor(key, path, described_array(value))
        local, global_shape = whole
        return StoredTensor(key, path, described_array(local), global_shape)
    except ReshardError as error:
        error.tensor, error.file = key, file
        raise


def _distributed(value: object) -> tuple[object, tuple[int, ...]] | None:
    """A DTensor's local tensor and global shape; None for anything else."""
    if not isinstance(value, Named) or value.dotted != FROM_TYPE or len(value.args) != 4:
        return None
    function, kind, args, state = value.args
    kind_name = name_of(kind) or ""
    if name_of(function) != _WRAPPER or not (
        kind_name.startswith("torch.distributed.") and kind_name.endswith(".DTensor")
    ):
        return None
    slots = state[1] if isinstance(state, tuple) and len(state) == 2 else state
    shape = args[2] if isinstance(args, tuple) and len(args) > 2 else None
    if not isinstance(slots, dict) or "_local_tensor" not in slots or not isinstance(shape, tuple):
        return None
    if not all(type(size) is int and size >= 0 for size in shape):
        return None
    return slots["_local_tensor"], shape
