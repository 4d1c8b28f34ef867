"""Data files as the tests write them, and what is said of those that cannot be read."""

from pathlib import Path

import pytest

from secvec.errors import InputError
from secvec.samples import read_samples


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def refusal(path: Path) -> str:
    """Return why a file as a whole is refused."""
    with pytest.raises(InputError) as caught:
        read_samples(path)
    assert caught.value.exit_code == 3
    return str(caught.value)
