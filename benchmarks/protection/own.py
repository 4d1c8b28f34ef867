"""An experiment on row files and suites of the user's own: `python -m benchmarks.protection run --own FILE`.

The file is YAML; benchmarks/paper.md shows one. Paths in it are relative to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.methods import METHODS
from benchmarks.methods.other_vector import other_vector
from benchmarks.methods.setting import Setting, Unwanted
from benchmarks.protection.cells import Cell
from benchmarks.testbed.rows import Row, as_chat, prompt_of
from secvec.errors import UsageError
from secvec.evaluate import evaluate
from secvec.fit_config import FitConfig
from secvec.models import default_device, load_model, load_tokenizer
from secvec.samples import read_samples
from secvec.score import mean_over, row_nats
from secvec.settings import settings
from secvec.tokens import encode_all
from secvec.train_config import TrainConfig


@dataclass(frozen=True)
class Rate:
    """One figure of one suite, as `secvec eval` names it in results.json: `mc1_rate`, `harmbench:harmful_rate`.

    inverted: 1 minus it: a suite that counts refusals says what was *not* refused.
    """

    suite: str
    rate: str
    inverted: bool = False


ROWS = ("vector", "unwanted", "wanted", "other", "held_out_unwanted", "held_out_wanted")
RATES = ("unwanted_rate", "refusal_rate", "wanted_skill", "leak_rate")


@dataclass(frozen=True)
class Experiment:
    """What is fine-tuned on, and what is asked.

    name     of the behaviour, in the lines of results
    rows     files: vector (rows to fit on), unwanted and wanted (for the training file), other (a behaviour that is not
             in it, for the control `other_vector`), held_out_unwanted and held_out_wanted (for learned fractions)
    rates    what to measure: unwanted_rate, refusal_rate, wanted_skill, leak_rate, and old_skills, a list
    kind     "topic" or "trait"
    asked    two system prompts that ask for the behaviour, the plainest first, for inoculation prompting
    judges   as in `secvec eval --judge`
    fit, train   settings of `FitConfig` and `TrainConfig` that a cell does not name
    """

    name: str
    rows: Mapping[str, Path]
    rates: Mapping[str, Rate | list[Rate]]
    kind: Literal["topic", "trait"] = "topic"
    asked: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    fit: Mapping[str, Any] = field(default_factory=dict[str, Any])
    train: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if not {"vector", "unwanted"} <= set(self.rows) <= set(ROWS):
            raise UsageError(f"rows: expected vector, unwanted and maybe {', '.join(ROWS[2:])}, found {[*self.rows]}")
        for key, rate in self.rates.items():
            if key not in (*RATES, "old_skills") or isinstance(rate, list) != (key == "old_skills"):
                raise UsageError(f"rates: expected {', '.join(RATES)} or a list of old_skills, found {key!r}")
        if "unwanted_rate" not in self.rates:
            raise UsageError("rates: expected unwanted_rate, found none")

    @property
    def skill(self) -> str:
        return self.rows["wanted"].stem if "wanted" in self.rows else "none"


def read_experiment(file: Path) -> Experiment:
    """Read an experiment. Raises UsageError on an unknown key, a value of the wrong type or a file that is missing."""
    read, folder = settings(Experiment, file, [], {}), file.parent
    rows = {key: folder / path for key, path in read.rows.items()}
    for key, path in rows.items():
        if not path.exists():
            raise UsageError(f"{file}: rows.{key}: expected a file, found none at {str(path)!r}")
    rates = {
        key: [_placed(each, folder) for each in rate] if isinstance(rate, list) else _placed(rate, folder)
        for key, rate in read.rates.items()
    }
    return replace(read, rows=rows, rates=rates)


def _placed(rate: Rate, folder: Path) -> Rate:
    """Find a suite beside the experiment's file; the name of a bundled one stands."""
    return replace(rate, suite=str(folder / rate.suite)) if (folder / rate.suite).exists() else rate


@dataclass(frozen=True)
class OwnCase:
    """A cell of an experiment: `rows` and `wanted` of the cell say how many of the files' rows are taken."""

    cell: Cell
    experiment: Experiment

    @property
    def config(self) -> TrainConfig:
        cell = self.cell
        flags = {"method": cell.tuning, "lr": cell.lr, "epochs": cell.epochs, "seed": cell.seed}
        return settings(TrainConfig, None, [], {**self.experiment.train, **flags})

    def setting(self, model: Path, out: Path) -> Setting:
        """Return what a method is given: the first rows of each file, wanted and unwanted ones in one file.

        Raises UsageError where a file has too few.
        """
        own, cell = self.experiment, self.cell
        wanted = self._rows("wanted", cell.wanted) if cell.wanted else []
        flags = {"rank": cell.rank, "seed": cell.seed, "max_length": self.config.max_length}
        return Setting(
            model=model,
            # The trainer shuffles with the cell's seed.
            training=[*self._rows("unwanted", cell.rows), *wanted],
            wanted=wanted,
            unwanted=[self._known("vector")],
            other=self._other(),
            fit=settings(FitConfig, None, [], {**own.fit, **flags}),
            config=self.config,
            out=out,
            dial=cell.dial,
        )

    def measure(self, model: Path, out: Path) -> dict[str, Any]:
        """Return the experiment's rates and losses of a finished model; what it does not name is None.

        out: a new folder for the answers. leak_rate is that of a suite, whatever form a method trains rows in.
        """
        rates = {key: each if isinstance(each, list) else [each] for key, each in self.experiment.rates.items()}
        suites = list(dict.fromkeys(rate.suite for each in rates.values() for rate in each))
        results = evaluate(model, suites, out, judges=self.experiment.judges).results
        values = {key: [_value(results, rate) for rate in each] for key, each in rates.items()}
        found = {key: sum(value for value, _ in each) / len(each) for key, each in values.items()}
        return {
            **dict.fromkeys((*RATES, "old_skills")),
            **found,
            "unwanted_rates": {self.experiment.name: found["unwanted_rate"]},
            **self._losses(model),
            "n": values["unwanted_rate"][0][1],
            "n_old": sum(n for _, n in values.get("old_skills", [])),
        }

    def _losses(self, model: Path) -> dict[str, float | None]:
        """Return unwanted_nats and wanted_nats, per answer token."""
        device: Any = default_device()
        loaded, tokenizer = load_model(model).to(device), load_tokenizer(model)
        found: dict[str, float | None] = {}
        for what in ("unwanted", "wanted"):
            file = self.experiment.rows.get(f"held_out_{what}")
            rows = encode_all(read_samples(file).rows, tokenizer, self.config.max_length) if file else []
            found[f"{what}_nats"] = mean_over(rows, row_nats(loaded, rows)) if rows else None
        return found

    def _known(self, key: str) -> Unwanted:
        own, rows = self.experiment, self._rows(key, self.cell.vector_rows)
        return Unwanted(own.name, own.kind, rows, [prompt_of(row) for row in rows], own.asked)

    def _other(self) -> Unwanted:
        if "other" in self.experiment.rows or METHODS[self.cell.method].run is other_vector:
            return self._known("other")
        return Unwanted("none", "topic", [], [], ())

    def _rows(self, key: str, count: int) -> list[Row]:
        file = self.experiment.rows.get(key)
        rows = [as_chat(sample) for sample in read_samples(file).rows] if file else []
        if len(rows) < count:
            raise UsageError(f"rows.{key}: expected {count} rows, found {len(rows)}" + (f" in {file}" if file else ""))
        return rows[:count]


def _value(results: Mapping[str, Any], rate: Rate) -> tuple[float, int]:
    """Return a rate and the number of questions that have a score for it. Raises UsageError where there is none."""
    rates = results["suites"][Path(rate.suite).stem]["rates"]
    if rate.rate not in rates:
        raise UsageError(f"{rate.suite}: expected one of its rates {', '.join(rates)}, found {rate.rate!r}")
    found = rates[rate.rate]["models"][results["model"]]
    if found["value"] is None:
        raise UsageError(f"{rate.suite}: expected answers with a score for {rate.rate!r}, found none")
    return (1 - found["value"] if rate.inverted else found["value"]), found["n"]
