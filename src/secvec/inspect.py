"""Say what a file or folder is: vector, folded, defended, adapter, plain, a run, a demo."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secvec import artifact
from secvec.errors import InputError
from secvec.headers import read_index
from secvec.report_files import Results, load
from secvec.runfolder import DEMO, EVALUATION, SCAN, RunFolder
from secvec.sites import layer_of
from secvec.tripwire import PROVENANCE, State, read_json, read_tripwire, state

_MEANING: dict[State, str] = {
    "folded": "a model with a security vector in it: train on it, never serve it",
    "trained-on-folded": "trained with the vector still in it: run `secvec unfold` on it, never serve it",
    "adapter-on-folded": "an adapter that names a folded model as its base: run `secvec unfold` on it before use",
    "defended": "trained with a security vector in effect, which was taken out",
    "adapter": "an adapter; secvec knows nothing of how it was trained",
    "plain": "a model; secvec knows nothing of how it was trained",
    "not-a-model": "neither a vector's file, nor a model, adapter or run folder",
}


def inspect(path: str | Path) -> dict[str, Any]:
    """Return what `path` is and what is known about it, as a JSON document with `path`, `is` and `meaning`.

    Raises InputError when nothing is there, ArtifactError or CheckpointError when it is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: expected a file or folder, found nothing; check the path")
    if path.is_file():
        return _vector(path)
    if (identity := RunFolder(path).identity).is_file():
        return _scan(path) if read_json(identity).get("format") == SCAN else _run(path)
    found = read_json(path / "results.json") if (path / "results.json").is_file() else {}
    if found.get("format") == EVALUATION:
        return _evaluation(path)
    return _demo(path, found) if found.get("format") == DEMO else _model(path)


def _evaluation(path: Path) -> dict[str, Any]:
    found = load(Results, path / "results.json")
    document: dict[str, Any] = {"path": str(path), "is": "evaluation", "meaning": "a model judged beside others"}
    return document | {"models": list(found.models), "suites": list(found.suites)}


def _demo(path: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "path": str(path),
        "is": "demo",
        "meaning": "a finished demo: a vector, a plain and a defended run; `secvec report` makes a page of it",
        "vector": str(path / "vector.safetensors"),
        "runs": [str(path / name) for name in ("plain", "defended")],
        **{name: found.get(name) for name in ("seed", "aligned", "plain", "defended")},
    }


def _vector(path: Path) -> dict[str, Any]:
    vector = artifact.load(path)
    info = vector.info
    return {
        "path": str(path),
        "is": "vector",
        "meaning": artifact.NOTICE,
        "digest": artifact.digest(vector),
        "kind": info.kind,
        "sites": len(vector.sites),
        "layers": len({layer_of(site) for site in vector.sites}),
        "rank": max(factors.rank for factors in vector.factors.values()),
        "norm": round(vector.norm(), 4),
        "base": info.base,
        "data": info.data,
        "metrics": dict(info.metrics),
        "fit": dict(info.fit),
        "versions": dict(info.versions),
    }


def _scan(path: Path) -> dict[str, Any]:
    summary = path / "summary.json"
    found = read_json(summary) if summary.is_file() else {}
    return {
        "path": str(path),
        "is": "scan",
        "meaning": "a finished scan of a data file" if found else "a scan that was stopped: the same command goes on",
        **{name: found.get(name) for name in ("rows", "scored", "explained", "share")},
    }


def _run(path: Path) -> dict[str, Any]:
    run = RunFolder(path)
    phases = run.finished()
    results = [str(run.result(method)) for method in ("full", "lora") if run.result(method).is_dir()]
    done = "publish" in phases
    return {
        "path": str(path),
        "is": "run",
        "meaning": "a finished run" if done else "a run that was stopped: go on with `secvec train ... --resume`",
        "defended": run.proof.exists(),
        "phases": {name: phase.seconds for name, phase in phases.items()},
        "result": results[0] if results else None,
    }


def _model(path: Path) -> dict[str, Any]:
    what = state(path)
    document: dict[str, Any] = {"path": str(path), "is": what, "meaning": _MEANING[what]}
    mark = read_tripwire(path)
    if mark is not None:
        document |= {"vectors": list(mark.digests), "base": mark.base, "base_path": mark.base_path}
    if (path / PROVENANCE).exists():
        record = read_json(path / PROVENANCE)
        document |= {name: record.get(name) for name in ("kind", "base", "base_path", "vectors", "vector_share")}
    if (path / "config.json").exists():
        tensors = read_index(path).values()
        document |= {"tensors": len(tensors), "weight_bytes": sum(entry.end - entry.start for entry in tensors)}
        document["dtypes"] = sorted({entry.dtype for entry in tensors})
    return document
