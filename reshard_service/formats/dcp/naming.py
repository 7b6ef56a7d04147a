"""Which tensor is which in a DCP folder: identities from paths, or from what is known of the producer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reshard_service.catalogue import ByteObject, Identity, Notice, Tensor
from reshard_service.dtypes import DType, by_torch_name
from reshard_service.errors import AmbiguousSource, ReshardError, UnsupportedSource
from reshard_service.formats.dcp.metadata import DcpMetadata
from reshard_service.formats.strict_json import read_json_object
from reshard_service.identity import RECOGNISED_PRODUCERS, guessed_path, identify_key, identities, known_fqns
from reshard_service.storage.base import Storage

if TYPE_CHECKING:
    from reshard_service.formats.options import OpenOptions

_TORCHTITAN_KEYS = frozenset({"train_state", "lr_scheduler", "dataloader"})


def name_leaves(
    storage: Storage, metadata: DcpMetadata, options: OpenOptions
) -> tuple[tuple[Tensor, ...], tuple[ByteObject, ...], list[Notice]]:
    """Tensors and byte objects with key, path and identity.

    Raises :class:`AmbiguousSource` if keys have no paths and nothing says what they are, :class:`UnsupportedSource`
    naming the tensor of a dtype that can't be moved as bytes.
    """
    object_keys = frozenset(found.key for found in metadata.objects)
    keys = (*metadata.keys, *(found.key for found in metadata.objects))
    notices: list[Notice] = []
    if metadata.paths is not None:
        paths = {key: metadata.paths.get(key, (key,)) for key in keys}
        named = identities(paths, objects=object_keys)
        pathless = sum(key not in metadata.paths for key in keys)
        if pathless:
            notices.append(
                Notice("paths_missing", f"{pathless} keys have no path in planner_data and count as top-level keys")
            )
    else:
        paths = {key: (key,) for key in keys}
        named = _named_without_paths(storage, metadata, options, keys, object_keys)
    dtypes: dict[str, DType] = {}
    tensors = tuple(
        Tensor(key, named[key], _dtype(dtype, key, dtypes), shape, paths[key])
        for key, dtype, shape in zip(metadata.keys, metadata.dtypes, metadata.shapes, strict=True)
    )
    objects = tuple(
        ByteObject(
            found.key,
            named[found.key],
            paths[found.key],
            found.file,
            found.start,
            found.length,
            metadata.transform_lists[found.transforms],
        )
        for found in metadata.objects
    )
    return tensors, objects, notices


def _dtype(name: str, key: str, known: dict[str, DType]) -> DType:
    found = known.get(name)
    if found is None:
        try:
            found = known[name] = by_torch_name(name)
        except UnsupportedSource as error:
            error.tensor = key
            raise
    return found


def _named_without_paths(
    storage: Storage,
    metadata: DcpMetadata,
    options: OpenOptions,
    keys: tuple[str, ...],
    object_keys: frozenset[str],
) -> dict[str, Identity]:
    producer = options.producer or ("megatron" if is_megatron(storage) else None)
    guesses = (guessed_path(key, producer=producer, key_prefix=options.key_prefix) for key in keys)
    known = known_fqns(path for path in guesses if path is not None)
    named: dict[str, Identity] = {}
    for key in keys:
        identity = identify_key(
            key, known, producer=producer, key_prefix=options.key_prefix, is_object=key in object_keys
        )
        if identity is None:
            by = f" (its planner wrote a {metadata.planner})" if metadata.planner else ""
            raise AmbiguousSource(
                f"{storage.uri!r} does not say where its keys lie in the state dict{by}; is {key!r} a model parameter, "
                "and is part of that name a prefix?",
                tensor=key,
                hint="say --key-prefix P if the model's keys begin with 'P.', --key-prefix '' if they have no prefix, "
                f"or --producer {'|'.join(RECOGNISED_PRODUCERS)}",
            )
        named[key] = identity
    return named


def is_megatron(storage: Storage) -> bool:
    """True where ``metadata.json`` says that Megatron's ``torch_dist`` backend wrote the folder."""
    if storage.stat("metadata.json") is None:
        return False
    try:
        document, _ = read_json_object(storage, "metadata.json", what="metadata.json")
    except ReshardError:
        return False
    return document.get("sharded_backend") in ("torch_dist", "fsdp_dtensor")


def guess_producer(storage: Storage, metadata: DcpMetadata) -> str:
    """Who wrote it, as far as keys and names tell; a label for people."""
    if is_megatron(storage):
        return "megatron"
    folder = storage.uri.rstrip("/").rsplit("/", 1)[-1]
    if folder.startswith(("pytorch_model_fsdp_", "optimizer_")):
        return "accelerate"
    paths = metadata.paths or {}
    tops = {str(path[0]) for path in paths.values() if len(path) > 1}
    if {"args", "checkpoint_version"} <= tops | set(paths):
        return "megatron"
    if tops & _TORCHTITAN_KEYS and "model" not in tops:
        return "torchtitan"
    if tops == {"optimizer"} and all(len(path) == 2 for path in paths.values()):
        return "transformers"
    return "torch"
