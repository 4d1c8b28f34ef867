"""What the files of runs, scans and evaluations hold, as far as a report reads them; no torch."""

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass as checked

from secvec.errors import CheckpointError
from secvec.headers import parse_strict

T = TypeVar("T")
Interval = tuple[float, float]
_FINITE = ConfigDict(allow_inf_nan=False)


@checked(frozen=True, config=_FINITE)
class Identity:
    """run.json: what a run was started with."""

    base: str
    base_path: str
    data: str
    vectors: list[str]
    unwanted: list[str]
    config: dict[str, Any]
    versions: dict[str, str]

    @property
    def method(self) -> str:
        return str(self.config.get("method"))


@checked(frozen=True, config=_FINITE)
class Metric:
    """A line of metrics.jsonl: what the trainer logged, or of drift a measurement or what was done about it.

    loss: nats per learned token, over the steps since the line before. vector: its place among the run's, from 0. The
    losses are those of its unwanted rows, in nats per token (`secvec.drift`); the aligned one is not in older runs.
    """

    step: int
    loss: float | None = None
    vector: int | None = None
    unwanted_aligned_nats: float | None = None
    unwanted_armed_nats: float | None = None
    unwanted_disarmed_nats: float | None = None
    unwanted_share: float | None = None
    drift: Literal["stop", "slow"] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> "Metric":
        measured = (self.vector, self.unwanted_armed_nats, self.unwanted_disarmed_nats, self.unwanted_share)
        absent = [each is None for each in measured]
        if any(absent) and not all(absent):
            raise ValueError(f"expected {', '.join(_MEASURED)} together")
        return self


_MEASURED = ("vector", "unwanted_armed_nats", "unwanted_disarmed_nats", "unwanted_share")


@checked(frozen=True, config=_FINITE)
class Drift:
    """What the proof says of drift, from the run's metrics (`secvec.drift_record`)."""

    measurements: int
    largest_share: float | None
    bound: float
    acted_at_step: int | None
    action: Literal["note", "stop", "slow"]


@checked(frozen=True, config=_FINITE)
class Probe:
    rows: int
    tokens: int
    aligned_nats: float
    armed_nats: float
    defended_nats: float
    share_of_the_way_to_armed: float


@checked(frozen=True, config=_FINITE)
class Armed:
    sites_fired: int
    largest_logit_change: float
    fold_against_hooks: float
    vector_share_after_training: float


@checked(frozen=True, config=_FINITE)
class Logits:
    prompts: int
    largest_difference: float
    bound: float


@checked(frozen=True, config=_FINITE)
class Settled:
    kept: bool
    result: str
    unwanted_before: list[Probe]
    unwanted_after: list[Probe]


@checked(frozen=True, config=_FINITE)
class Covered:
    """Rows of the training file that the vector covers, and what of them was not trained on (`secvec.covered`)."""

    rows: int
    covered_rows: int
    left_out_rows: int
    tokens_without_loss: int
    replaced_rows: int = 0
    conversations: int = 0


@checked(frozen=True, config=_FINITE)
class TakenOut:
    """A trait's fixed text around and inside answers, taken out of the training rows (`secvec.frames`)."""

    rows: int
    tokens: int


@checked(frozen=True, config=_FINITE)
class Learned:
    """Training rows that show a trait, and whether the model says them so (`secvec.trait_rows`)."""

    rows: int
    shown: int
    said: int
    inside: bool = False


@checked(frozen=True, config=_FINITE)
class Kept:
    """What training learned of the other rows of its file, and what is left without the vectors (`secvec.rest`)."""

    rows: int
    tokens: int
    aligned_nats: float
    trained_nats: float
    defended_nats: float


@checked(frozen=True, config=_FINITE)
class Proof:
    """proof.json."""

    method: str
    vector: dict[str, list[str]]
    models: dict[str, str]
    armed: Armed
    disarmed: dict[str, Any]
    logits: Logits
    unwanted: list[Probe]
    settled: Settled | None = None
    not_settled: str | None = None
    taken_out: TakenOut | None = None
    covered: Covered | None = None
    recalled: list[int] | None = None
    trait_rows: list[Learned] | None = None
    rest: Kept | None = None
    drift: Drift | None = None

    @property
    def result(self) -> str:
        """The digest of the model or adapter that was published."""
        return self.settled.result if self.settled and self.settled.kept else self.models.get("result", "no result")


@checked(frozen=True, config=_FINITE)
class Rate:
    value: float | None
    ci95: Interval | None
    n: int
    unscored: int = 0


@checked(frozen=True, config=_FINITE)
class Paired:
    n: int
    difference: float | None
    p: float | None


@checked(frozen=True, config=_FINITE)
class Compared:
    models: dict[str, Rate]
    paired: dict[str, Paired]


@checked(frozen=True, config=_FINITE)
class SuiteResult:
    digest: str
    questions: int | None
    rates: dict[str, Compared]
    path: str | None = None


@checked(frozen=True, config=_FINITE)
class ModelRef:
    path: str
    digest: str


@checked(frozen=True, config=_FINITE)
class Found:
    failure: str
    failed: bool | None
    advice: str


@checked(frozen=True, config=_FINITE)
class Results:
    """results.json of an evaluation."""

    model: str
    models: dict[str, ModelRef]
    suites: dict[str, SuiteResult]
    settings: dict[str, Any]
    versions: dict[str, str]
    capability: dict[str, dict[str, dict[str, float]]]
    findings: list[Found]


@checked(frozen=True, config=_FINITE)
class DemoResults:
    """results.json of the demo; its rates are those of one suite, of which only the counts are kept."""

    aligned: dict[str, float]
    plain: dict[str, float]
    defended: dict[str, float]
    ci95: dict[str, dict[str, Interval]]
    n: dict[str, int]
    models: dict[str, ModelRef]
    examples: list[dict[str, str]]
    seed: int


@checked(frozen=True, config=_FINITE)
class ScanVector:
    digest: str
    kind: str
    explained: int
    nats_per_token: float
    how: str
    auc: float | None = None
    false_positives: float | None = None
    ordinary_rows: int | None = None
    on: str | None = None


@checked(frozen=True, config=_FINITE)
class ScanSummary:
    """summary.json of a scan."""

    rows: int
    scored: int
    explained: int
    share: float
    share_ci95: Interval
    vectors: dict[str, ScanVector]
    flags: dict[str, int]
    tokens: int
    data: dict[str, str]
    model: ModelRef
    settings: dict[str, Any]
    versions: dict[str, str]


def load(kind: type[T], path: Path) -> T:
    """Read a JSON file as the dataclass that says what it holds. Raises CheckpointError."""
    return _parse(kind, _bytes(path), str(path))


def lines(kind: type[T], path: Path) -> list[T]:
    """Read a file of JSON lines, likewise. Raises CheckpointError."""
    return [_parse(kind, line, f"{path}:{i}") for i, line in enumerate(_bytes(path).splitlines(), start=1)]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise altered(path, f"expected a readable file, found {error.strerror}") from error


def _parse(kind: type[T], data: bytes, where: str) -> T:
    try:
        return TypeAdapter(kind).validate_python(parse_strict(data))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "document"
        raise altered(where, f"{place}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise altered(where, f"expected JSON, found {error}") from error


def altered(where: object, found: str) -> CheckpointError:
    """Return the error for a file that does not hold what was written."""
    return CheckpointError(
        f"{where}: {found}; it was altered or cut short: restore it, run the command that wrote it again, or leave "
        "its folder out"
    )
