"""docs/errors.md has every error of the tree, under its exit code, with a fix, and nothing else."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import reshard_service
from reshard_service.errors import ReshardError, all_errors

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")


def sections() -> dict[str, tuple[int, str]]:
    """Code to the exit code it is listed under and its text."""
    found: dict[str, tuple[int, str]] = {}
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        exit_code = re.match(r"Exit code (\d)", part)
        assert exit_code, f"a section that is no exit code: {part.splitlines()[0]!r}"
        for entry in re.split(r"^### ", part, flags=re.MULTILINE)[1:]:
            head, _, text = entry.partition("\n")
            code = head.strip("` ")
            assert code not in found, f"{code} is described twice"
            found[code] = (int(exit_code[1]), text)
    return found


def errors() -> list[type[ReshardError]]:
    for module in pkgutil.walk_packages(reshard_service.__path__, "reshard_service."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)  # an error class anywhere counts
    return all_errors()


@pytest.mark.parametrize("error", errors(), ids=lambda error: error.__name__)
def test_every_error_is_documented_under_its_exit_code_with_a_fix(error: type[ReshardError]) -> None:
    documented = sections()
    assert error.code in documented
    exit_code, text = documented[error.code]
    assert exit_code == error.exit_code
    assert "**Fix:**" in text
    assert ("Worth retrying." in text) == error.retryable


def test_nothing_is_documented_that_does_not_exist() -> None:
    assert set(sections()) == {error.code for error in errors()}


def test_every_code_belongs_to_one_error() -> None:
    codes = [error.code for error in errors()]
    assert sorted(codes) == sorted(set(codes))
