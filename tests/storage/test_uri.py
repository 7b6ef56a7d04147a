"""Which URIs are taken, and where a policy lets them point."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard_service.errors import EnvironmentUnfit, ReshardError, UnsafeSource, UriRefused
from reshard_service.storage.profiles import StorageProfile
from reshard_service.storage.remote import FsspecStorage
from reshard_service.storage.uri import open_storage, service_policy, split_scheme


def test_a_plain_path_is_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    storage = open_storage(str(tmp_path))
    assert storage.is_local
    assert storage.read_bytes("a") == b"abc"


@pytest.mark.parametrize("name", ["with space", "per%20cent", "run::1", "what?", "a#b", "naïve", "@home"])
def test_plain_paths_may_hold_what_file_systems_allow(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    found = open_storage(str(tmp_path / name)).stat("")
    assert found is not None
    assert found.is_dir


def test_a_file_uri_made_by_pathlib_finds_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a folder" / "naïve.bin"
    path.parent.mkdir()
    path.write_bytes(b"abc")
    assert open_storage(path.as_uri()).read_bytes("") == b"abc"
    assert open_storage(f"file://localhost{path.as_uri().removeprefix('file://')}").read_bytes("") == b"abc"


REFUSED = [
    "",
    "a\nb",
    "s3://bucket/a\x00b",
    "simplecache::file:///etc/hostname",
    "s3://bucket/a::b",
    "zip://x.zip::s3://bucket/a.zip",
    "zip://inner",
    "reference://",
    "local:///etc/hostname",
    "S3://bucket/key",
    "FILE:///etc/hostname",
    "s3://bucket/key?versionId=1",
    "s3://bucket/key#part",
    "s3://bucket/a\\b",
    "s3://bucket/../other",
    "s3://bucket/a/..",
    "s3://bucket/./a",
    "s3://bucket//a",
    "s3://bucket/%2e%2e/other",
    "s3://bucket/a%2Fb",
    "s3://bucket/%0a",
    "s3://",
    "s3:///key",
    "memory://",
    "file://",
    "file://otherhost/etc/hostname",
    "file:///tmp/%2e%2e/etc",
    "file:///tmp/a?b",
]


@pytest.mark.parametrize("uri", REFUSED)
def test_dangerous_and_malformed_uris_are_refused(uri: str) -> None:
    with pytest.raises(UriRefused):
        open_storage(uri)


@pytest.mark.parametrize(
    "uri", ["s3://AKIAKEY:topsecret@bucket/x", "https://user:topsecret@host/x", "sftp://topsecret@h/x"]
)
def test_a_user_in_a_uri_is_refused_and_never_repeated(uri: str) -> None:
    with pytest.raises(UriRefused) as caught:
        open_storage(uri)
    assert "topsecret" not in str(caught.value)


def test_azures_container_at_account_is_not_taken_for_a_user() -> None:
    assert split_scheme("abfs://container@account.dfs.core.windows.net/x")[0] == "abfs"
    with pytest.raises(UriRefused):
        split_scheme("abfs://container:secret@account.dfs.core.windows.net/x")


def test_an_unknown_scheme_says_that_no_driver_knows_it() -> None:
    with pytest.raises(EnvironmentUnfit, match="'nosuch'"):
        open_storage("nosuch://bucket/x")


def test_a_missing_driver_names_what_to_install() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from reshard_service.storage.uri import open_storage\n"
        "from reshard_service.errors import EnvironmentUnfit\n"
        "try: open_storage('s3://bucket/x')\n"
        "except EnvironmentUnfit as error: print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "reshard-service[s3]" in shown


def test_nothing_is_contacted_when_a_store_is_opened() -> None:
    storage = open_storage("s3://no-such-bucket-anywhere/x")
    assert repr(storage) == "FsspecStorage('s3://no-such-bucket-anywhere/x')"


@given(st.text(max_size=60))
def test_any_text_gives_a_scheme_or_an_error_of_ours(text: str) -> None:
    for uri in (text, f"s3://{text}", f"file://{text}", f"memory://{text}"):
        try:
            scheme, _ = split_scheme(uri)
        except ReshardError:
            continue
        assert scheme == scheme.lower()


def test_a_local_path_needs_no_fsspec(tmp_path: Path) -> None:
    """Its import would be paid by every command that only touches local files."""
    code = (
        "import sys; from reshard_service.storage.uri import open_storage; "
        f"open_storage({str(tmp_path)!r}).list_dir(); sys.exit('fsspec' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the service's policy -------------------------------------------------------------------------------------


def test_the_service_takes_only_its_own_schemes(tmp_path: Path) -> None:
    policy = service_policy({"file"}, [tmp_path])
    with pytest.raises(UriRefused, match="not allowed"):
        open_storage("memory://x/y", policy)
    with pytest.raises(UriRefused, match="not allowed"):
        open_storage("/etc", service_policy({"s3"}, []))


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "{root}/../outside", "{root}/link", "relative", "file:///etc/hostname"]
)
def test_the_service_refuses_what_does_not_lie_beneath_its_folders(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    (root / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(UriRefused, match="does not lie beneath"):
        open_storage(path.format(root=root), service_policy({"file"}, [root]))


def test_the_service_opens_what_lies_beneath_its_folders(tmp_path: Path) -> None:
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "f").write_bytes(b"1")
    (tmp_path / "alias").symlink_to(tmp_path / "root")
    policy = service_policy({"file"}, [tmp_path / "alias"])
    assert open_storage(str(tmp_path / "alias" / "a"), policy).child("").read_bytes("f") == b"1"


def test_a_hub_cache_beneath_the_services_folder_may_not_lead_out_of_it(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a" / "snapshots" / "1"
    blobs = tmp_path / "models--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "x").write_bytes(b"1")
    (snapshot / "config.json").symlink_to(blobs / "x")
    assert open_storage(str(snapshot)).read_bytes("config.json") == b"1"
    assert open_storage(str(snapshot), service_policy({"file"}, [tmp_path])).read_bytes("config.json") == b"1"
    narrow = open_storage(str(snapshot), service_policy({"file"}, [snapshot]))
    with pytest.raises(UnsafeSource):
        narrow.read_bytes("config.json")


def test_the_service_needs_a_profile_for_every_remote_place() -> None:
    profile = StorageProfile("team", ("memory://team",), {})
    policy = service_policy({"memory"}, [], [profile])
    assert isinstance(open_storage("memory://team/run", policy), FsspecStorage)
    for outside in ("memory://teamwork/run", "memory://other/run"):
        with pytest.raises(UriRefused, match="no storage profile"):
            open_storage(outside, policy)
