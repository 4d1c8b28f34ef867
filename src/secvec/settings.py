"""Build a procedure's config from a YAML file, `key=value` pairs and flags; later ones win."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from secvec.errors import UsageError

ConfigT = TypeVar("ConfigT")


def settings(config_type: type[ConfigT], file: Path | None, pairs: Sequence[str], flags: Mapping[str, Any]) -> ConfigT:
    """Return a config of `config_type`, a frozen dataclass. Flags that are None were not given.

    Raises UsageError on an unknown key (naming the nearest ones), a value of the wrong type, or an unreadable file.
    """
    values = {**_from_file(file), **dict(_pair(pair) for pair in pairs)}
    values |= {key: value for key, value in flags.items() if value is not None}
    names = [field.name for field in dataclasses.fields(config_type)]  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=2) or names
            raise UsageError(f"unknown setting {key!r}; expected one of {', '.join(near)}")
    try:
        return TypeAdapter(config_type).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        raise UsageError(f"{where}: {first['msg']}, found {first['input']!r}") from error


def _from_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: cannot be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{file}: expected settings as `key: value` lines, found {type(document).__name__}")
    return {str(key): value for key, value in document.items()}


def _pair(pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not equals or not key:
        raise UsageError(f"--set: expected key=value, found {pair!r}")
    return key.strip(), yaml.safe_load(value)
