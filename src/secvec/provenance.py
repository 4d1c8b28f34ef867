"""Fingerprints: of files, models, tokenizers and rows, and the versions of the software; no torch."""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from secvec.errors import CheckpointError
from secvec.headers import TensorEntry, read_index
from secvec.samples import Sample

_CHUNK_BYTES = 8 << 20
# What decides how text becomes token ids; the files' other content (such as the class's name) varies between versions.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
_PACKAGES = ("secvec", "torch", "transformers", "accelerate", "safetensors", "trl", "peft")


def digest_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, "sha256:..."."""
    path = Path(path)
    try:
        return _digest_range(path, 0, path.stat().st_size)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found {error.strerror}; check the path") from error


def digest_model(folder: str | Path) -> str:
    """Return the digest of a model's weights: name, dtype, shape and bytes of each tensor, in the order of names.

    How the tensors are spread over files does not matter. Raises CheckpointError on weights that cannot be read.
    """
    digest = hashlib.sha256()
    for name, entry in read_index(folder).items():
        line = [name, entry.dtype, list(entry.shape), _digest_entry(entry)]
        digest.update(json.dumps(line).encode() + b"\n")
    return "sha256:" + digest.hexdigest()


def digest_tokenizer(folder: str | Path) -> str:
    """Return the digest of the files that decide how text becomes token ids."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (path := Path(folder) / name).exists():
            digest.update(f"{name} {digest_file(path)}\n".encode())
    return "sha256:" + digest.hexdigest()


def digest_chat_template(template: str | Mapping[str, str] | None) -> str:
    """Return the digest of a tokenizer's chat template: a text, or several by name, or none."""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def digest_samples(samples: Sequence[Sample]) -> str:
    """Return the digest of rows: their messages in order, not where they were read from."""
    digest = hashlib.sha256()
    for sample in samples:
        row = [sample.form, *([message.role, message.content] for message in sample.messages)]
        digest.update(json.dumps(row).encode() + b"\n")
    return "sha256:" + digest.hexdigest()


def versions() -> Mapping[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _digest_entry(entry: TensorEntry) -> str:
    return _digest_range(entry.file, entry.start, entry.end)


def _digest_range(path: Path, start: int, end: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        left = end - start
        while left > 0 and (data := file.read(min(left, _CHUNK_BYTES))):
            digest.update(data)
            left -= len(data)
    return "sha256:" + digest.hexdigest()
