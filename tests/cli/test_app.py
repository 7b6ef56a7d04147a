"""The command as a process: signals, options that contradict each other, errors for programs."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import reshard_service
from reshard_service import conversion
from reshard_service.cli.app import main


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """``main`` takes signals over; give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    save_file({"w": torch.ones(4, 2)}, path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["reshard", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_exit_code_5_and_says_so(
    number: signal.Signals,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(conversion, "convert", lambda *_, **__: signal.raise_signal(number))
    assert run(monkeypatch, "convert", source, tmp_path / "out", "--to", "dcp", "--json") == 5
    printed = capsys.readouterr()
    assert json.loads(printed.out)["error"]["code"] == "cancelled"
    assert "nothing became visible" in printed.err


def test_an_option_beside_a_job_document_is_refused_rather_than_ignored(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tmp_path / "job.json"
    target = {"uri": str(tmp_path / "out"), "format": "dcp"}
    job.write_text(json.dumps({"source": {"uri": str(source)}, "targets": [target]}))
    assert run(monkeypatch, "convert", "--job", job, "--dtype", "bf16", "--include", "w") == 2
    assert "--include, --dtype" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(monkeypatch, "convert", "--job", job, "--json") == 0


@pytest.mark.parametrize("format", ["dcp", "dcp-safetensors", "rank-safetensors"])
def test_a_folder_format_is_not_written_to_a_name_of_one_file(
    format: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.safetensors"
    assert run(monkeypatch, "convert", source, target, "--to", format, "--layout", "fsdp=2") == 2
    assert "is a folder" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == [source.name]


def test_a_command_that_the_parser_refuses_has_a_document_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "inspect", "one", "two", "--json") == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"


def test_the_version_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == f"reshard {reshard_service.__version__}"


def test_a_working_folder_that_was_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert run(monkeypatch, "inspect", "x") == 4
    assert "working folder" in capsys.readouterr().err


def test_names_from_a_file_do_not_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt"
    torch.save({"\x1b[31mred\x1b]0;title\x07": torch.ones(2)}, path)
    assert run(monkeypatch, "inspect", path) == 0
    printed = capsys.readouterr().out
    assert "\\x1b[31mred" in printed
    assert not set(printed) & {"\x1b", "\x07"}


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_link_that_leads_nowhere_is_noticed_before_anything_is_copied(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).symlink_to("nowhere")
    assert run(monkeypatch, "convert", source, tmp_path / name, "--to", "safetensors") == 4
    assert "lies at" in capsys.readouterr().err
