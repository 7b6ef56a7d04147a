"""Which files of a model folder travel with its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reshard_service.dtypes import by_name
from reshard_service.errors import UnsafeSource
from reshard_service.formats import side_files
from reshard_service.formats.side_files import carried_side_files, side_file_names, with_dtype
from reshard_service.storage.local import LocalStorage

CARRIED = [
    "LICENSE",
    "README.md",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "modeling_custom.py",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
]
LEFT = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state_0.pth",
    "trainer_state.json",
    "training_args.bin",
    "reshard.manifest.json",
    "reshard.layout.json",
    ".metadata",
    ".gitattributes",
    "__0_0.distcp",
    "additional_chat_templates/evil.sh",
    "subfolder/config.json",
    "adapter_config.json",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*CARRIED, *LEFT):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float32"}))
    return tmp_path


def test_config_tokenizer_and_code_are_carried_and_weights_and_state_are_not(folder: Path) -> None:
    assert side_file_names(LocalStorage(folder)) == tuple(sorted(CARRIED))
    files = dict(carried_side_files(LocalStorage(folder)))
    assert files["tokenizer.json"] == b"tokenizer.json"
    assert files["config.json"] == (folder / "config.json").read_bytes()


def test_code_and_texts_belong_to_a_model_only_beside_its_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    names = side_file_names(LocalStorage(folder))
    assert "tokenizer.json" in names
    assert not {"modeling_custom.py", "README.md", "LICENSE"} & set(names)


def test_a_single_file_has_no_side_files(folder: Path) -> None:
    assert side_file_names(LocalStorage(folder / "model.safetensors")) == ()


def test_the_configs_dtype_follows_a_cast() -> None:
    config = {
        "torch_dtype": "float32",
        "dtype": "torch.float32",
        "text_config": {"dtype": "float32", "vision_config": {"torch_dtype": "float16"}},
        "quantization_config": {"dtype": "float32"},
        "name": "x",
    }
    cast = json.loads(with_dtype(json.dumps(config).encode(), by_name("BF16")))
    assert cast == {
        "torch_dtype": "bfloat16",
        "dtype": "torch.bfloat16",
        "text_config": {"dtype": "bfloat16", "vision_config": {"torch_dtype": "bfloat16"}},
        "quantization_config": {"dtype": "float32"},
        "name": "x",
    }
    untouched = b'{ "name" : 1, "dtype": null }'
    assert with_dtype(untouched, by_name("BF16")) == untouched


def test_transformers_reads_the_cast_config(tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, LlamaConfig

    LlamaConfig(dtype="float32").save_pretrained(tmp_path)
    (data,) = (data for path, data in carried_side_files(LocalStorage(tmp_path), dtype=by_name("F16")))
    (tmp_path / "config.json").write_bytes(data)
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.float16


def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_text("x")
    (folder / "vocab.txt").symlink_to(secret)
    with pytest.raises(UnsafeSource, match=r"vocab\.txt"):
        carried_side_files(LocalStorage(folder))


def test_sizes_and_counts_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_files, "MAX_FILE_BYTES", 10)
    with pytest.raises(UnsafeSource, match="larger than"):
        carried_side_files(LocalStorage(folder))
    monkeypatch.setattr(side_files, "MAX_FILES", 3)
    with pytest.raises(UnsafeSource, match="at most 3"):
        carried_side_files(LocalStorage(folder))
