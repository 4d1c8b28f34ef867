"""Fingerprints: of files, models, tokenizers and rows, and the versions of the software; no torch."""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from blake3 import blake3

from secvec.errors import CheckpointError
from secvec.headers import TensorEntry, read_index
from secvec.samples import Sample

_CHUNK_BYTES = 1 << 20
# What decides how text becomes token ids; the files' other content (such as the class's name) varies between versions.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
_PACKAGES = ("secvec", "torch", "transformers", "accelerate", "safetensors", "trl", "peft")


def digest_file(path: str | Path) -> str:
    """Return the BLAKE3 of a file's bytes, "blake3:..."."""
    path, digest = Path(path), blake3()
    try:
        _feed(digest.update, path, 0, path.stat().st_size)
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found {error.strerror}; check the path") from error
    return named_blake3(digest)


def digest_files(paths: Sequence[Path]) -> str:
    """Return the digest of a data set: that of its file or, where it has several, of their names and digests."""
    digests = [digest_file(path) for path in paths]
    if len(paths) == 1:
        return digests[0]
    lines = [json.dumps([path.name, digest]) + "\n" for path, digest in zip(paths, digests, strict=True)]
    return named_blake3(blake3("".join(lines).encode()))


def digest_model(folder: str | Path) -> str:
    """Return the digest of a model's weights, "blake3:..."; how the tensors are spread over files does not matter.

    Raises CheckpointError on weights that cannot be read.
    """
    index = read_index(folder)
    return combine_tensors(index, {name: digest_tensor(entry) for name, entry in index.items()})


def digest_tensor(entry: TensorEntry) -> str:
    """Return the BLAKE3 of a tensor's bytes on disk, "blake3:..."."""
    digest = blake3()
    _feed(digest.update, entry.file, entry.start, entry.end)
    return named_blake3(digest)


def named_blake3(digest: blake3) -> str:
    return "blake3:" + digest.hexdigest()


def combine_tensors(index: Mapping[str, TensorEntry], digests: Mapping[str, str]) -> str:
    """Return the digest of a model: of name, dtype, shape and digest of each tensor, in the order of names."""
    lines = [json.dumps([name, entry.dtype, list(entry.shape), digests[name]]) + "\n" for name, entry in index.items()]
    return named_blake3(blake3("".join(lines).encode()))


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


def _feed(update: Callable[[memoryview], object], path: Path, start: int, end: int) -> None:
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < end and (count := file.readinto(buffer[: end - start])):
            update(buffer[:count])
            start += count
