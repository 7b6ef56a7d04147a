"""Loading pickles without performing them."""

import io
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard_service.errors import ReshardError, SourceCorrupt, UnsafeSource
from reshard_service.formats.pickles import InertDict, Opaque, PickleLimits, safe_load
from reshard_service.formats.pickles.scan import scan
from tests.formats.pickles.planted import bombs, harmless, planted, truncations

ALLOWED = {
    "torch.Size": tuple,
    "collections.OrderedDict": InertDict,
    "torch.distributed.checkpoint.metadata.Metadata": Opaque,
}


def load(data: bytes) -> object:
    return safe_load(data, allowed=ALLOWED, file="x.pkl")


leaf = st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text()
plain = st.recursive(
    leaf | st.binary(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(plain, st.sampled_from([3, 4, 5]))
def test_plain_values_come_back_as_pickle_gives_them(value: object, protocol: int) -> None:
    assert load(pickle.dumps(value, protocol)) == value


@given(plain)
def test_the_python_pickler_is_read_as_well_as_the_c_one(value: object) -> None:
    buffer = io.BytesIO()
    pickle._Pickler(buffer, 4).dump(value)
    assert load(buffer.getvalue()) == value


def test_a_large_pickle_with_many_frames_is_read() -> None:
    value = {f"key {i}": (i, [str(i)] * 3) for i in range(20_000)}
    data = pickle.dumps(value)
    assert load(data) == value


def test_allowed_names_become_their_stand_ins() -> None:
    value = {"size": torch.Size((3, 4)), "ordered": OrderedDict(a=1)}
    assert load(pickle.dumps(value)) == {"size": (3, 4), "ordered": {"a": 1}}


def test_attributes_of_an_ordered_dict_are_dropped() -> None:
    state = torch.nn.Linear(1, 1).state_dict()
    state.clear()
    found = load(pickle.dumps(state))
    assert found == {}
    assert not hasattr(found, "_metadata")


@pytest.mark.parametrize("trick", planted(Path("unused")))
def test_a_planted_payload_is_refused_and_never_runs(trick: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with pytest.raises((UnsafeSource, SourceCorrupt)) as caught:
        load(planted(marker)[trick])
    assert not marker.exists()
    assert caught.value.exit_code == 3
    assert caught.value.file == "x.pkl"


@pytest.mark.parametrize(
    ("trick", "name"),
    [
        ("reduce", "posix.system"),
        ("reduce protocol 0 global", "posix.system"),
        ("dotted name", "torch.serialization.os.system"),
        ("getattr", "builtins.getattr"),
        ("torch load", "torch.load"),
    ],
)
def test_a_refused_global_is_named(trick: str, name: str) -> None:
    with pytest.raises(UnsafeSource, match=f"wants to import '{name}'"):
        load(planted(Path("unused"))[trick])


def test_the_payload_would_have_run_under_pickle_itself(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    pickle.loads(planted(marker)["reduce"])
    assert marker.exists()


@pytest.mark.parametrize("bomb", bombs())
def test_a_bomb_is_refused(bomb: str) -> None:
    with pytest.raises((UnsafeSource, SourceCorrupt)):
        load(bombs()[bomb])


@pytest.mark.parametrize("bomb", ["memo index", "string longer than the file", "deep tuple as a key"])
def test_a_bomb_costs_no_memory(bomb: str) -> None:
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from reshard_service.errors import ReshardError\n"
        "from reshard_service.formats.pickles import safe_load\n"
        "try: safe_load(sys.stdin.buffer.read(), allowed={}, file='x')\n"
        "except ReshardError as error: print(error.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], input=bombs()[bomb], capture_output=True, check=True)
    assert done.stdout.strip() in (b"unsafe_source", b"source_corrupt")


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_truncated_pickle_is_corrupt(protocol: int) -> None:
    data = pickle.dumps({str(i): [i, (i, "x" * i)] for i in range(50)}, protocol)
    for cut in truncations(data):
        with pytest.raises(SourceCorrupt):
            load(cut)


def test_bytes_behind_the_end_are_refused() -> None:
    with pytest.raises(SourceCorrupt, match="goes on for 3 bytes"):
        load(harmless() + b"abc")


def test_limits_are_kept() -> None:
    data = pickle.dumps(list(range(1000)))
    for limits in (PickleLimits(data_bytes=100), PickleLimits(opcodes=100), PickleLimits(stack=10)):
        with pytest.raises(UnsafeSource):
            safe_load(data, allowed={}, file="x", limits=limits)
    with pytest.raises(UnsafeSource, match="deeper than 2"):
        safe_load(pickle.dumps((((1,),),)), allowed={}, file="x", limits=PickleLimits(tuple_depth=2))


def test_persistent_ids_go_to_the_callback_only() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", "0") if isinstance(value, os.PathLike) else None

    buffer = io.BytesIO()
    Pickler(buffer).dump([Path("a"), 1])
    assert safe_load(buffer.getvalue(), allowed={}, persistent=lambda pid: pid, file="x") == [("storage", "0"), 1]
    with pytest.raises(UnsafeSource, match="outside itself"):
        safe_load(buffer.getvalue(), allowed={}, file="x")


def test_what_a_callback_refuses_is_passed_on() -> None:
    def refuse(pid: object) -> object:
        raise SourceCorrupt("no such storage")

    with pytest.raises(SourceCorrupt, match="no such storage"):
        safe_load(b"\x80\x04K\x01Q.", allowed={}, persistent=refuse, file="x")


def test_a_stand_in_keeps_no_state() -> None:
    stand_in = Opaque(1, 2)
    assert stand_in.args == (1, 2)
    stand_in.__setstate__({"__class__": int})
    with pytest.raises(AttributeError):
        stand_in.other = 1  # type: ignore[attr-defined]


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_load_or_raise_one_of_our_errors(data: bytes) -> None:
    try:
        load(data)
    except ReshardError as error:
        assert error.exit_code == 3  # noqa: PT017 - an error is allowed, not expected


@settings(max_examples=300)
@given(st.data())
def test_any_mutation_loads_or_raises_one_of_our_errors(data: st.DataObject) -> None:
    value = {"a": torch.Size((3, 4)), "b": [1, 2, ("x", 1.5)], "c": OrderedDict(a=b"q")}
    mutated = bytearray(pickle.dumps(value, data.draw(st.sampled_from([2, 4]))))
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    try:
        load(bytes(mutated))
    except ReshardError as error:
        assert error.exit_code == 3  # noqa: PT017 - an error is allowed, not expected


def test_the_scan_counts_opcodes_like_pickletools() -> None:
    import pickletools

    data = harmless()
    assert scan(data, file="x") == sum(1 for _ in pickletools.genops(data))
