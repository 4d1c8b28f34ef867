"""Which files are meant by a path that a user gives: a file, a folder of files or a data set of the hub; no torch."""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from secvec.errors import InputError, UsageError
from secvec.formats import FORMATS

PACKED = (".gz", ".zst")
_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".txt", ".parquet")
SUFFIXES = (*_KINDS, *(kind + packed for kind in _KINDS if kind != ".parquet" for packed in PACKED))
"""How the names of data files in a folder end."""

# What lies beside data and is none.
_BESIDE = re.compile(r"\.|(readme|licen[cs]e)(\.\w+)?$|dataset_infos?\.json$|.*\.(md|py|ya?ml)$", re.IGNORECASE)
_IGNORED = ("*dataset_info*.json", "README*", "LICENSE*", ".*")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[^/].*)?", re.ASCII)
_SPLITS = {
    "train": re.compile(r"(?<![a-z])train(ing)?(?![a-z])"),
    "validation": re.compile(r"(?<![a-z])(val|valid|validation|dev)(?![a-z])"),
    "test": re.compile(r"(?<![a-z])(test|testing|eval|evaluation)(?![a-z])"),
}


@dataclass(frozen=True)
class DataFiles:
    """The files of a data set, in order. name: what the user gave, without the format; format: None where unstated."""

    name: str
    files: tuple[Path, ...]
    format: str | None


def find(data: "str | Path | DataFiles") -> DataFiles:
    """Find the files that are meant by FILE, FOLDER, or OWNER/NAME[/PATH] on the hub, each with :FORMAT or without.

    A folder, here or on the hub, stands for all data files in it, in the order of their paths, if they are of one
    split. PATH is a file, a folder or a pattern such as data/train-*. FORMAT: one of `secvec.formats.FORMATS`.

    Raises InputError when there is no such data, or it is unclear which is meant; UsageError on an unknown format.
    """
    if isinstance(data, DataFiles):
        return data
    name, format = _stated(str(data))
    if os.path.lexists(name):
        return DataFiles(name, _local(Path(name)), format)
    return DataFiles(name, _from_hub(name) if _on_hub(name) else (regular(Path(name)),), format)


def _stated(text: str) -> tuple[str, str | None]:
    """Cut :FORMAT off the end, unless there is a file of that name."""
    name, colon, format = text.rpartition(":")
    if not colon or os.path.lexists(text):
        return text, None
    if format in FORMATS:
        return name, format
    if os.path.lexists(name):
        raise UsageError(f"{text}: expected one of the formats {', '.join(FORMATS)} behind the colon, found {format!r}")
    return text, None


def regular(path: Path) -> Path:
    """Return the path of a regular file. Raises InputError on anything else, such as a pipe, which waits for ever."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if stat.S_ISREG(mode):
        return path
    found = "a pipe" if stat.S_ISFIFO(mode) else "a folder" if stat.S_ISDIR(mode) else "a device or socket"
    raise InputError(f"{path}: expected a file, which can be read more than once, found {found}; save it as a file")


def unreadable(path: Path, error: Exception) -> InputError:
    """Return the error for a file that the system does not let us read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InputError(f"{path}: expected a readable data file, found: {reason}; check the path")


def _local(path: Path) -> tuple[Path, ...]:
    return _one_split(str(path), path, _in_folder(path)) if path.is_dir() else (regular(path),)


def _in_folder(folder: Path) -> list[Path]:
    """List the data files of a folder and those in it. What may be data, but cannot be read, is no silent loss."""
    files: list[Path] = []
    for path in _walk(folder):
        if path.name.lower().endswith(SUFFIXES):
            files.append(regular(path))
        else:
            raise InputError(
                f"{path}: expected data files in the folder (*{', *'.join(_KINDS)}, the texts also packed as "
                f"{', '.join(PACKED)}), found another file; take it out or name the files one by one"
            )
    if not files:
        raise InputError(f"{folder}: expected data files in the folder, found none")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error
    for path in entries:
        if _BESIDE.match(path.name):
            continue
        if path.is_dir() and path.is_symlink():
            raise InputError(f"{path}: expected files and folders, found a link to a folder; name that folder itself")
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _one_split(name: str, folder: Path, files: Sequence[Path]) -> tuple[Path, ...]:
    """Refuse files of several splits: a test split is not to be trained on by mistake."""
    inside = [str(path.relative_to(folder)) for path in files]
    splits = {split for each in inside if (split := _split(each.lower())) is not None}
    if len(splits) > 1:
        raise InputError(
            f"{name}: expected the files of one split, found those of {' and '.join(sorted(splits))}; name a file or "
            f"folder of one, such as {name}/{inside[0]}"
        )
    return tuple(files)


def _split(name: str) -> str | None:
    return next((split for split, word in _SPLITS.items() if word.search(name)), None)


def _on_hub(name: str) -> bool:
    """Tell whether a path that is not here may be a hub id; a mistyped local path is not to be sent to the hub."""
    owner = name.split("/", 1)[0]
    looks_local = name.count("/") == 1 and name.lower().endswith(SUFFIXES)
    return _HUB_ID.fullmatch(name) is not None and not os.path.lexists(owner) and not looks_local


def _from_hub(name: str) -> tuple[Path, ...]:
    """Download the data files of a data set of the hub, those under one path where a path follows the id."""
    owner, repository, *inside = name.split("/", 2)
    folder = _download(f"{owner}/{repository}", inside)
    found = sorted(folder.glob(inside[0])) if inside else [folder]
    files = [file for path in found for file in (_in_folder(path) if path.is_dir() else [regular(path)])]
    if not files:
        raise InputError(f"{name}: expected data files in this data set of the hub, found none at this path")
    return _one_split(f"{owner}/{repository}", folder, files)


def _download(repository: str, inside: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [pattern for path in inside for pattern in (path, f"{path.rstrip('/')}/*")]
    try:
        return Path(
            snapshot_download(
                repository,
                repo_type="dataset",
                allow_patterns=wanted or [f"*{suffix}" for suffix in SUFFIXES],
                ignore_patterns=list(_IGNORED),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{repository!r} is neither a file or folder here nor a data set of the hub that can be reached "
            f"({type(error).__name__}); check the path"
        ) from error
