"""The one table of element types: every storage type that safetensors 0.8 or torch 2.13 can write.

A *stored element* is the smallest unit that bytes are addressed by. For the sub-byte types that is a packed group:
``F4`` packs two values in a byte (torch calls that ``float4_e2m1fn_x2``), ``F6_*`` four values in three bytes. Shapes
inside this project count stored elements; safetensors headers count values, so a reader or writer of that format
scales the last dim by ``values_per_element``.
"""

from __future__ import annotations

from dataclasses import dataclass

from reshard_service.errors import UnsupportedSource


@dataclass(frozen=True, slots=True)
class DType:
    """One element type. ``name`` is safetensors' spelling (ours where safetensors has none)."""

    name: str
    itemsize: int
    """Bytes of one stored element."""
    torch: str | None
    """Attribute name in the torch namespace; None where torch has no such type."""
    floating: bool = False
    in_safetensors: bool = True
    values_per_element: int = 1
    castable: bool = False
    """True for the real floating types of 16 bits or more, which --dtype may cast (decision 7)."""

    def __str__(self) -> str:
        return self.name


_TABLE = (
    DType("F64", 8, "float64", floating=True, castable=True),
    DType("F32", 4, "float32", floating=True, castable=True),
    DType("F16", 2, "float16", floating=True, castable=True),
    DType("BF16", 2, "bfloat16", floating=True, castable=True),
    DType("F8_E4M3", 1, "float8_e4m3fn", floating=True),
    DType("F8_E5M2", 1, "float8_e5m2", floating=True),
    DType("F8_E8M0", 1, "float8_e8m0fnu", floating=True),
    DType("F8_E4M3FNUZ", 1, "float8_e4m3fnuz", floating=True),
    DType("F8_E5M2FNUZ", 1, "float8_e5m2fnuz", floating=True),
    DType("F6_E2M3", 3, None, floating=True, values_per_element=4),
    DType("F6_E3M2", 3, None, floating=True, values_per_element=4),
    DType("F4", 1, "float4_e2m1fn_x2", floating=True, values_per_element=2),
    DType("I64", 8, "int64"),
    DType("I32", 4, "int32"),
    DType("I16", 2, "int16"),
    DType("I8", 1, "int8"),
    DType("U64", 8, "uint64"),
    DType("U32", 4, "uint32"),
    DType("U16", 2, "uint16"),
    DType("U8", 1, "uint8"),
    DType("BOOL", 1, "bool"),
    DType("C64", 8, "complex64"),
    DType("C128", 16, "complex128", in_safetensors=False),
    DType("C32", 4, "complex32", in_safetensors=False),
    DType("BITS8", 1, "bits8", in_safetensors=False),
    DType("BITS16", 2, "bits16", in_safetensors=False),
)

_BY_NAME = {dtype.name: dtype for dtype in _TABLE}
_BY_TORCH = {dtype.torch: dtype for dtype in _TABLE if dtype.torch is not None}
_TORCH_ALIASES = {
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "chalf": "complex32",
    "cfloat": "complex64",
    "cdouble": "complex128",
}


def all_dtypes() -> tuple[DType, ...]:
    """Every type of the table."""
    return _TABLE


def by_name(name: str) -> DType:
    """The type with safetensors' spelling ``name``; raises :class:`UnsupportedSource` for one we don't know."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise UnsupportedSource(f"unknown dtype {name!r}; known: {', '.join(_BY_NAME)}") from None


def by_torch_name(name: str) -> DType:
    """The type torch calls ``torch.<name>``; raises :class:`UnsupportedSource` for one we don't know."""
    try:
        return _BY_TORCH[_TORCH_ALIASES.get(name, name)]
    except KeyError:
        raise UnsupportedSource(
            f"unsupported torch dtype 'torch.{name}'",
            hint="quantised and sub-byte integer types carry meaning outside their bytes and can't be moved as bytes",
        ) from None
