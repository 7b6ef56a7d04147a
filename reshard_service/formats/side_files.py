"""The files of a model folder that travel with the weights: config, tokenizer, templates, custom code as plain files.

Never weights, optimizer state, an index or a manifest of another file set; never anything executed by us.
"""

from __future__ import annotations

import json
from fnmatch import fnmatchcase

from reshard_service.dtypes import DType
from reshard_service.errors import UnsafeSource
from reshard_service.formats.strict_json import parse_json
from reshard_service.storage.base import DirEntry, Storage

MAX_FILE_BYTES = 256_000_000
MAX_TOTAL_BYTES = 1_000_000_000
MAX_FILES = 500

CARRIED = (
    "config.json",
    "generation_config.json",
    "configuration.json",
    "params.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "tokenizer.model.*",
    "tokenizer*.jsonl",
    "*.tiktoken",
    "tekken.json",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "sentencepiece*",
    "spiece.model",
    "*.spm",
    "*.bpe.model",
    "normalizer.json",
    "chat_template*",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "feature_extractor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
"""Names that transformers and tokenizers read."""

CARRIED_WITH_CONFIG = ("*.py", "LICENSE*", "LICENCE*", "NOTICE*", "README*", "USE_POLICY*")
"""Custom code and texts: they belong to a model only where its config lies too, elsewhere they may be anything."""

CARRIED_FOLDERS = ("additional_chat_templates",)

NEVER = (
    "*.safetensors",
    "*.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.distcp",
    "*.ckpt",
    "*.gguf",
    "*.h5",
    "*.msgpack",
    "*.pkl",
    "*.onnx",
    "reshard.*",
    ".*",
)


def is_side_file(name: str, *, with_config: bool = True) -> bool:
    """Whether a file of this name is carried along; ``with_config`` tells that ``config.json`` lies beside it."""
    patterns = CARRIED + CARRIED_WITH_CONFIG if with_config else CARRIED
    return _matches(name, patterns) and not _matches(name, NEVER)


def side_file_names(storage: Storage) -> tuple[str, ...]:
    """Relative paths of the side files of a model folder, sorted; none for a storage that is a single file."""
    found: list[str] = []
    entries = storage.list_dir()
    with_config = any(entry.name == "config.json" for entry in entries)
    for entry in entries:
        if entry.is_dir and entry.name in CARRIED_FOLDERS:
            found += [f"{entry.name}/{inner.name}" for inner in storage.list_dir(entry.name) if _template(inner)]
        elif not entry.is_dir and is_side_file(entry.name, with_config=with_config):
            found.append(entry.name)
    return tuple(sorted(found))


def carried_side_files(storage: Storage, *, dtype: DType | None = None) -> list[tuple[str, bytes]]:
    """Path and content of each side file; with ``dtype`` the config's own dtype follows the cast (decision 7).

    A link is followed as the storage's policy allows; sizes are bounded (:class:`UnsafeSource`).
    """
    names = side_file_names(storage)
    if len(names) > MAX_FILES:
        raise UnsafeSource(f"{storage.uri!r} has {len(names)} config and code files; at most {MAX_FILES} are carried")
    files: list[tuple[str, bytes]] = []
    total = 0
    for name in names:
        status = storage.stat(name)
        if status is None or status.is_dir:
            continue
        total += status.bytes
        if status.bytes > MAX_FILE_BYTES or total > MAX_TOTAL_BYTES:
            raise UnsafeSource(
                f"file {name!r} makes the config and code files larger than {MAX_TOTAL_BYTES} bytes in all "
                f"or {MAX_FILE_BYTES} bytes each",
                file=name,
                hint="move it out of the model folder if it is no part of the model",
            )
        data = storage.read_bytes(name, 0, status.bytes)
        if dtype is not None and name == "config.json":
            data = with_dtype(data, dtype)
        files.append((name, data))
    return files


def with_dtype(config: bytes, dtype: DType) -> bytes:
    """``config.json`` with another element type wherever it names one (``dtype``; before transformers 4.56
    ``torch_dtype``), sections such as ``text_config`` included. A config that names none stays as it is.
    """
    document = parse_json(config, file="config.json")
    if dtype.torch is None or not isinstance(document, dict) or not _set_dtype(document, dtype.torch):
        return config
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _set_dtype(section: dict[str, object], name: str) -> bool:
    changed = False
    for key, value in section.items():
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            section[key] = f"torch.{name}" if value.startswith("torch.") else name
            changed = True
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            changed = _set_dtype(value, name) or changed
    return changed


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _template(entry: DirEntry) -> bool:
    return not entry.is_dir and entry.name.endswith(".jinja")
