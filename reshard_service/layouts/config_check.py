"""Is this layout valid for this model? Answered from the dims in a ``config.json``, nothing of the model loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from reshard_service.layouts.layout import Layout
from reshard_service.layouts.problems import LayoutProblem, Severity, nearest_sizes

_NESTED = ("text_config", "language_config", "llm_config", "thinker_config")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_INTERMEDIATE = ("intermediate_size", "ffn_dim", "n_inner")
_MOE_INTERMEDIATE = ("moe_intermediate_size",)
_VOCABULARY = ("vocab_size",)
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


@dataclass(frozen=True, slots=True)
class _Dim:
    """One dim of the config and the JSON pointer to it."""

    key: str
    size: int
    at: str


class _Dims:
    """The dims of a config, those of the language model first, and which of them were looked at."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self._parts = list(_nested(config, "", depth=2))
        self.seen: list[_Dim] = []

    def find(self, keys: tuple[str, ...]) -> Iterator[_Dim]:
        """The dim under the first of ``keys`` that is there; several where the config lists one for each tower."""
        for pointer, part in self._parts:
            for key in keys:
                given = part.get(key)
                values = given if isinstance(given, list) else [given]
                found = [
                    _Dim(key, value, f"{pointer}/{key}" + (f"/{at}" if isinstance(given, list) else ""))
                    for at, value in enumerate(values)
                    if isinstance(value, int) and not isinstance(value, bool) and value > 0
                ]
                if found:
                    self.seen += [dim for dim in found if dim not in self.seen]
                    yield from found
                    return


def _nested(config: Mapping[str, object], pointer: str, depth: int) -> Iterator[tuple[str, Mapping[str, object]]]:
    for key in _NESTED:
        inner = config.get(key)
        if isinstance(inner, dict) and depth:
            yield from _nested(inner, f"{pointer}/{key}", depth - 1)
    yield pointer, config


def check_config(layout: Layout, config: Mapping[str, object]) -> list[LayoutProblem]:
    """What is wrong or surprising about a layout for a model with this config.

    Rules are not looked at: this tells whether the usual tensor, expert and pipeline parallel plans can work. The last
    finding is a notice that lists the dims that were checked, and says that nothing else was.
    """
    dims = _Dims(config)
    expert = layout.expert_mesh
    tp, pp = layout.mesh.size("tp"), layout.mesh.size("pp")
    ep = expert.size("ep") if expert is not None else 1
    found = [*_heads(dims, tp), *_experts(dims, ep, ep * (expert.size("efsdp") if expert is not None else 1))]
    found += _widths(dims, tp, _INTERMEDIATE, Severity.ERROR)
    if ep == 1:
        # With expert parallelism experts lie on the other mesh, which has no tp.
        found += _widths(dims, tp, _MOE_INTERMEDIATE, Severity.ERROR)
    found += [*_widths(dims, tp, _HIDDEN, Severity.NOTICE), *_widths(dims, tp, _VOCABULARY, Severity.NOTICE)]
    found += _layers(dims, pp)
    looked_at = ", ".join(f"{dim.key}={dim.size}" for dim in dims.seen) or "none of the dims it knows"
    found.append(
        LayoutProblem(
            "checked_dims",
            "config.json",
            f"checked only {looked_at} against tp={tp}, ep={ep}, pp={pp}; not the shapes of tensors, nor the rules",
            Severity.NOTICE,
        )
    )
    return found


def _divides(dim: _Dim, axis: str, size: int, code: str, severity: Severity, why: str) -> Iterator[LayoutProblem]:
    if dim.size % size:
        fits = nearest_sizes(size, lambda candidate: dim.size % candidate == 0)
        reason = f"{dim.key} ({dim.size}) is not divisible by {axis}={size}{why}"
        yield LayoutProblem(code, dim.key, reason, severity, dim.at, f"nearest valid {axis}: {fits}")


def _heads(dims: _Dims, tp: int) -> Iterator[LayoutProblem]:
    why = ": a head would be torn between ranks"
    for dim in dims.find(_HEADS):
        yield from _divides(dim, "tp", tp, "heads_not_divisible", Severity.ERROR, why)
    for dim in dims.find(_KV_HEADS):
        if dim.size < tp and tp % dim.size == 0:
            fits = nearest_sizes(tp, lambda candidate: dim.size % candidate == 0)  # noqa: B023 - used at once
            reason = (
                f"tp={tp} is more than {dim.key} ({dim.size}): each key-value head would have to lie on "
                f"{tp // dim.size} ranks, and splitting rows does not copy heads"
            )
            fix = f"nearest valid tp: {fits}; or replicate k_proj and v_proj over tp, if the framework does"
            yield LayoutProblem("kv_heads_need_replication", dim.key, reason, Severity.ERROR, dim.at, fix)
        else:
            yield from _divides(dim, "tp", tp, "kv_heads_not_divisible", Severity.ERROR, why)


def _experts(dims: _Dims, ep: int, over: int) -> Iterator[LayoutProblem]:
    experts = list(dims.find(_EXPERTS))
    for dim in experts:
        if dim.size % ep:
            fits = nearest_sizes(ep, lambda candidate: dim.size % candidate == 0 and over % candidate == 0)  # noqa: B023
            reason = f"{dim.key} ({dim.size}) is not divisible by ep={ep}"
            fix = f"nearest valid ep over the same ranks: {fits}"
            yield LayoutProblem("experts_not_divisible", dim.key, reason, Severity.ERROR, dim.at, fix)
    if ep > 1 and not experts:
        reason = f"the layout has ep={ep}, but the config names no experts ({', '.join(_EXPERTS)})"
        yield LayoutProblem("no_experts", "config.json", reason, Severity.WARNING)


def _widths(dims: _Dims, tp: int, keys: tuple[str, ...], severity: Severity) -> Iterator[LayoutProblem]:
    why = "" if severity is Severity.ERROR else "; plain shards may be uneven, so this is allowed"
    for dim in dims.find(keys):
        code = f"{keys[0].removesuffix('_size')}_not_divisible" if severity is Severity.ERROR else f"{keys[0]}_uneven"
        yield from _divides(dim, "tp", tp, code, severity, why)


def _layers(dims: _Dims, pp: int) -> Iterator[LayoutProblem]:
    for dim in dims.find(_LAYERS):
        if dim.size < pp:
            reason = f"pp={pp} is more than {dim.key} ({dim.size}): some stages would have no layer"
            fix = f"at most pp={dim.size}"
            yield LayoutProblem("layers_fewer_than_stages", dim.key, reason, Severity.ERROR, dim.at, fix)
        else:
            why = "; stages would be of different length"
            yield from _divides(dim, "pp", pp, "layers_uneven", Severity.NOTICE, why)
