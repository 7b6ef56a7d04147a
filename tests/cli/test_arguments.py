"""Whatever the arguments: an exit code that means something, no traceback, and with --json one document on stdout."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.main import get_command

from reshard_service.cli.app import app, main
from tests.engine.checkpoints import save_dcp, save_safetensors

EXIT_CODES = {0, 1, 2, 3, 4, 5}

OPTIONS = {
    "inspect": "--chunks --from --json --key-prefix --producer --repair --source-layout --step --strict --world",
    "convert": (
        "--digest --dtype --exclude --from --include --job --json --key-prefix --layout --max-shard-size --model "
        "--names --optimizer-dtype --overwrite --part --producer --repair --source-layout --state --step --strict "
        "--threads --to --verify --wait-complete --workers --world"
    ),
    "diff": "--exclude --include --json --key-prefix --part --producer --source-layout --step",
    "verify": "--json",
    "doctor": "--json",
    "layout check": "--json --model",
}
OPTIONS["plan"] = OPTIONS["convert"]
"""Every option of every command. A new one is a promise: write it down here, in the docs and in the changelog."""


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """``main`` takes signals over; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with something of everything in it."""
    folder = tmp_path_factory.mktemp("arguments")
    save_safetensors({"w": torch.ones(4, 2), "v": torch.zeros(3)}, folder / "weights")
    save_dcp({"model": {"w": torch.ones(4, 2)}, "epoch": 3}, folder / "training")  # type: ignore[dict-item]
    (folder / "config.json").write_text('{"hidden_size": 8, "num_attention_heads": 2}')
    (folder / "layout.yaml").write_text("version: 1\nmesh: {axes: [[fsdp, 2]]}\n")
    (folder / "job.yaml").write_text("source: {uri: weights}\ntargets: [{uri: by-job, format: dcp}]\n")
    (folder / "broken.json").write_text("{")
    (folder / "empty").mkdir()
    return folder


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one call of the command line in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["reshard", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as left:
                code = left.code
    finally:
        sys.argv = before
    assert isinstance(code, int), code
    return code, out.getvalue(), err.getvalue()


def test_the_commands_have_these_options_and_no_others() -> None:
    found = {}
    top = get_command(app)
    groups = [("", top)]
    while groups:
        prefix, group = groups.pop()
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            if hasattr(command, "commands"):
                groups.append((f"{prefix}{name} ", command))
            else:
                found[f"{prefix}{name}"] = sorted(
                    option for parameter in command.params for option in parameter.opts if option.startswith("-")
                )
    assert found == {name: sorted(set(options.split())) for name, options in OPTIONS.items()}


_WORDS = [
    *("inspect", "plan", "convert", "diff", "verify", "doctor", "layout", "check", "serve", ""),
    *{option for options in OPTIONS.values() for option in options.split()},
    *("weights", "training", "weights/model.safetensors", "config.json", "layout.yaml", "job.yaml", "broken.json"),
    *("empty", "absent", "out", "out.safetensors", "nested/out", ".", "..", "/", "/dev/null", "/proc/self/mem", "~"),
    *("safetensors", "dcp", "dcp-safetensors", "rank-safetensors", "torch", "all", "model", "optimizer", "keep"),
    *("bf16", "never", "same", "always", "full", "none", "hub", "latest", "refuse", "drop", "sha256", "plain"),
    *("fsdp=2", "tp=2", "fsdp=0", "fsdp=-1", "a=b", "fsdp=2,fsdp=3", "=,=", "{", "**", "w", "[", "{a,b", "*.*"),
    *(
        "0",
        "1",
        "-1",
        "2",
        "1e9",
        "99999999999999999999",
        "5GB",
        "0GB",
        "-5GB",
        "1B",
        "\x00",
        "\x1b[31m",
        "ü☃",
        "\udcff",
    ),
    *(
        "memory://fuzz/x",
        "memory://",
        "s3://",
        "file:///absent",
        "nope://x",
        "http://",
        "a::b://c",
        "--",
        "-",
        "-x",
        "--no",
    ),
]


_COMMANDS = [
    [],
    ["inspect"],
    ["verify"],
    ["diff", "weights"],
    ["layout", "check"],
    ["plan", "weights", "out"],
    ["plan", "training", "out", "--to", "dcp"],
    ["convert", "training", "out.safetensors"],
    ["convert", "weights", "out", "--to", "dcp"],
]
_arguments = st.lists(st.one_of(st.sampled_from(_WORDS), st.text(max_size=6)), max_size=6)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.builds(lambda first, rest: first + rest, st.sampled_from(_COMMANDS), _arguments), wants_json=st.booleans()
)
@example(words=["convert", "weights", "\udcff", "--to", "dcp"], wants_json=True)
@example(words=["verify", "\udcff"], wants_json=True)
@example(words=["inspect", "\udcff"], wants_json=False)
@example(words=["layout", "check", "\udcff", "--model", "\udcff"], wants_json=True)
@example(words=["layout", "check", "layout.yaml", "--model", "broken.json"], wants_json=True)
@example(words=["convert", "--job", "broken.json"], wants_json=True)
@example(words=["convert", "--job", "empty"], wants_json=True)
@example(words=["convert", "weights", "/dev/null/x", "--to", "dcp"], wants_json=True)
@example(words=["convert", "weights", "out\x00", "--to", "dcp"], wants_json=True)
@example(words=["convert", "weights", "x" * 300, "--to", "dcp"], wants_json=True)
@example(words=["convert", "weights", "x" * 245, "--to", "dcp"], wants_json=True)
@example(words=["convert", "weights", "y/" * 2500, "--to", "dcp"], wants_json=True)
@example(words=["inspect", "x" * 300], wants_json=True)
@example(words=["inspect", "y/" * 2500], wants_json=True)
@example(words=["verify", "x" * 300], wants_json=True)
@example(words=["convert", "weights", "out", "--to", "dcp", "--layout", "fsdp=999999999999"], wants_json=True)
@example(words=["convert", "weights", "out", "--to", "safetensors", "--max-shard-size", "1B"], wants_json=True)
@example(words=["diff", "weights", "training", "--part", "optimizer"], wants_json=True)
def test_any_arguments_end_with_a_meaning(words: Sequence[str], wants_json: bool, folder: Path) -> None:
    if "--wait-complete" in words:
        return  # waits, as it says
    arguments = [*words, "--json"] if wants_json else list(words)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(folder, Path(place, "work"))
        os.chdir(Path(place, "work"))
        try:
            code, out, err = run(*arguments)
        finally:
            os.chdir(before)
    assert code in EXIT_CODES, (arguments, err)
    assert "Traceback" not in out + err
    assert "a fault of the tool" not in err, (arguments, err)
    asks_for_help = (
        not words or {"--help", "--version", "--"} & set(words) or words in (["layout"], ["layout", "check"])
    )
    if "--json" in arguments and not asks_for_help and not out.startswith("Usage"):
        document = json.loads(out)
        assert isinstance(document, dict)
        assert ("error" in document) == (code > 1), (arguments, out)
    if code > 1:
        assert err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("inspect", "weights"), 0),
        (("plan", "weights", "out", "--to", "dcp"), 0),
        (("diff", "weights", "weights"), 0),
        (("diff", "weights", "training"), 1),
        (("verify", "weights"), 3),
        (("layout", "check", "tp=3", "--model", "config.json"), 1),
        (("layout", "check", "fsdp=2", "--model", "config.json"), 0),
        (("convert", "weights", "weights/x", "--to", "dcp"), 2),
        (("convert", "weights", "out"), 2),
        (("convert", "weights"), 2),
        (("convert", "absent", "out", "--to", "dcp"), 3),
        (("convert", "empty", "out", "--to", "dcp"), 3),
        (("convert", "weights", "out", "--to", "dcp", "--include", "nothing"), 3),
        (("convert", "weights", "config.json/out", "--to", "dcp"), 4),
        (("convert", "weights", "empty", "--to", "dcp", "--workers", "0"), 2),
        (("nonsense",), 2),
        (("inspect",), 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
@pytest.mark.parametrize("wants_json", [True, False], ids=["json", "text"])
def test_exit_codes_say_what_kind_of_end_it_was(
    arguments: tuple[str, ...], code: int, wants_json: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    ended, out, err = run(*arguments, *(["--json"] if wants_json else []))
    assert ended == code, err
    if wants_json:
        document = json.loads(out)
        if code > 1:
            error = document["error"]
            assert error["exit_code"] == code
            assert error["code"] in err or code == 2
            assert error["reason"]
    assert not (folder / "out").exists()


def test_several_targets_are_reported_each_for_itself(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("precious")
    targets = [
        {"uri": "one", "format": "dcp"},
        {"uri": "there", "format": "dcp"},
        {"uri": "two", "format": "safetensors", "include": ["nothing"]},
        {"uri": "three.safetensors", "format": "safetensors"},
    ]
    job = {"source": {"uri": str(folder / "weights")}, "targets": targets}
    (tmp_path / "job.json").write_text(json.dumps(job))
    code, out, _ = run("convert", "--job", "job.json", "--json")
    assert code == 4
    document = json.loads(out)
    assert [target["uri"] for target in document["targets"]] == ["one", "three.safetensors"]
    assert [(error["uri"], error["code"]) for error in document["errors"]] == [
        ("there", "target_exists"),
        ("two", "selection_empty"),
    ]
    code, out, _ = run("convert", "--job", "job.json")
    assert code == 4
    assert out.count("target_exists") == 3
