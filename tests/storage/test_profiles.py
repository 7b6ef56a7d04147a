"""Profile files: which options a driver gets, and that secrets stay out of sight."""

from __future__ import annotations

from pathlib import Path

import pytest

from reshard_service.errors import DocumentInvalid, EnvironmentUnfit, UsageError
from reshard_service.storage.profiles import StorageProfile, load_profiles, profile_for, profiles_path

FILE = """
[profiles.lab]
prefixes = ["s3://lab", "s3://scratch/mine/"]
[profiles.lab.options]
endpoint_url = "https://s3.lab.example"
key = { env = "LAB_KEY" }
secret = { file = "SECRET_FILE" }
client_kwargs = { region_name = "eu", verify = { env = "LAB_VERIFY" } }

[profiles.narrow]
prefixes = ["s3://lab/inner"]
"""


@pytest.fixture
def profile_file(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("hidden-value\n")
    path = tmp_path / "profiles.toml"
    path.write_text(FILE.replace("SECRET_FILE", str(tmp_path / "secret")))
    return path


def test_options_are_resolved_from_the_environment_and_from_files(
    profile_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_KEY", "key-value")
    monkeypatch.setenv("LAB_VERIFY", "ca.pem")
    lab = load_profiles(profile_file)[0]
    assert lab.resolved_options() == {
        "endpoint_url": "https://s3.lab.example",
        "key": "key-value",
        "secret": "hidden-value",
        "client_kwargs": {"region_name": "eu", "verify": "ca.pem"},
    }


def test_the_longest_prefix_wins_and_ends_at_a_slash(profile_file: Path) -> None:
    profiles = load_profiles(profile_file)

    def chosen(uri: str) -> str | None:
        found = profile_for(uri, profiles)
        return found.name if found else None

    assert chosen("s3://lab") == "lab"
    assert chosen("s3://lab/x") == "lab"
    assert chosen("s3://lab/inner/x") == "narrow"
    assert chosen("s3://lab/innermost") == "lab"
    assert chosen("s3://laboratory/x") is None
    assert chosen("s3://scratch/mine/x") == "lab"
    assert chosen("s3://scratch/yours") is None


def test_a_prefix_may_be_a_whole_scheme() -> None:
    assert StorageProfile("all", ("s3://",), {}).covers("s3://any/thing")


def test_a_secret_that_is_not_there_is_named_by_its_place(profile_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAB_KEY", raising=False)
    with pytest.raises(EnvironmentUnfit, match="LAB_KEY"):
        load_profiles(profile_file)[0].resolved_options()


def test_a_profile_does_not_show_its_options() -> None:
    assert "topsecret" not in repr(StorageProfile("a", ("s3://a",), {"secret": "topsecret"}))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[profiles.a", "not valid TOML"),
        ("[other]", "nothing else"),
        ("[profiles]\na = 1", "may hold"),
        ("[profiles.a]\nprefix = ['s3://x']", "may hold"),
        ("[profiles.a]\nprefixes = []", "prefixes"),
        ("[profiles.a]\nprefixes = ['bucket']", "prefixes"),
        ("[profiles.a]\nprefixes = ['s3://x']\noptions = 3", "must be a table"),
        ("[profiles.a]\nprefixes = ['s3://x']\n[profiles.a.options]\nasynchronous = true", "may not set asynchronous"),
    ],
)
def test_a_wrong_profile_file_is_explained(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "profiles.toml"
    path.write_text(text)
    with pytest.raises(DocumentInvalid, match=complaint):
        load_profiles(path)


def test_a_broken_line_is_not_quoted_since_it_may_hold_a_secret(tmp_path: Path) -> None:
    path = tmp_path / "profiles.toml"
    path.write_text("[profiles.a]\nsecret = topsecret")
    with pytest.raises(DocumentInvalid) as caught:
        load_profiles(path)
    assert "topsecret" not in str(caught.value)


def test_the_users_file_is_found_by_variable_then_by_its_usual_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RESHARD_PROFILES", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert profiles_path() is None
    assert load_profiles(None) == ()
    usual = tmp_path / "reshard" / "profiles.toml"
    usual.parent.mkdir()
    usual.write_text("[profiles]")
    assert profiles_path() == usual
    monkeypatch.setenv("RESHARD_PROFILES", str(tmp_path / "nowhere.toml"))
    with pytest.raises(UsageError, match=r"nowhere\.toml"):
        load_profiles(profiles_path())
