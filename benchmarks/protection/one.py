"""Run one cell and return its line."""

import hashlib
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from benchmarks.methods import METHODS
from benchmarks.methods.runs import REFUSED
from benchmarks.methods.setting import Setting
from benchmarks.protection.cases import Case, train_config
from benchmarks.protection.cells import Cell
from benchmarks.protection.lines import Line
from benchmarks.protection.measure import measure
from benchmarks.protection.own import Experiment, OwnCase
from secvec import artifact
from secvec.errors import NotDefendedError, UsageError
from secvec.provenance import digest_model, versions
from secvec.runfolder import RunFolder
from secvec.train_config import TrainConfig
from secvec.tripwire import read_json

ROOT = Path(__file__).parents[2]
_ROUND_PROMPTS, _ROUND_OLD = 100, 3


@dataclass(frozen=True)
class Bench:
    """What all runs of one command share.

    n: prompts for each rate; old: for each old skill; benign: real rows for the skill "natural"; own: an experiment on
    other rows and questions than the testbed's.
    """

    model: Path
    n: int
    old: int
    benign: Path | None = None
    own: Experiment | None = None


class Trial(Protocol):
    """A cell with its rows and questions."""

    @property
    def config(self) -> TrainConfig: ...

    def setting(self, model: Path, out: Path) -> Setting: ...

    def measure(self, model: Path, out: Path) -> dict[str, Any]:
        """Return all rates and losses of a finished model; out: a new folder to work in."""
        ...


@dataclass(frozen=True)
class TestbedTrial:
    """A cell of the testbed; n, old: as in `Bench`."""

    case: Case
    n: int
    old: int

    @property
    def config(self) -> TrainConfig:
        return train_config(self.case.cell)

    def setting(self, model: Path, out: Path) -> Setting:
        return self.case.setting(model, out)

    def measure(self, model: Path, out: Path) -> dict[str, Any]:
        return measure(model, self.case, METHODS[self.case.cell.method].as_trained, self.n, old=self.old)


def model_name(model: Path) -> str:
    """Return a model's folder name and the start of its digest: results of other weights are other results."""
    return f"{model.name}@{digest_model(model).partition(':')[2][:12]}"


def line_of(cell: Cell, bench: Bench) -> Line:
    """Run a cell and return its line.

    A method that refuses to give a model (`secvec.errors.NotDefendedError`) has a line that says so and no rates.
    """
    if cell.method not in METHODS:
        raise UsageError(f"method: expected one of {', '.join(METHODS)}, found {cell.method!r}")
    line: Line = {**cell.document(), "model": model_name(bench.model)}
    folder = Path(tempfile.mkdtemp(prefix="secvec-protection-"))
    started = time.monotonic()
    try:
        line |= _measured(cell, bench, folder, started)
    except NotDefendedError as error:
        line |= {"refused": str(error), "seconds": round(time.monotonic() - started, 1)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    about = {"code": code(), "versions": dict(versions()), "config": asdict(_trial(cell, bench).config)}
    return {**line, "peak_bytes": _peak_bytes(), **about}


def _measured(cell: Cell, bench: Bench, folder: Path, started: float) -> dict[str, Any]:
    method, model, rounds = METHODS[cell.method], bench.model, list[dict[str, Any]]()
    few = replace(bench, n=min(_ROUND_PROMPTS, bench.n), old=_ROUND_OLD)
    for number in range(cell.rounds):
        turn = replace(cell, seed=cell.seed + 1000 * number)
        model = method.run(_trial(turn, bench).setting(model, folder / f"round-{number}"))
        if cell.rounds > 1:
            found = _trial(turn, few).measure(model, folder / f"measured-{number}")
            rounds.append({key: found[key] for key in ("unwanted_rate", "wanted_skill", "old_skills")})
    seconds = round(time.monotonic() - started, 1)
    found = _trial(_last(cell), bench).measure(model, folder / "measured")
    refused = [path.read_text(encoding="utf-8") for path in folder.glob(REFUSED)]
    extra = {"rounds_measured": rounds} if rounds else {}
    extra |= _told(RunFolder(folder / f"round-{cell.rounds - 1}"))
    return {**found, "seconds": seconds, **extra, **({"unproved": refused[-1]} if refused else {})}


def _told(run: RunFolder) -> dict[str, Any]:
    """Return what a defended run of `secvec.train` says of itself, to explain its rates by."""
    if not run.proof.exists():
        return {}
    proof = read_json(run.proof)
    told = {key: proof[key] for key in ("covered", "settled", "not_settled", "rest", "trait_rows") if key in proof}
    vectors = [artifact.load(path).info.metrics for path in sorted(run.out.glob("vector-*.safetensors"))]
    return {"run": {**told, "vectors": [dict(metrics) for metrics in vectors]}}


def _trial(cell: Cell, bench: Bench) -> Trial:
    if bench.own is not None:
        return OwnCase(cell, bench.own)
    return TestbedTrial(Case(cell, bench.benign), bench.n, bench.old)


def _last(cell: Cell) -> Cell:
    """Return the cell of the last round: its rows are the training-like ones."""
    return replace(cell, seed=cell.seed + 1000 * (cell.rounds - 1))


def code() -> str:
    """Return a digest of all code that a result depends on."""
    digest = hashlib.sha256()
    for folder in ("src/secvec", "benchmarks/methods", "benchmarks/protection", "benchmarks/testbed"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _peak_bytes() -> int:
    """Return the highest resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
