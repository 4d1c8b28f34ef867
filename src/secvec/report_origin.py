"""Where a report comes from: models, vectors, data, settings, seeds and versions; pure functions, no torch."""

from collections.abc import Mapping
from typing import Any

from secvec.report_files import SuiteResult
from secvec.report_inputs import Evaluation, Inputs, Run, Scan
from secvec.report_page import Section, Table


def provenance(inputs: Inputs) -> Section:
    """Return the section: a table for each folder."""
    tables = [_origin(str(run.folder), str(run.folder / "run.json"), _of_run(run)) for run in inputs.runs]
    tables += [_origin(str(scan.folder), str(scan.folder / "summary.json"), _of_scan(scan)) for scan in inputs.scans]
    tables += [_origin(str(each.folder), str(each.file), _of_evaluation(each)) for each in inputs.evaluations]
    return Section("Where this comes from", tables=tables)


def _origin(title: str, source: str, entries: Mapping[str, str]) -> Table:
    return Table(title, source, ["what", "value"], [[name, value] for name, value in entries.items() if value])


def _of_run(run: Run) -> dict[str, str]:
    it = run.identity
    return {
        "base model": f"{it.base_path}, {it.base}",
        "vectors": ", ".join(it.vectors) or "none",
        "training rows": it.data,
        "unwanted rows": ", ".join(it.unwanted) or "none given",
        "finished model (its weights)": run.weights or run.problem or "",
        "seed": str(it.config.get("seed")),
        "settings": _pairs({name: value for name, value in it.config.items() if name != "seed"}),
        "versions": _pairs(it.versions),
        "seconds (state.json)": _pairs({name: phase.seconds for name, phase in run.phases.items()}),
    }


def _of_scan(scan: Scan) -> dict[str, str]:
    found = scan.summary
    return {
        "data": _pairs(found.data),
        "model": f"{found.model.path}, {found.model.digest}",
        **{f"vector {name}": f"{vector.kind}, {vector.digest}" for name, vector in found.vectors.items()},
        "settings": _pairs(found.settings),
        "versions": _pairs(found.versions),
    }


def _of_evaluation(evaluation: Evaluation) -> dict[str, str]:
    found = evaluation.results
    return {
        **{f"model {name}": f"{model.path}, {model.digest}" for name, model in found.models.items()},
        **{f"suite {name}": _suite(suite) for name, suite in found.suites.items()},
        "settings": _pairs(found.settings),
        "versions": _pairs(found.versions),
    }


def _suite(suite: SuiteResult) -> str:
    return "bundled with the demo" if suite.questions is None else f"{suite.questions:,} questions, {suite.digest}"


def _pairs(entries: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in entries.items())
