"""A small but real run from end to end: train on four ranks, save a sharded checkpoint, and put it into other shapes.

    make demo                      (or: python examples/demo.py --keep)

Four processes (gloo, CPU) train a small Llama under FSDP2 for two steps and save model and optimizer with torch's own
``torch.distributed.checkpoint``. Then the ``reshard`` command does the rest, as you would, and transformers and torch
load what came out. Everything lies in ``.demo/`` of the folder you stand in.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

LAYOUT = Path(os.path.relpath(Path(__file__).resolve().parent / "layouts" / "fsdp2-tp2-llama.yaml"))
DEMO = Path(".demo")
RANKS = 4


# --- the training run: what your trainer does ------------------------------------------------------------------


def build_model() -> Any:
    """A Llama of 10 million parameters, random; the vocabulary does not divide by the ranks, as in real life."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8191,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        )
    )


def train_and_save(rank: int, meeting: str) -> None:
    """One rank: FSDP2, two steps of AdamW, torch's sharded save; rank 0 also keeps the gathered model as the truth."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",))
    model = build_model()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        torch.manual_seed(100 * step + rank)
        tokens = torch.randint(0, 8191, (2, 32))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"  step {step + 1}: loss {loss.item():.4f}", flush=True)
    state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=DEMO / "step-2")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(whole, DEMO / "truth.pt")
        model.config.save_pretrained(DEMO / "config")
    dist.destroy_process_group()


def training_run() -> None:
    """Starts the ranks; they meet at a file, so that no port is needed."""
    import torch.multiprocessing as mp

    # gloo would look for the machine's name in the network; the ranks are all here.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train_and_save, args=(str(Path(folder, "meeting")),), nprocs=RANKS)


# --- the conversions: what you type ------------------------------------------------------------------------------


def reshard(*arguments: str | Path, expect: int = 0) -> None:
    """Run and show one ``reshard`` command; stop if it does not end as expected."""
    words = [str(argument) for argument in arguments]
    print(f"\n$ reshard {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "reshard_service.cli", *words], check=False)
    if done.returncode != expect:
        raise SystemExit(f"reshard {words[0]} ended with exit code {done.returncode}, not {expect}")


def conversions() -> None:
    source, gathered, resharded = DEMO / "step-2", DEMO / "gathered", DEMO / "fsdp2-tp2"
    say("What is in the checkpoint? Only metadata is read, and no pickle is executed.")
    reshard("inspect", source)
    say("What would resuming on 2 x 2 ranks (FSDP x TP) take? A dry run: nothing is written.")
    reshard("plan", source, resharded, "--to", "dcp", "--layout", LAYOUT)
    say("Do it: model and optimizer, each rank's shards in that rank's own file.")
    reshard("convert", source, resharded, "--to", "dcp", "--layout", LAYOUT)
    say("And a Hugging Face folder for evaluation: the model alone, in bf16.")
    reshard("convert", source, gathered, "--to", "safetensors", "--model", DEMO / "config", "--dtype", "bf16")
    say("The same tensors? Bit for bit, across layouts.")
    reshard("diff", source, resharded, "--part", "all")
    say("Is it all still what was written? Every byte is read again, against the manifest.")
    reshard("verify", resharded)
    reshard("verify", gathered)
    say("One flipped bit is found (exit code 1).")
    flip_a_bit(gathered / "model.safetensors")
    reshard("verify", gathered, expect=1)
    flip_a_bit(gathered / "model.safetensors")
    say("Asked for again, the same result is not made again.")
    reshard("convert", source, resharded, "--to", "dcp", "--layout", LAYOUT, "--overwrite", "same")


def flip_a_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


# --- the proof: code that is not ours loads what came out -----------------------------------------------------------


def proof() -> None:
    import torch
    import torch.distributed.checkpoint as dcp
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # meant so: one process
    truth = torch.load(DEMO / "truth.pt", weights_only=True)
    say("transformers loads the Hugging Face folder, and torch the new checkpoint:")
    loaded = AutoModelForCausalLM.from_pretrained(DEMO / "gathered", dtype="auto").state_dict()
    equal = [torch.equal(loaded[name], tensor.to(torch.bfloat16)) for name, tensor in truth.items()]
    print(f"  transformers: {sum(equal)} of {len(truth)} tensors bit-equal to what torch gathers, cast to bf16")
    state = {"model": {name: torch.empty_like(tensor) for name, tensor in truth.items()}}
    dcp.load(state, checkpoint_id=DEMO / "fsdp2-tp2", no_dist=True)
    same = [torch.equal(state["model"][name], tensor) for name, tensor in truth.items()]
    print(f"  torch.distributed.checkpoint: {sum(same)} of {len(truth)} tensors bit-equal")
    if not all(equal) or not all(same):
        raise SystemExit("the proof failed")


def say(text: str) -> None:
    print(f"\n# {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="use the checkpoint of an earlier run if it is there")
    options = parser.parse_args()
    if not (options.keep and (DEMO / "truth.pt").exists()):
        shutil.rmtree(DEMO, ignore_errors=True)
        DEMO.mkdir()
        say(f"Train a small Llama on {RANKS} ranks (FSDP2) and save it with torch.distributed.checkpoint")
        started = time.monotonic()
        training_run()
        print(f"  saved in {DEMO / 'step-2'} ({time.monotonic() - started:.0f} s)")
    else:
        for made in ("gathered", "fsdp2-tp2"):
            shutil.rmtree(DEMO / made, ignore_errors=True)
    conversions()
    proof()
    say(f"Done. Look around in {DEMO}/.")


if __name__ == "__main__":
    main()
