"""Tied weights: one tensor under two names (decision 9)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from reshard_service.catalogue import Catalogue, Notice, Section
from reshard_service.errors import TiedWeightsDiffer
from reshard_service.identity import strip_wrappers
from reshard_service.planning.selection import Selected
from reshard_service.verify.compare import compare_tensors

_OUTPUT = ("lm_head.weight", "embed_out.weight", "output_layer.weight")
_INPUT = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def drop_tied_output(source: Catalogue, selected: Selected, config: bytes | None) -> Selected:
    """``selected`` without the output embedding, if the config says it is tied and its bytes are the input's.

    transformers writes the input embedding only and ties the other after loading. Raises :class:`TiedWeightsDiffer` if
    the config says tied and the two differ: one of them is wrong, and nobody but the user knows which.
    """
    if config is None or not _says_tied(config):
        return selected
    pair = _embeddings(selected)
    if pair is None:
        return selected
    output, given = pair
    tensors, sources = selected.selection.tensors, selected.selection.sources
    difference = compare_tensors(source, int(sources[given]), source, int(sources[output]))
    if difference is not None:
        raise TiedWeightsDiffer(
            f"config.json says tie_word_embeddings, but {tensors[output].key!r} and {tensors[given].key!r} differ: "
            f"{difference.reason}",
            tensor=tensors[output].key,
            hint="set tie_word_embeddings to false to keep both, or --exclude the one that is wrong",
        )
    keep = [i for i in range(len(tensors)) if i != output]
    selection = replace(selected.selection, tensors=tuple(tensors[i] for i in keep), sources=sources[np.array(keep)])
    notice = Notice("tied", f"the same bytes as {tensors[given].key!r}, written once", tensors[output].key)
    return replace(
        selected,
        selection=selection,
        casts=tuple(cast for cast in selected.casts if cast[0] != tensors[output].key),
        notices=(*selected.notices, notice),
    )


def _says_tied(config: bytes) -> bool:
    try:
        document = json.loads(config)
    except ValueError:
        return False
    if not isinstance(document, dict):
        return False
    text = document.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return bool(document.get("tie_word_embeddings", inner))


def _embeddings(selected: Selected) -> tuple[int, int] | None:
    """Positions of the output and the input embedding in the selection, if both are there and could be one."""
    outputs: list[int] = []
    inputs: list[int] = []
    for position, tensor in enumerate(selected.selection.tensors):
        if tensor.identity.section is Section.MODEL:
            name = strip_wrappers(tensor.identity.fqn)
            if name.endswith(_OUTPUT):
                outputs.append(position)
            elif name.endswith(_INPUT):
                inputs.append(position)
    if len(outputs) != 1 or len(inputs) != 1:
        return None
    output, given = (selected.selection.tensors[i] for i in (outputs[0], inputs[0]))
    return (outputs[0], inputs[0]) if output.shape == given.shape else None
