"""What a stored key *is*: section, parameter name and optimizer slot (decision 1).

Parameter names contain dots, so a key is never split at a dot by guessing. DCP's ``planner_data`` gives the path in the
nested state dict, which is proof; a flattened optimizer key (``state.<fqn>.<slot>``) is split where a known parameter
name ends. The encodings are those of torch 2.13, ``distributed/checkpoint/state_dict.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Set

from reshard_service.catalogue import Identity, Path, Section

_MODEL_KEYS = frozenset({"model", "state_dict"})
_OPTIMIZER_KEYS = frozenset({"optim", "optimizer"})
_OPTIMIZER_PARTS = frozenset({"state", "param_groups"})
_MODEL_CHUNK = re.compile(r"model\d+\Z")
"""Megatron's virtual pipeline chunks."""

# Leaves that frameworks put at the top level beside a model whose tensors have no prefix.
_TOP_LEVEL_EXTRA = frozenset(
    {
        "args", "checkpoint_version", "epoch", "global_step", "iteration", "num_floating_point_operations_so_far",
        "rng_state", "step", "train_step",
    }
)  # fmt: skip

# Slots of the optimizers in torch 2.13 and of the widespread ones outside it. Used only to learn parameter names from a
# flattened optimizer that lies there without its model; a slot that is not listed is then split at a name so learnt.
_SLOTS = frozenset(
    {
        "acc_delta", "ax", "col_var", "eta", "exp_avg", "exp_avg_diff", "exp_avg_slow", "exp_avg_sq", "exp_avg_sq_col",
        "exp_avg_sq_row", "exp_inf", "master_param", "max_exp_avg_sq", "momentum_buffer", "mu", "mu_product",
        "prev", "row_var", "square_avg", "step", "step_size", "sum", "fp32_param", "grad_avg",
    }
)  # fmt: skip

_EXTRA_KEYS = frozenset({"dataloader", "lr_scheduler", "scheduler", "train_state"})

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def strip_wrappers(fqn: str) -> str:
    """``fqn`` without the segments that torch.compile, FSDP1, activation checkpointing and DDP put in (decision 2)."""
    if not fqn.startswith("module.") and not any(wrapper in fqn for wrapper in _WRAPPERS):
        return fqn
    parts = [part for part in fqn.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts.pop(0)
    return ".".join(parts)


def identify(
    path: Path, known_fqns: Set[str] = frozenset(), *, is_object: bool = False, flat: bool = False
) -> Identity:
    """The identity of the leaf at ``path`` of a nested state dict.

    ``known_fqns`` (see :func:`known_fqns`) is needed only to split flattened optimizer keys; one that no known name
    begins keeps its whole key as ``fqn`` and has no slot. ``is_object`` tells a byte object from a tensor: at the top
    level tensors are the model's, byte objects (step counters and the like) are not. ``flat`` says that nothing in the
    checkpoint is nested: then a tensor called ``step`` is the model's too.
    """
    if len(path) > 2 and path[0] == "app":
        path = path[1:]
    first = str(path[0])
    if len(path) == 1:
        if first.startswith(("state.", "param_groups.")):
            return _flattened(first, known_fqns)
        if (first in _TOP_LEVEL_EXTRA and not flat) or (is_object and not first.endswith("_extra_state")):
            return Identity(Section.EXTRA, first)
        return Identity(Section.MODEL, first)
    rest = path[1:]
    if first in _MODEL_KEYS:
        return Identity(Section.MODEL, _joined(rest))
    if _MODEL_CHUNK.match(first):
        return Identity(Section.MODEL, _joined(path))
    if first in _OPTIMIZER_KEYS:
        return _optimizer(rest, known_fqns)
    if first in _OPTIMIZER_PARTS:
        return _optimizer(path, known_fqns)
    return Identity(Section.EXTRA, _joined(path))


def _joined(path: Path) -> str:
    return ".".join(map(str, path))


def _optimizer(path: Path, known_fqns: Set[str]) -> Identity:
    if path[0] == "state" and len(path) >= 3:
        return Identity(Section.OPTIMIZER, str(path[1]), _joined(path[2:]))
    if len(path) == 1:
        return _flattened(str(path[0]), known_fqns)
    return Identity(Section.OPTIMIZER, _joined(path))


def _flattened(key: str, known_fqns: Set[str]) -> Identity:
    if key.startswith("state."):
        found = split_at_known(key.removeprefix("state."), known_fqns)
        if found is not None:
            return Identity(Section.OPTIMIZER, *found)
    return Identity(Section.OPTIMIZER, key)


def split_at_known(text: str, known_fqns: Set[str]) -> tuple[str, str] | None:
    """``<fqn>.<slot>`` split behind the longest known name that it begins with; None if there is none."""
    end = text.rfind(".")
    while end > 0:
        if text[:end] in known_fqns:
            return text[:end], text[end + 1 :]
        end = text.rfind(".", 0, end)
    return None


def known_fqns(paths: Iterable[Path]) -> frozenset[str]:
    """Every parameter name that the paths of a checkpoint prove.

    From the model's leaves, nested optimizer states, and flattened optimizers, where each parameter has
    ``param_groups.<fqn>.lr``; failing all that, flattened states that end in a slot of a known optimizer.
    """
    found: set[str] = set()
    flattened: list[str] = []
    for path in paths:
        if len(path) > 2 and path[0] == "app":
            path = path[1:]
        if path[0] in _OPTIMIZER_KEYS and len(path) > 1:
            path = path[1:]
        elif path[0] in _MODEL_KEYS and len(path) > 1:
            found.add(_joined(path[1:]))
            continue
        first = str(path[0])
        if first == "state" and len(path) >= 3:
            found.add(str(path[1]))
        elif len(path) == 1 and first.startswith("param_groups.") and first.endswith(".lr"):
            found.add(first.removeprefix("param_groups.").removesuffix(".lr"))
        elif len(path) == 1 and first.startswith("state."):
            flattened.append(first.removeprefix("state."))
        elif len(path) == 1 and not first.startswith("param_groups."):
            found.add(first)
    for text in flattened:
        if split_at_known(text, found) is None:
            fqn, _, slot = text.rpartition(".")
            if slot in _SLOTS and fqn:
                found.add(fqn)
    return frozenset(found)


_PREFIXED_PRODUCERS = frozenset({"torch", "accelerate", "transformers"})
_BARE_PRODUCERS = frozenset({"torchtitan", "safetensors"})
RECOGNISED_PRODUCERS = tuple(sorted({"megatron", *_PREFIXED_PRODUCERS, *_BARE_PRODUCERS}))
"""What ``--producer`` may say where keys have no paths."""


def identify_key(
    key: str,
    known_fqns: Set[str] = frozenset(),
    *,
    producer: str | None = None,
    key_prefix: str | None = None,
    is_object: bool = False,
) -> Identity | None:
    """The identity of a key that has no path: from the producer's known habits, or from ``--key-prefix``.

    None where neither says: the caller asks the user. With ``key_prefix`` the model lies under ``<prefix>.`` (or at the
    top level if it is empty); keys outside it are judged by their first segment, as a path's would be.
    """
    if producer == "megatron" and key_prefix is None:
        return _identify_megatron(key, is_object)
    path = guessed_path(key, producer=producer, key_prefix=key_prefix)
    if path is None:
        return None
    return identify(path, known_fqns, is_object=is_object or (len(path) == 1 and bool(key_prefix)))


def guessed_path(key: str, *, producer: str | None = None, key_prefix: str | None = None) -> Path | None:
    """The path that ``--key-prefix`` or a producer's habits imply, flattened parts left whole; None if nothing says."""
    if key_prefix is not None:
        prefix = key_prefix.rstrip(".") + "."
        if key_prefix and key.startswith(prefix):
            return ("model", key.removeprefix(prefix))
        nested = _OPTIMIZER_KEYS
    elif producer in _PREFIXED_PRODUCERS:
        nested = _OPTIMIZER_KEYS | _MODEL_KEYS
    elif producer in _BARE_PRODUCERS:
        nested = _OPTIMIZER_KEYS
    else:
        return None
    first, dot, rest = key.partition(".")
    return (first, rest) if dot and (first in nested or first in _EXTRA_KEYS) else (key,)


_MEGATRON_STATE = re.compile(r"optimizer\.state\.(?P<slot>fp32_param|exp_avg|exp_avg_sq)\.(?P<fqn>.+)\Z")


def _identify_megatron(key: str, is_object: bool) -> Identity:
    """``torch_dist`` puts the slot before the parameter (core/dist_checkpointing, ``fully_reshardable``)."""
    found = _MEGATRON_STATE.match(key)
    if found:
        return Identity(Section.OPTIMIZER, found["fqn"], found["slot"])
    if key.startswith("optimizer."):
        return Identity(Section.OPTIMIZER, key.removeprefix("optimizer."))
    if is_object and "_extra_state" not in key:
        return Identity(Section.EXTRA, key)
    return Identity(Section.MODEL, key)


def identities(paths: Mapping[str, Path], *, objects: Set[str] = frozenset()) -> dict[str, Identity]:
    """The identity of every key, given all paths of a checkpoint; ``objects`` are the keys of byte objects."""
    known = known_fqns(path for key, path in paths.items() if key not in objects or _names_parameters(path))
    flat = all(len(path) == 1 for path in paths.values())
    return {key: identify(path, known, is_object=key in objects, flat=flat) for key, path in paths.items()}


def _names_parameters(path: Path) -> bool:
    return any("param_groups" in str(part) for part in path[:3])
