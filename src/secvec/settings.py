"""Build a procedure's config from a YAML file, `key=value` pairs and flags; later ones win."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from secvec.errors import UsageError

ConfigT = TypeVar("ConfigT")


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-2` is a number, as in version 1.2; in PyYAML's 1.1 it is a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def settings(config_type: type[ConfigT], file: Path | None, pairs: Sequence[str], flags: Mapping[str, Any]) -> ConfigT:
    """Return a config of `config_type`, a frozen dataclass. Flags that are None were not given.

    A pair `key.name=value` sets one entry of a setting that holds several (`trainer.warmup_steps=10`).

    Raises UsageError on an unknown key (naming the nearest ones), a value of the wrong type, or an unreadable file.
    """
    values = _from_file(file)
    for pair in pairs:
        _set(values, pair)
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
        if isinstance(refusal := first.get("ctx", {}).get("error"), UsageError):
            raise refusal from error
        where = ".".join(str(part) for part in first["loc"]) or "settings"
        raise UsageError(f"{where}: {first['msg']}, found {first['input']!r}") from error


def check_seed(config: str, seed: int) -> None:
    """Refuse a seed that one of the generators would not take: NumPy's has 32 bits. Raises UsageError."""
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"{config}.seed: expected a whole number from 0 to {(1 << 32) - 1}, found {seed!r}")


def _from_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        document = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: cannot be read as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(document, dict):
        raise UsageError(f"{file}: expected settings as `key: value` lines, found {type(document).__name__}")
    return {str(key): value for key, value in document.items()}


def _set(values: dict[str, Any], pair: str) -> None:
    key, equals, text = pair.partition("=")
    if not equals or not key:
        raise UsageError(f"--set: expected key=value, found {pair!r}")
    try:
        value = yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--set: {pair!r}: cannot be read as YAML: {str(error).splitlines()[0]}") from error
    name, dot, entry = key.strip().partition(".")
    held = values.get(name)
    values[name] = {**(cast(dict[str, Any], held) if isinstance(held, dict) else {}), entry: value} if dot else value
