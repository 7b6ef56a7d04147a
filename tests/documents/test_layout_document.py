"""The layout document: its schema, its errors, and what YAML and JSON may hold."""

from __future__ import annotations

import contextlib
import json
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard_service.documents.layout import (
    LayoutDocument,
    RuleDocument,
    layout_document,
    layout_schema,
    parse_layout_document,
    read_layout_document,
    with_document_rules,
)
from reshard_service.errors import DocumentInvalid, UsageError

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("examples/layouts/*.yaml")), *sorted(ROOT.glob("tests/layouts/*.yaml"))]
MESH = "version: 1\nmesh: {axes: [[fsdp, 2], [tp, 2]]}\n"


def test_the_committed_schema_is_the_generated_one() -> None:
    committed = json.loads(files("reshard_service.documents").joinpath("layout.schema.json").read_text("utf-8"))
    assert committed == layout_schema(), "write json.dumps(layout_schema(), indent=2) to layout.schema.json"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_document_of_the_repository_reads_and_follows_the_schema(path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = read_layout_document(path)
    jsonschema.validate(json.loads(document.model_dump_json()), layout_schema())


def test_yaml_and_json_say_the_same() -> None:
    yaml = MESH + 'rules: [{match: "**.w", placements: {tp: "strided(-1, 2)"}, view: memory}]'
    document = parse_layout_document(yaml)
    assert document.mesh.axes == (("fsdp", 2), ("tp", 2))
    assert document.rules[0].placements == {"tp": "strided(-1, 2)"}
    assert parse_layout_document(document.model_dump_json()) == document
    assert layout_document(json.loads(document.model_dump_json())) == document
    # YAML's flow style begins like JSON.
    assert parse_layout_document("{version: 1, mesh: {axes: [[fsdp, 2], [tp, 2]]}}").mesh == document.mesh


@pytest.mark.parametrize(
    ("text", "pointer", "says"),
    [
        ("mesh: {axes: [[fsdp, 2]]}", "/version", "missing"),
        ("version: 2\nmesh: {axes: [[fsdp, 2]]}", "/version", "1"),
        ("version: 1", "/mesh", "missing"),
        ("version: 1\nmesh: {axes: []}", "/mesh/axes", "at least 1"),
        ("version: 1\nmesh: {axes: [[fsdp, 0]]}", "/mesh/axes/0/1", "greater than or equal to 1"),
        ("version: 1\nmesh: {axes: [[fsdp, '2']]}", "/mesh/axes/0/1", "integer"),
        ("version: 1\nmesh: {axes: [[fsdp, true]]}", "/mesh/axes/0/1", "integer"),
        ("version: 1\nmesh: {axes: [[fsdp, 2.5]]}", "/mesh/axes/0/1", "integer"),
        ("version: 1\nmesh: {axes: [[fsdp]]}", "/mesh/axes/0/1", "missing"),
        ("version: 1\nmesh: {axes: [[fsdp, 2], [fsdp, 2]]}", "/mesh/axes", "twice"),
        ("version: 1\nmesh: {axes: [['a b', 2]]}", "/mesh/axes/0/0", "pattern"),
        ("version: 1\nmesh: {axes: [[a, 1048576], [b, 2]]}", "/mesh/axes", "larger than"),
        (MESH + "rulez: []", "/rulez", "unknown key"),
        (MESH + "rules: {}", "/rules", "list"),
        (MESH + "rules: [{match: w}]", "/rules/0/placements", "missing"),
        (MESH + "rules: [{match: 'a..b', placements: {}}]", "/rules/0/match", "empty component"),
        (MESH + "rules: [{match: w, placements: {tp: shard}}]", "/rules/0/placements/tp", "shard(DIM)"),
        (MESH + "rules: [{match: w, placements: {tp: 'strided(0)'}}]", "/rules/0/placements/tp", "shard(DIM)"),
        (MESH + "rules: [{match: w, placements: {tp: 'strided(0,0)'}}]", "/rules/0/placements/tp", "shard(DIM)"),
        (MESH + 'rules: [{match: w, placements: {tp: "shard(0)\\n"}}]', "/rules/0/placements/tp", "shard(DIM)"),
        (MESH + "rules: [{match: w, placements: {tpp: shard(0)}}]", "/rules/0/placements/tpp", "fsdp, tp"),
        (MESH + "rules: [{match: w, placements: {'a/b': flat}}]", "/rules/0/placements/a~1b", "pattern"),
        (MESH + "rules: [{match: w, placements: {}, view: disk}]", "/rules/0/view", "memory"),
        (MESH + "rules: [{match: w, placements: {}, unit: 'm.*'}]", "/rules/0/unit", "flat"),
        (MESH + "expert_mesh: {axes: [[ep, 4]], match: []}", "/expert_mesh/match", "at least 1"),
        (MESH + "expert_mesh: {axes: [[ep, 4]], efsdp_dim: 2}", "/expert_mesh/efsdp_dim", "less than or equal"),
        ("[]", "the top", "mapping"),
        ("", "the top", "mapping"),
    ],
)
def test_what_is_wrong_is_pointed_at(text: str, pointer: str, says: str) -> None:
    with pytest.raises(DocumentInvalid) as error:
        parse_layout_document(text, "my.yaml")
    assert f"at {pointer}: " in str(error.value)
    assert says in str(error.value)
    assert "my.yaml" in str(error.value)
    assert error.value.exit_code == 2


def test_several_faults_are_told_at_once_up_to_a_few() -> None:
    rules = ", ".join("{match: w, placements: {tp: x}}" for _ in range(9))
    with pytest.raises(DocumentInvalid) as error:
        parse_layout_document(MESH + f"rules: [{rules}]")
    assert "/rules/4/" in str(error.value)
    assert "/rules/5/" not in str(error.value)
    assert "and 4 more" in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &x [1]\nb: *x", "aliases"),
        ("version: 1\nversion: 1", "twice"),
        ('{"version": 1, "version": 1}', "twice"),
        ("!!python/object/apply:os.system ['true']", "constructor"),
        ("[" * 50_000, "nested too deeply"),
        ('{"a":' * 50_000, "nested too deeply"),
        ("a: b: c", "neither YAML nor JSON"),
        ("{? [a, b] : 1}", "neither YAML nor JSON"),
        ("a: \x00", "neither YAML nor JSON"),
        ("#" * (1 << 20) + "#", "larger"),
    ],
)
def test_text_that_is_more_than_plain_data_is_refused(text: str, says: str) -> None:
    with pytest.raises(DocumentInvalid) as error:
        parse_layout_document(text)
    assert says in str(error.value)


@settings(deadline=None)
@given(st.text(max_size=60) | st.text("{}[]:,-&*!?|>'\"\n a1", max_size=40))
def test_any_text_is_a_document_or_a_clear_refusal(text: str) -> None:
    with contextlib.suppress(DocumentInvalid):
        parse_layout_document(text)


def test_a_file_that_is_not_there_or_not_text_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no document"):
        read_layout_document(tmp_path / "layout.yaml")
    with pytest.raises(UsageError, match="can't read"):
        read_layout_document(tmp_path)
    (tmp_path / "layout.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DocumentInvalid, match="UTF-8"):
        read_layout_document(tmp_path / "layout.yaml")


def test_rules_may_name_the_usual_axes_that_a_layout_does_not_have() -> None:
    document = LayoutDocument.model_validate({"version": 1, "mesh": {"axes": [["fsdp", 2]]}})
    rules = [RuleDocument(match="**", placements={"ep": "shard(0)", "tp": "shard(1)"})]
    assert with_document_rules(document, rules).rules == tuple(rules)
