"""Real gloo ranks holding real DTensors; run as a program that answers with every rank's local values.

Reads a list of cases ``{world, axes, shape, kind, ...}`` as JSON on stdin. ``kind`` ``distribute``: ``placements`` on
all axes at once, by ``distribute_tensor``. ``kind`` ``fsdp``: ``inner`` places the tensor on the last axis
(tensor or expert parallelism), then ``fully_shard`` shards the rest over the axes before it on dim ``dim``.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any


def hold(cases: list[dict[str, Any]]) -> list[Any]:
    """This rank's ``[local shape, local values, full_tensor is right]`` for each case; a string where torch refuses."""
    import torch

    answers: list[Any] = []
    for case in cases:
        whole = torch.arange(torch.Size(case["shape"]).numel(), dtype=torch.float32).reshape(case["shape"])
        try:
            held = _distributed(whole, case) if case["kind"] == "distribute" else _fully_sharded(whole, case)
        except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
            answers.append(f"{type(error).__name__}: {error}")
            continue
        local = held.to_local()
        full = bool(torch.equal(held.full_tensor(), whole)) if case.get("gather") else None
        answers.append([list(local.shape), [int(value) for value in local.reshape(-1).tolist()], full])
    return answers


def placement(text: str) -> Any:
    """torch's placement for our spelling."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    numbers = [int(number) for number in re.findall(r"-?\d+", text)]
    if text.startswith("strided"):
        return _StridedShard(numbers[0], split_factor=numbers[1])
    return Shard(numbers[0]) if numbers else Replicate()


def _mesh(case: dict[str, Any]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    key = json.dumps(case["axes"])
    if key not in _meshes:
        names, sizes = zip(*case["axes"], strict=True)
        _meshes[key] = init_device_mesh("cpu", tuple(sizes), mesh_dim_names=tuple(names))
    return _meshes[key]


_meshes: dict[str, Any] = {}


def _distributed(whole: Any, case: dict[str, Any]) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, _mesh(case), [placement(text) for text in case["placements"]], src_data_rank=None)


def _fully_sharded(whole: Any, case: dict[str, Any]) -> Any:
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = _mesh(case)
    names = [name for name, _ in case["axes"]]
    outer = tuple(names[:-1]) if "inner" in case else tuple(names)
    if "inner" in case:
        whole = distribute_tensor(whole, mesh[names[-1]], [placement(case["inner"])], src_data_rank=None)
    module = nn.Module()
    module.weight = nn.Parameter(whole)
    dim = case.get("dim", 0)
    fully_shard(module, mesh=mesh[outer], shard_placement_fn=lambda parameter: Shard(dim) if dim else None)
    return module.weight.detach()


def main() -> None:
    """One forked gang for each world size."""
    import torch
    import torch.distributed.fsdp
    import torch.distributed.tensor

    from tests.oracles.gang import _run_task

    torch.set_num_threads(1)
    cases = json.load(sys.stdin)
    answers: dict[int, list[Any]] = {}
    for world in sorted({case["world"] for case in cases}):
        mine = [at for at, case in enumerate(cases) if case["world"] == world]
        ranks = _run_task(world, hold, {"cases": [cases[at] for at in mine]}).result()
        answers |= {at: [rank[place] for rank in ranks] for place, at in enumerate(mine)}
    json.dump([answers[at] for at in range(len(cases))], sys.stdout)


if __name__ == "__main__":
    main()
