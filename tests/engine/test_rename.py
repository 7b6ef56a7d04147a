"""Renames that replace nothing by accident, with and without the system call for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reshard_service.engine import rename as rename_module
from reshard_service.engine.rename import rename_no_replace, replace_by
from reshard_service.errors import TargetExists


@pytest.fixture(params=["renameat2", "unknown call", "refused flag"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "unknown call":
        monkeypatch.setattr(rename_module, "_libc", object())
    elif request.param == "refused flag":
        monkeypatch.setattr(rename_module, "_renameat2", lambda *_: False)


def make(path: Path, content: str, *, folder: bool) -> Path:
    if folder:
        path.mkdir()
        (path / "inside").write_text(content)
    else:
        path.write_text(content)
    return path


def content(path: Path) -> str:
    return (path / "inside" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("folder", [True, False])
def test_a_free_name_is_taken(folder: bool, tmp_path: Path) -> None:
    rename_no_replace(make(tmp_path / "new", "new", folder=folder), tmp_path / "name")
    assert content(tmp_path / "name") == "new"
    assert os.listdir(tmp_path) == ["name"]


@pytest.mark.parametrize("old_folder", [True, False])
@pytest.mark.parametrize("folder", [True, False])
def test_a_name_that_is_taken_stays_what_it_is(folder: bool, old_folder: bool, tmp_path: Path) -> None:
    make(tmp_path / "new", "new", folder=folder)
    make(tmp_path / "name", "old", folder=old_folder)
    with pytest.raises(TargetExists, match="appeared while the conversion ran"):
        rename_no_replace(tmp_path / "new", tmp_path / "name")
    assert content(tmp_path / "name") == "old"
    assert content(tmp_path / "new") == "new"


def test_a_dead_link_is_a_name_that_is_taken(tmp_path: Path) -> None:
    make(tmp_path / "new", "new", folder=True)
    (tmp_path / "name").symlink_to("nowhere")
    with pytest.raises(TargetExists):
        rename_no_replace(tmp_path / "new", tmp_path / "name")


@pytest.mark.parametrize("old_folder", [True, False])
@pytest.mark.parametrize("folder", [True, False])
def test_two_names_change_places(folder: bool, old_folder: bool, tmp_path: Path) -> None:
    make(tmp_path / "new", "new", folder=folder)
    make(tmp_path / "name", "old", folder=old_folder)
    replace_by(tmp_path / "new", tmp_path / "name")
    assert content(tmp_path / "name") == "new"
    assert content(tmp_path / "new") == "old"
    assert sorted(os.listdir(tmp_path)) == ["name", "new"]


@pytest.mark.parametrize("missing", ["new", "name"])
def test_what_can_not_change_places_stays(missing: str, tmp_path: Path) -> None:
    other = make(tmp_path / ("name" if missing == "new" else "new"), "here", folder=True)
    with pytest.raises(OSError, match="No such file"):
        replace_by(tmp_path / "new", tmp_path / "name")
    assert content(other) == "here"
    assert os.listdir(tmp_path) == [other.name]
