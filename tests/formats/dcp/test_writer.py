"""Designs of DCP targets, carried out byte by byte here and loaded by torch."""

import io
import pickle
import zlib
from collections import defaultdict
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from reshard_service.catalogue import ByteObject, Catalogue, Chunks, FileEntry, Identity, Section, Tensor, build_chunks
from reshard_service.dtypes import by_name, by_torch_name
from reshard_service.errors import CannotHold, NameCollision
from reshard_service.formats.dcp.writer import design_dcp, parameter_shapes
from reshard_service.formats.options import WriteOptions
from reshard_service.formats.target import Design, Selection
from reshard_service.layouts.shorthand import parse_layout
from reshard_service.storage.local import LocalStorage

# A dict of dicts as in a training script; identities are what the names say.
STATE = {
    "model": {
        "embed.weight": torch.arange(10 * 4, dtype=torch.float32).reshape(10, 4),
        "norm.weight": torch.arange(4, dtype=torch.bfloat16),
        "proj.weight": torch.arange(7 * 6, dtype=torch.bfloat16).reshape(7, 6),
        "experts": torch.arange(2 * 3 * 4 * 2 * 2, dtype=torch.int16).reshape(2, 3, 4, 2, 2),
        "flag": torch.tensor([True, False, True]),
        "scale": torch.tensor([1.0, 2.0, 0.5, 4.0, 8.0]).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 4),
        "count": torch.tensor(7, dtype=torch.int64),
    },
    "optim": {
        "state": {
            "proj.weight": {
                "step": torch.tensor(3.0),
                "exp_avg": torch.arange(42, dtype=torch.float32).reshape(7, 6),
                "row_var": torch.arange(7.0),
            }
        },
        "param_groups": [{"lr": 0.5, "params": ["proj.weight"]}],
    },
    "epoch": 11,
}


def leaves(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], object]]:
    """torch's flattening, without empty dicts: dicts, and lists of dicts."""
    if isinstance(value, dict):
        return [leaf for key, inner in value.items() for leaf in leaves(inner, (*path, key))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [leaf for key, inner in enumerate(value) for leaf in leaves(inner, (*path, key))]
    return [(path, value)]


def identity(path: tuple[str | int, ...]) -> Identity:
    if path[0] == "model":
        return Identity(Section.MODEL, str(path[1]))
    if path[:2] == ("optim", "state"):
        return Identity(Section.OPTIMIZER, str(path[2]), str(path[3]))
    return Identity(Section.EXTRA, ".".join(map(str, path)))


class Source:
    """A catalogue of ``state`` and the bytes it speaks of."""

    def __init__(self, folder: Path, state: dict[str, object] = STATE) -> None:
        self.tensors: list[Tensor] = []
        self.values: list[torch.Tensor] = []
        objects: list[ByteObject] = []
        blob = b""
        for path, value in leaves(state):
            key = ".".join(map(str, path))
            if isinstance(value, torch.Tensor):
                dtype = by_torch_name(str(value.dtype).removeprefix("torch."))
                self.tensors.append(Tensor(key, identity(path), dtype, tuple(value.shape), path))
                self.values.append(value)
            else:
                file = io.BytesIO()
                torch.save(value, file)
                objects.append(ByteObject(key, identity(path), path, 0, len(blob), len(file.getvalue())))
                blob += file.getvalue()
        self.blob = blob
        shapes = [tensor.shape for tensor in self.tensors]
        count = len(shapes)
        self.catalogue = Catalogue(
            uri=str(folder),
            storage=LocalStorage(folder),
            format="safetensors",
            tensors=tuple(self.tensors),
            chunks=build_chunks(
                count,
                range(count),
                [(0,) * len(shape) for shape in shapes],
                shapes,
                [0] * count,
                [0] * count,
                [1] * count,
            ),
            files=(FileEntry("a", 1, ""),),
            objects=tuple(objects),
        )

    def selection(self, catalogue: Catalogue | None = None) -> Selection:
        catalogue = catalogue or self.catalogue
        return Selection(
            catalogue, catalogue.tensors, np.arange(len(catalogue.tensors), dtype=np.int64), catalogue.objects
        )

    def write(self, design: Design, folder: Path) -> None:
        """The engine's work, in the plainest way."""
        assert design.framing is not None
        contents = [bytearray(file.bytes) for file in design.files]
        chunks = design.chunks
        for at, (tensor, value) in enumerate(zip(design.tensors, self.values, strict=True)):
            for row in range(*chunks.rows(at).indices(len(chunks))):
                box = tuple(
                    slice(offset, offset + size)
                    for offset, size in zip(chunks.offsets[row].tolist(), chunks.sizes[row].tolist(), strict=True)
                )[: len(tensor.shape)]
                piece = value[box].clone(memory_format=torch.contiguous_format)
                payload = bytes(piece.reshape(-1).view(torch.uint8).tolist())
                sizes = tuple(piece.shape)
                item = design.framing.head(tensor.dtype, sizes) + payload
                item += design.framing.tail(tensor.dtype, sizes, zlib.crc32(payload))
                start = int(chunks.start[row])
                assert len(item) == chunks.length[row]
                assert not any(contents[chunks.file[row]][start : start + len(item)])
                contents[chunks.file[row]][start : start + len(item)] = item
        for copy in design.objects:
            data = self.blob[copy.source.start : copy.source.start + copy.source.length]
            contents[copy.file][copy.start : copy.start + len(data)] = data
        folder.mkdir()
        for file, data in zip(design.files, contents, strict=True):
            (folder / file.path).write_bytes(data)
        for closing in design.closing:
            (folder / closing.path).write_bytes(closing.make())


def design(source: Source, layout: str | None, catalogue: Catalogue | None = None) -> Design:
    parsed = None if layout is None else parse_layout(layout, rules_known=True)
    return design_dcp(source.selection(catalogue), parsed, WriteOptions())


def as_catalogue(made: Design, folder: Path) -> Catalogue:
    """What reading the written target gives."""
    return Catalogue(
        uri=str(folder),
        storage=LocalStorage(folder),
        format="dcp",
        tensors=made.tensors,
        chunks=made.chunks,
        files=tuple(FileEntry(file.path, file.bytes, "") for file in made.files),
        objects=tuple(
            ByteObject(one.source.key, one.source.identity, one.source.path, one.file, one.start, one.source.length)
            for one in made.objects
        ),
        world=made.world,
    )


LAYOUTS = [None, "fsdp=1", "fsdp=2", "fsdp=4", "fsdp=16", "dp_replicate=2,fsdp=2", "dp_replicate=3"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore")
def test_torch_loads_what_was_designed(layout: str | None, tmp_path: Path) -> None:
    source = Source(tmp_path)
    source.write(design(source, layout), tmp_path / "out")
    wanted = {"model": {key: torch.full_like(value, 1) for key, value in STATE["model"].items()}}
    wanted["optim"] = {
        "state": {
            "proj.weight": {
                key: torch.zeros_like(value) for key, value in STATE["optim"]["state"]["proj.weight"].items()
            }
        },
        "param_groups": [{"lr": 0.0, "params": []}],
    }
    wanted["epoch"] = 0
    dcp.load(wanted, checkpoint_id=str(tmp_path / "out"), no_dist=True)
    assert_same(wanted, STATE)


@pytest.mark.parametrize("layout", [None, "fsdp=4"])
@pytest.mark.filterwarnings("ignore")
def test_torch_finds_the_nested_state_without_being_told_the_keys(layout: str | None, tmp_path: Path) -> None:
    source = Source(tmp_path)
    source.write(design(source, layout), tmp_path / "out")
    assert_same(_load_state_dict_from_keys(checkpoint_id=str(tmp_path / "out")), STATE)
    dcp_to_torch_save(str(tmp_path / "out"), str(tmp_path / "all.pt"))
    assert_same(torch.load(tmp_path / "all.pt", weights_only=True), STATE)
    only = _load_state_dict_from_keys({"optim.state.proj.weight.exp_avg"}, checkpoint_id=str(tmp_path / "out"))
    assert_same(only["optim"]["state"]["proj.weight"], {"exp_avg": STATE["optim"]["state"]["proj.weight"]["exp_avg"]})


def assert_same(one: object, other: object) -> None:
    if isinstance(other, dict):
        assert isinstance(one, dict)
        assert one.keys() == other.keys()
        for key in other:
            assert_same(one[key], other[key])
    elif isinstance(other, torch.Tensor):
        assert isinstance(one, torch.Tensor)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
    else:
        assert one == other


@pytest.mark.parametrize("layout", LAYOUTS)
def test_items_lie_back_to_back_aligned_and_in_the_order_of_the_selection(layout: str | None, tmp_path: Path) -> None:
    made = design(Source(tmp_path), layout)
    chunks = made.chunks
    assert not (chunks.start % 64).any()
    assert not (chunks.length % 64).any()
    for number, file in enumerate(made.files):
        rows = np.flatnonzero(chunks.file == number)
        ends = chunks.start[rows] + chunks.length[rows]
        assert (chunks.start[rows] == np.concatenate([[0], ends[:-1]])[: len(rows)]).all()
        end = int(ends[-1]) if len(rows) else 0
        for copy in made.objects:
            if copy.file == number:
                assert copy.start == end
                end += copy.source.length
        assert end == file.bytes
    assert made.closing[-1].path == ".metadata"


def test_each_rank_gets_its_own_shards_and_replicas_are_stored_once(tmp_path: Path) -> None:
    made = design(Source(tmp_path), "dp_replicate=2,fsdp=2")
    assert made.world == 4
    owners = defaultdict(set)
    for at, tensor in enumerate(made.tensors):
        rows = made.chunks.rows(at)
        assert made.chunks.sizes[rows, : len(tensor.shape)].prod(axis=1).sum() == tensor.numel
        for row in range(rows.start, rows.stop):
            path = made.files[made.chunks.file[row]].path
            owners[tensor.key, int(made.chunks.offsets[row, 0])].add(path)
    # Ranks 0 and 2 hold the first half of every tensor's rows, 1 and 3 the second.
    assert owners["model.embed.weight", 0] <= {"__0_0.distcp", "__2_0.distcp"}
    assert owners["model.embed.weight", 5] <= {"__1_0.distcp", "__3_0.distcp"}
    assert all(len(paths) == 1 for paths in owners.values())
    assert {path for paths in owners.values() for path in paths} == {f"__{rank}_0.distcp" for rank in range(4)}


def test_ranks_that_own_nothing_get_no_file(tmp_path: Path) -> None:
    source = Source(tmp_path, {"model": {"w": torch.ones(2, 2), "v": torch.ones(3)}})
    made = design(source, "fsdp=8")
    assert [file.path for file in made.files] == ["__0_0.distcp", "__1_0.distcp", "__2_0.distcp"]
    assert made.world == 8


def test_an_optimizer_slot_is_cut_like_its_parameter_only_if_it_has_its_shape(tmp_path: Path) -> None:
    source = Source(tmp_path)
    shapes = dict(zip([tensor.key for tensor in source.tensors], parameter_shapes(source.selection()), strict=True))
    assert shapes["optim.state.proj.weight.row_var"] == (7, 6)
    assert shapes["model.proj.weight"] is None
    chunks = {}
    made = design(source, "fsdp=2")
    for at, tensor in enumerate(made.tensors):
        chunks[tensor.key] = made.chunks.rows(at).stop - made.chunks.rows(at).start
    assert chunks["optim.state.proj.weight.exp_avg"] == 2
    assert chunks["optim.state.proj.weight.row_var"] == 1
    assert chunks["optim.state.proj.weight.step"] == 1


def test_without_its_model_an_optimizers_largest_slot_stands_for_the_parameter(tmp_path: Path) -> None:
    source = Source(tmp_path, {"optim": STATE["optim"]})
    assert set(parameter_shapes(source.selection())) == {(7, 6)}


@pytest.mark.filterwarnings("ignore")
def test_a_dcp_source_keeps_its_chunks_and_files_where_no_layout_is_given(tmp_path: Path) -> None:
    source = Source(tmp_path)
    first = design(source, "fsdp=4")
    again = design(source, None, as_catalogue(first, tmp_path))
    assert again.files == first.files
    for column in ("first", "offsets", "sizes", "file", "start", "length"):
        assert (getattr(again.chunks, column) == getattr(first.chunks, column)).all()
    assert [(one.file, one.start) for one in again.objects] == [(one.file, one.start) for one in first.objects]
    assert pickle.loads(again.closing[0].make()) == pickle.loads(first.closing[0].make())


def test_a_selection_from_a_dcp_source_keeps_only_the_files_it_needs(tmp_path: Path) -> None:
    source = Source(tmp_path)
    catalogue = as_catalogue(design(source, "fsdp=16"), tmp_path)
    wanted = [i for i, tensor in enumerate(catalogue.tensors) if tensor.key == "model.proj.weight"]
    selection = Selection(catalogue, (catalogue.tensors[wanted[0]],), np.array(wanted, dtype=np.int64))
    made = design_dcp(selection, None, WriteOptions())
    assert [file.path for file in made.files] == [f"__{rank}_0.distcp" for rank in range(7)]
    assert made.chunks.offsets[:, 0].tolist() == list(range(7))


def test_an_empty_selection_still_has_its_marker(tmp_path: Path) -> None:
    made = design(Source(tmp_path, {}), None)
    assert made.files == ()
    assert pickle.loads(made.closing[0].make()).state_dict_metadata == {}


def test_a_type_that_torch_does_not_have_and_double_keys_are_refused_by_name(tmp_path: Path) -> None:
    source = Source(tmp_path, {"model": {"w": torch.ones(2, 2)}})
    tensor = source.tensors[0]
    bad = Tensor(tensor.key, tensor.identity, by_name("F6_E3M2"), (2, 2), tensor.path)
    with pytest.raises(CannotHold, match=r"model\.w.*F6_E3M2"):
        design_dcp(Selection(source.catalogue, (bad,), np.zeros(1, dtype=np.int64)), None, WriteOptions())
    with pytest.raises(NameCollision, match=r"model\.w"):
        design_dcp(Selection(source.catalogue, (tensor, tensor), np.zeros(2, dtype=np.int64)), None, WriteOptions())


def test_a_kept_layout_of_many_files_puts_equal_items_at_equal_places(tmp_path: Path) -> None:
    per, count = 100, 2000
    shape = (per * 2, 3)
    tensors = tuple(
        Tensor(f"layers.{i}", Identity(Section.MODEL, f"layers.{i}"), by_name("BF16"), shape, (f"layers.{i}",))
        for i in range(count)
    )
    offsets = np.zeros((per * count, 2), dtype=np.int64)
    offsets[:, 0] = np.tile(np.arange(per) * 2, count)
    column = np.zeros(per * count, dtype=np.int64)
    chunks = Chunks(
        np.arange(count + 1, dtype=np.int64) * per, offsets, np.tile(np.array([[2, 3]]), (per * count, 1)),
        np.tile(np.arange(per), count).astype(np.int32), column, column, column.astype(np.uint8),
    )  # fmt: skip
    files = tuple(FileEntry(f"__{rank}_0.distcp", 0, "") for rank in range(per))
    source = Catalogue(str(tmp_path), LocalStorage(tmp_path), "dcp", tensors, chunks, files)
    made = design_dcp(Selection(source, tensors, np.arange(count, dtype=np.int64)), None, WriteOptions())
    item = int(made.chunks.length[0])
    assert {file.bytes for file in made.files} == {item * count}
    assert (made.chunks.start == np.repeat(np.arange(count) * item, per)).all()
    assert prod(made.chunks.sizes.shape) == per * count * 2
