"""The source side of a worker: open files, places of payloads inside items, and arrays that need unpacking first."""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import IO, Any, cast

import numpy as np
import zstandard
from numpy.typing import NDArray

from reshard_service.catalogue import Catalogue, Storing, Tensor
from reshard_service.engine.checksums import crc32
from reshard_service.engine.source_digests import SourceDigests
from reshard_service.errors import SourceChanged, SourceCorrupt, StorageFailed, UnsupportedSource
from reshard_service.formats.dcp.item import AFTER_BYTES, HEAD_BYTES, ItemReader, Payload, checksum
from reshard_service.storage.base import ByteReader
from reshard_service.storage.local import target_error

OPEN_FILES = 256
_BLOCK = 1 << 20


class Source:
    """Reads from one catalogue; shared by the threads of a worker."""

    def __init__(self, catalogue: Catalogue, digests: SourceDigests | None = None) -> None:
        self.catalogue = catalogue
        self.digests = digests
        """To compare what is read with, where the source has a manifest of ours."""
        self.items = ItemReader()
        self.read_bytes = 0
        """Bytes fetched from the store so far."""
        self.scratch: Path | None = None
        """Folder for nameless temporary files; None for the system's."""
        self._open: OrderedDict[int, ByteReader] = OrderedDict()
        self._payloads: dict[int, Payload] = {}
        self._unpacked: dict[int, Unpacked] = {}
        self._holders: dict[int, int] = {}
        self._lock = Lock()
        self._unpacking = Lock()

    def reader(self, file: int) -> ByteReader:
        with self._lock:
            reader = self._open.get(file)
            if reader is None:
                reader = self._open[file] = self.catalogue.storage.open(self.catalogue.files[file].path)
                if len(self._open) > OPEN_FILES:
                    # An evicted reader may still be in use by another thread: it closes when that one lets go.
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(file)
            return reader

    def will_read(self, file: int, start: int, length: int) -> None:
        """Let the store begin to fetch what is read next: the files of a round are then read together."""
        self.reader(file).will_need(start, length)

    def read_into(self, file: int, start: int, buffer: memoryview) -> None:
        self.reader(file).read_into(start, buffer)
        with self._lock:
            self.read_bytes += len(buffer)

    def locate(self, row: int, tensor: Tensor, head: memoryview) -> Payload:
        """Where the array lies in the item of chunk ``row``, whose first bytes are ``head``."""
        chunks = self.catalogue.chunks
        return self.items.locate(
            head,
            tensor.dtype,
            self.stored_sizes(row, tensor),
            item_bytes=int(chunks.length[row]),
            key=tensor.key,
            file=self.file_path(row),
        )

    def payload(self, row: int, tensor: Tensor) -> Payload:
        """The same, fetching the head; remembered while the tensor is worked on."""
        known = self._payloads.get(row)
        if known is None:
            chunks = self.catalogue.chunks
            head = bytearray(min(HEAD_BYTES, int(chunks.length[row])))
            self.read_into(int(chunks.file[row]), int(chunks.start[row]), memoryview(head))
            known = self._payloads[row] = self.locate(row, tensor, memoryview(head))
        return known

    def hold(self, rows: range) -> None:
        """Announce work on a tensor's chunk rows: what is remembered of them stays until as many ``forget``."""
        with self._lock:
            self._holders[rows.start] = self._holders.get(rows.start, 0) + 1

    def forget(self, rows: range) -> None:
        """Let go of what is remembered of chunk rows whose tensor is done, unless another thread holds it."""
        with self._lock:
            holders = self._holders.pop(rows.start, 1) - 1
            if holders > 0:
                self._holders[rows.start] = holders
                return
            remembered = len(self._payloads) + len(self._unpacked)
            for row in rows if len(rows) < remembered else [*self._payloads, *self._unpacked]:
                if row in rows:
                    self._payloads.pop(row, None)
                    unpacked = self._unpacked.pop(row, None)
                    if unpacked is not None:
                        unpacked.close()

    def unpacked(self, row: int, tensor: Tensor) -> Unpacked:
        """The array of a compressed item, or of one with unusual strides, as row-major bytes in a scratch file."""
        with self._unpacking:
            known = self._unpacked.get(row)
            if known is None:
                known = self._unpacked[row] = self._unpack(row, tensor)
            return known

    def _unpack(self, row: int, tensor: Tensor) -> Unpacked:
        item = Unpacked(self.scratch)
        try:
            for block in self._item_bytes(row, tensor):
                item.append(block)
            head = bytearray(min(HEAD_BYTES, item.length))
            item.read_into(0, memoryview(head))
            sizes, file = self.stored_sizes(row, tensor), self.file_path(row)
            payload = self.items.locate(
                memoryview(head), tensor.dtype, sizes, item_bytes=item.length, key=tensor.key, file=file
            )
            item.check(payload, tensor.key, file)
            return item.as_rows(payload, sizes, tensor.dtype.itemsize)
        finally:
            item.close()

    def _item_bytes(self, row: int, tensor: Tensor) -> Iterator[memoryview]:
        """The item of a chunk row, a block at a time, unpacked if it is compressed."""
        chunks = self.catalogue.chunks
        packed = _ItemStream(self, int(chunks.file[row]), int(chunks.start[row]), int(chunks.length[row]))
        if chunks.storing[row] != Storing.ZSTD_ITEM:
            while block := packed.read(_BLOCK):
                yield memoryview(block)
            return
        limit = tensor.nbytes + (1 << 20)
        unpacked = 0
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        try:
            # The reader gives no more than is asked for, whatever a few bytes of the stream would unpack to.
            with decompressor.stream_reader(
                cast(IO[bytes], packed), read_size=1 << 17, read_across_frames=True
            ) as stream:
                while block := stream.read(_BLOCK):
                    unpacked += len(block)
                    if unpacked > limit:
                        raise SourceCorrupt(
                            f"the compressed item of tensor {tensor.key!r} unpacks to more than {limit} bytes",
                            tensor=tensor.key,
                            file=self.file_path(row),
                        )
                    yield memoryview(block)
        except zstandard.ZstdError as error:
            raise SourceCorrupt(
                f"the compressed item of tensor {tensor.key!r} does not unpack: {error}",
                tensor=tensor.key,
                file=self.file_path(row),
            ) from None

    def stored_sizes(self, row: int, tensor: Tensor) -> tuple[int, ...]:
        chunks = self.catalogue.chunks
        table = chunks.sizes if chunks.stored is None else chunks.stored
        return tuple(table[row, : len(tensor.shape)].tolist())

    def file_path(self, row: int) -> str:
        return self.catalogue.files[int(self.catalogue.chunks.file[row])].path

    def check_unchanged(self) -> None:
        """Raise :class:`SourceChanged` if a data file is not what it was when the catalogue was made (decision 18)."""
        for entry in self.catalogue.files:
            status = self.catalogue.storage.stat(entry.path)
            if status is None or status.identity != entry.identity:
                raise SourceChanged(
                    f"file {entry.path!r} changed while it was read",
                    file=entry.path,
                    hint="wait until whatever writes the checkpoint is done, then run again",
                )

    def close(self) -> None:
        with self._lock:
            for reader in self._open.values():
                reader.close()
            self._open.clear()
        for unpacked in self._unpacked.values():
            unpacked.close()


class _ItemStream:
    """The bytes of one item as a file that is read from front to back."""

    def __init__(self, source: Source, file: int, start: int, length: int) -> None:
        self._source, self._file, self._at, self._left = source, file, start, length

    def read(self, size: int) -> bytes:
        block = bytearray(min(size, self._left))
        self._source.read_into(self._file, self._at, memoryview(block))
        self._at += len(block)
        self._left -= len(block)
        return bytes(block)


class Unpacked:
    """A nameless scratch file that grows and is then read at random."""

    def __init__(self, scratch: Path | None) -> None:
        self._scratch = scratch
        self.length = 0
        try:
            self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115 - lives until close()
        except OSError as error:
            raise target_error(error, "making a scratch file for an item that has to be unpacked") from None

    def append(self, data: memoryview) -> None:
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise target_error(error, "unpacking an item into a scratch file") from None
        self.length += len(data)

    def read_into(self, start: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._file.fileno(), [buffer[done:]], start + done)
            except OSError as error:
                raise StorageFailed(f"reading an unpacked item from a scratch file failed: {error.strerror}") from None
            if count == 0:
                raise SourceCorrupt("an unpacked item is shorter than its tensor")
            done += count

    def check(self, payload: Payload, key: str, file: str) -> None:
        """Compare the recorded CRC32 with that of the storage's bytes."""
        expected = payload.crc32
        if expected is None:
            after = bytearray(max(0, min(AFTER_BYTES, self.length - payload.start - payload.storage_bytes)))
            self.read_into(payload.start + payload.storage_bytes, memoryview(after))
            expected = checksum(memoryview(after), payload.storage_bytes)
        found, block = 0, memoryview(bytearray(_BLOCK))
        for at in range(0, payload.storage_bytes, _BLOCK):
            piece = block[: min(_BLOCK, payload.storage_bytes - at)]
            self.read_into(payload.start + at, piece)
            found = crc32(piece, found)
        if expected is not None and found != expected:
            raise crc_mismatch(key, file, expected, found)

    def as_rows(self, payload: Payload, sizes: tuple[int, ...], itemsize: int) -> Unpacked:
        """The array row-major from byte 0, as a file of its own."""
        strides = payload.strides or _row_major(sizes)
        stored: NDArray[Any] = np.memmap(self._file, dtype=np.uint8, mode="r", shape=(self.length,))
        begin = payload.start + payload.storage_offset_bytes
        if any(stride < 0 for stride in strides):
            raise UnsupportedSource("a stored tensor has negative strides")
        view = np.ndarray(
            sizes, np.dtype((np.void, itemsize)), stored, begin, tuple(stride * itemsize for stride in strides)
        )
        rows = Unpacked(self._scratch)
        flat = view.reshape(1) if not sizes else view
        step = max(1, _BLOCK // max(1, itemsize * int(np.prod(sizes[1:]))))
        try:
            for start in range(0, flat.shape[0], step):
                block = np.ascontiguousarray(flat[start : start + step])
                rows.append(block.reshape(-1).view(np.uint8).data)
        except BaseException:
            rows.close()
            raise
        return rows

    def close(self) -> None:
        self._file.close()


def crc_mismatch(key: str, file: str, expected: int, found: int) -> SourceCorrupt:
    return SourceCorrupt(
        f"tensor {key!r} in {file!r} has CRC32 {found:08x}, recorded is {expected:08x}: its bytes were damaged",
        tensor=key,
        file=file,
        hint="copy the file again from its origin",
    )


def _row_major(sizes: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))
