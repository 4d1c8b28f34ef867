"""The exceptions of secvec, one tree.

    SecvecError
    |-- UsageError(ValueError)           exit 2   options that contradict each other or name nothing
    |   `-- MissingExtraError(ImportError)        an optional dependency is not installed
    |-- InputError(ValueError)           exit 3   something the user gave us cannot be used
    |   |-- RowError                              rows of a data file
    |   |   `-- EmptyAnswerError                  a row that answers nothing
    |   |-- ArtifactError                         the vector's file
    |   |-- CheckpointError                       a model folder, folded, trained or plain
    |   `-- SiteError(LookupError)                a site that the model lacks or that has another shape
    `-- NotDefendedError(RuntimeError)   exit 4   a protection could not be shown to be active
        |-- ArmError                              the vector is not, or not safely, in effect in memory
        |-- WeakVectorError                       the fitted vector does not show the unwanted behaviour
        `-- ProofError                            the finished model could not be proved clean

A message says what was expected, what was found, where, and what to do.
"""

from typing import ClassVar


class SecvecError(Exception):
    """Base class of everything secvec raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(SecvecError, ValueError):
    """Refuse options that contradict each other or name nothing."""

    exit_code = 2


class MissingExtraError(UsageError, ImportError):
    """Name the extra to install for an optional dependency."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'secvec[{extra}]'")
        self._named = package, extra

    def __reduce__(self) -> tuple[type["MissingExtraError"], tuple[str, str]]:
        return MissingExtraError, self._named


class InputError(SecvecError, ValueError):
    """Refuse something the user gave us."""

    exit_code = 3


class RowError(InputError):
    """Refuse rows of a data file; the message lists file, line, field and reason."""


class EmptyAnswerError(RowError):
    """Refuse a row whose answer is empty: there is nothing to learn from it."""


class ArtifactError(InputError):
    """Refuse a vector's file."""


class CheckpointError(InputError):
    """Refuse a model folder."""


class SiteError(InputError, LookupError):
    """Refuse a vector whose site the model lacks or holds in another shape."""


class NotDefendedError(SecvecError, RuntimeError):
    """Stop because a protection could not be shown to be active."""

    exit_code = 4


class ArmError(NotDefendedError):
    """Refuse to run with a vector that is not, or not safely, in effect."""


class WeakVectorError(NotDefendedError):
    """Refuse a fitted vector that does not show the unwanted behaviour."""


class ProofError(NotDefendedError):
    """Refuse to publish a model that could not be proved clean."""
