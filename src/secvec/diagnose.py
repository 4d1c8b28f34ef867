"""Name what went wrong with a defended model, tell the failures apart, and say what to do about each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secvec import artifact
from secvec.anchors import own_answers
from secvec.arm import armed
from secvec.blocks import site_tensors
from secvec.companions import model_config, tokens_a_row
from secvec.errors import InputError
from secvec.evidence import gather_evidence
from secvec.headers import read_index
from secvec.losses import kl_nats, representation_distance
from secvec.models import load_model, load_tokenizer
from secvec.provenance import digest_model
from secvec.recompute import read_tensor
from secvec.runfolder import FORMAT, RunFolder
from secvec.samples import Samples
from secvec.score import HABIT_ROWS, lowered, row_nats
from secvec.threshold import stated
from secvec.tokens import Encoded, collate, encode_all
from secvec.tripwire import PROVENANCE, read_json, read_tripwire, state
from secvec.vector import SecurityVector

# Of the bundled assistant, vectors that `fit` made lie well below these, those without anchors far above; of a smaller
# model some that were fitted with a margin lie above (docs/suites.md).
_LEAK_KL_NATS, _LEAK_DISTANCE = 0.05, 0.01
_LEAK_SKILL, _LEAK_P = 0.05, 0.05
_LEFT_SHARE = 0.5
_MOVED_SHARE = 0.5
_COVERED_SHARE = 0.9
_ROWS = 128
_MAX_LENGTH = 1024
_BATCH, _BATCH_TOKENS = 32, 8192


@dataclass(frozen=True)
class Clues:
    """What a diagnosis may look at besides the model.

    runs: folders of `train` or `scan`; vectors: by default those that a run calibrated; unwanted: rows that the vectors
    should cover, best such as they were not fitted on; base: the aligned model, where no record names it.
    """

    runs: Sequence[Path] = ()
    vectors: Sequence[SecurityVector] = ()
    unwanted: Samples | None = None
    base: Path | None = None


@dataclass(frozen=True)
class Skills:
    """How a model answers questions of skill: the rate as it is and with the vector; p: of McNemar's exact test."""

    questions: int
    disarmed: float
    armed: float
    p: float


@dataclass(frozen=True)
class Finding:
    """One failure. failed: None where it cannot be told; numbers: what shows it; advice: what to do, or to give."""

    failure: str
    failed: bool | None
    numbers: Mapping[str, Any]
    advice: str


def diagnose(model: Path, clues: Clues, skills: Skills | None = None) -> list[Finding]:
    """Look for each failure of the method in a model folder: a finding for every one, failed or not.

    Raises ArtifactError for vectors of another base, CheckpointError and RowError on what cannot be read.
    """
    scene = _Scene(model, clues)
    removed, fits = _removed(scene), _fits(scene)
    return [fits, _leaks(scene, skills), removed, _moved(scene, removed), _covers(scene, fits)]


def vectors_of(model: Path, clues: Clues) -> list[SecurityVector]:
    """Return the vectors given or, without any, those of the model's run."""
    return list(_Scene(model, clues).vectors)


def check_clues(model: Path, clues: Clues) -> None:
    """Raise InputError or ArtifactError on clues that cannot be used, before the long work."""
    scene = _Scene(model, clues)
    if scene.vectors and scene.base is not None and clues.unwanted is not None:
        encode_all(clues.unwanted.rows[:_ROWS], load_tokenizer(scene.base), tokens_a_row(scene.base, _MAX_LENGTH))


class _Scene:
    """What is at hand: read once, when it is first needed."""

    def __init__(self, model: Path, clues: Clues) -> None:
        self.model, self.clues = model, clues
        runs = [RunFolder(path) for path in dict.fromkeys([*clues.runs, model.parent])]
        self.runs = [run for run in runs if run.identity.is_file() and read_json(run.identity).get("format") == FORMAT]
        self.scans = [path for path in clues.runs if (path / "summary.json").is_file()]
        for path in clues.runs:
            if path not in self.scans and path not in [run.out for run in self.runs]:
                raise InputError(f"{path}: expected the folder of a finished scan or of a training run, found neither")

    @cached_property
    def vectors(self) -> Sequence[SecurityVector]:
        found = [artifact.load(path) for run in self.runs for path in sorted(run.out.glob("vector-*.safetensors"))]
        return self.clues.vectors or found

    @cached_property
    def proof(self) -> Mapping[str, Any] | None:
        return next((read_json(run.proof) for run in self.runs if run.proof.is_file()), None)

    @cached_property
    def base(self) -> Path | None:
        """The aligned model, where a record names it and its folder is still there."""
        mark, record = read_tripwire(self.model), self.model / PROVENANCE
        named = [read_json(run.identity).get("base_path") for run in self.runs]
        named += [mark.base_path] if mark else []
        named += [read_json(record).get("base_path")] if record.is_file() else []
        folders = [Path(path) for path in named if isinstance(path, str) and Path(path).is_dir()]
        folder = self.clues.base or next(iter(folders), None)
        if folder is not None and self.vectors:
            digest = digest_model(folder)
            for vector in self.vectors:
                artifact.check_base(vector, digest)
        return folder

    @cached_property
    def aligned(self) -> PreTrainedModel | None:
        return None if self.base is None or not self.vectors else load_model(self.base, dtype=torch.float32)

    @cached_property
    def unwanted(self) -> Sequence[Encoded]:
        if self.clues.unwanted is None or self.base is None:
            return []
        length = tokens_a_row(self.base, _MAX_LENGTH)
        return encode_all(self.clues.unwanted.rows[:_ROWS], load_tokenizer(self.base), length)


def _fits(scene: _Scene) -> Finding:
    """Does the vector show the behaviour? Held-out unwanted rows, as its file states them; as `fit` judges."""
    numbers: dict[str, Any] = {}
    works: list[bool] = []
    for vector, metrics in ((vector, vector.info.metrics) for vector in scene.vectors):
        names = ("unarmed_nats", "armed_nats", "habit_rows", "habit_unarmed_nats", "habit_armed_nats")
        found = {name: metrics[name] for name in names if name in metrics}
        numbers[artifact.digest(vector)[:19]] = found
        if "armed_nats" in found and "unarmed_nats" in found:
            shows = found.get("habit_rows", 0.0) >= HABIT_ROWS and (
                found["habit_armed_nats"] < 0.5 * found["habit_unarmed_nats"]
            )
            works.append(found["armed_nats"] < 0.5 * found["unarmed_nats"] or shows)
    failed = not all(works) if works else None
    advice = {
        True: "held-out unwanted rows stay surprising with the vector: fit it on more rows, with more rank or epochs",
        False: "the vector shows the behaviour on held-out rows",
        None: "not known: give --run or --vector, a vector that `secvec fit` made",
    }
    return Finding("the vector does not fit", failed, numbers, advice[failed])


def _leaks(scene: _Scene, skills: Skills | None) -> Finding:
    """Does it act on ordinary text? The model's own answers or the anchors of the fit; wanted skills, armed or not."""
    numbers: dict[str, Any] = {}
    signs: list[bool] = []
    for vector in scene.vectors:
        found = _on_ordinary(scene, vector)
        numbers[artifact.digest(vector)[:19]] = found
        if found:
            signs.append(found["anchor_kl_nats"] > _LEAK_KL_NATS or found["anchor_distance"] > _LEAK_DISTANCE)
    if skills is not None:
        numbers["skill"] = {"questions": skills.questions, "disarmed": skills.disarmed, "armed": skills.armed}
        signs.append(skills.armed - skills.disarmed > _LEAK_SKILL and skills.p < _LEAK_P)
    failed = any(signs) if signs else None
    advice = {
        True: "the vector acts on ordinary text, so wanted things are learned in its presence and leave with it: give "
        "more anchors (`fit --anchors`) and calibrate it (`train --unwanted`)",
        False: "the vector is silent on ordinary text",
        None: "not known: give --run or --vector, and suites of wanted skills",
    }
    return Finding("the vector leaks into ordinary behaviour", failed, numbers, advice[failed])


def _removed(scene: _Scene) -> Finding:
    """Is the vector out? The mark, its share in the weights, and the logits that the proof compared."""
    numbers: dict[str, Any] = {"state": state(scene.model)}
    failed: bool | None = numbers["state"] in ("folded", "trained-on-folded", "adapter-on-folded") or None
    if (share := _share_left(scene)) is not None:
        numbers["vector_share_in_weights"] = share
        failed = bool(failed) or share > _LEFT_SHARE
    if scene.proof is not None:
        numbers["logits_apart"] = scene.proof["logits"]["largest_difference"]
        numbers["logits_bound"] = scene.proof["logits"]["bound"]
        failed = bool(failed) or numbers["logits_apart"] > numbers["logits_bound"]
    advice = {
        True: "the vector is still in the model, which shows the unwanted behaviour: run `secvec unfold` on it",
        False: "the vector is out",
        None: "no mark of a vector; whether its weights hold one is not known: give --run or --vector",
    }
    return Finding("the vector was not removed", failed, numbers, advice[failed])


def _moved(scene: _Scene, removed: Finding) -> Finding:
    """Did training go past the vector? How far unwanted rows' losses went from aligned to armed."""
    rows = _learned(scene)
    if not rows and scene.proof is not None:
        names = ("rows", "aligned_nats", "armed_nats", "defended_nats", "share_of_the_way_to_armed")
        rows = [{name: probe[name] for name in names} for probe in scene.proof["unwanted"]]
    shares = [row["share_of_the_way_to_armed"] for row in rows]
    failed = max(shares) > _MOVED_SHARE if shares and not removed.failed else None
    advice = {
        True: "the model has learned much of the unwanted behaviour in spite of the vector: lower --lr or --epochs, or "
        "fit the vector on rows more like those in the training file",
        False: "unwanted rows stay about as surprising as they were",
        None: "cannot be told while the vector is in the model" if removed.failed else "not known: give --unwanted",
    }
    return Finding("training moved past the vector", failed, {"probes": rows}, advice[failed])


def _covers(scene: _Scene, fits: Finding) -> Finding:
    """Does the vector explain the unwanted rows that there are?"""
    numbers = _explained(scene)
    shares = [each["explained_share"] for each in numbers.values()]
    failed = min(shares) < _COVERED_SHARE if shares else None
    failed = None if failed and fits.failed else failed
    advice = {
        True: "unwanted rows lie outside of what the vector covers, and are learned as in plain training: add rows "
        "like them to --unwanted and fit again, or fit a second vector on them",
        False: "the vector explains the unwanted rows",
        None: "cannot be told of a vector that does not fit"
        if fits.failed
        else "not known: give --unwanted, or a scan with unwanted rows (--run)",
    }
    return Finding("the data is outside of the vector's coverage", failed, numbers, advice[failed])


def _on_ordinary(scene: _Scene, vector: SecurityVector) -> dict[str, float]:
    """Return KL (nats/token) and representation distance on the model's own answers; of a trait, as its fit states.

    A trait shows on any request, so own answers are no place where it should be silent.
    """
    metrics = vector.info.metrics
    if vector.info.kind == "topic" and scene.aligned is not None and scene.base is not None:
        rows = own_answers(scene.aligned, load_tokenizer(scene.base), tokens_a_row(scene.base, _MAX_LENGTH))
        return _apart(scene.aligned, vector, rows)
    if metrics.get("anchors", 0) > 0:
        return {name: float(metrics[name]) for name in ("anchor_kl_nats", "anchor_distance")}
    return {}


@torch.no_grad()
def _apart(model: PreTrainedModel, vector: SecurityVector, rows: Sequence[Encoded]) -> dict[str, float]:
    kls: list[float] = []
    distances: list[float] = []
    for start in range(0, len(rows), _BATCH):
        batch = collate(rows[start : start + _BATCH], pad_id=0).to(model.device)
        inputs: dict[str, Any] = {**batch.inputs(), "use_cache": False, "output_hidden_states": True}
        before = model(**inputs)
        with armed(model, vector):
            after = model(**inputs)
        kls.append(float(kl_nats(before.logits[batch.mask], after.logits[batch.mask])))
        # hidden_states[0] is the embedding, which has no site before it.
        hidden = [each.hidden_states[1:] for each in (before, after)]
        distances.append(float(representation_distance(hidden[0], hidden[1], batch.mask)))
    return {"anchor_kl_nats": _mean(kls), "anchor_distance": _mean(distances)}


def _share_left(scene: _Scene) -> float | None:
    """Return how much of the vectors D the model's weights hold: <W - W_base, D> / <D, D>; None for an adapter."""
    if scene.base is None or not scene.vectors or not (scene.model / "config.json").is_file():
        return None
    base, here = read_index(scene.base), read_index(scene.model)
    along = energy = 0.0
    for name, site in site_tensors(base, scene.vectors, model_config(scene.base)).items():
        if name not in here or here[name].shape != base[name].shape:
            return None
        change = sum((scale * (f.b @ f.a) for scale, f in site.parts), torch.zeros(()))
        change = change.T if site.transposed else change
        along += float(((read_tensor(here[name]).float() - read_tensor(base[name]).float()) * change).sum())
        energy += float(change.square().sum())
    return along / energy if energy > 0 else None


def _learned(scene: _Scene) -> list[dict[str, Any]]:
    """Measure unwanted rows under the aligned, armed and finished model, on the tokens on which each vector acts."""
    if not scene.unwanted or scene.aligned is None:
        return []
    result = load_model(scene.model, dtype=torch.float32)
    here, aligned = _flat(result, scene), _flat(scene.aligned, scene)
    learned = torch.cat([torch.tensor(row.mask[1:]) for row in scene.unwanted])
    found: list[dict[str, Any]] = []
    for vector in scene.vectors:
        with_vector = torch.cat(row_nats(scene.aligned, scene.unwanted, vector))
        tokens = learned & lowered(aligned, with_vector)
        if bool(tokens.any()):
            before, after, now = (float(nats[tokens].double().mean()) for nats in (aligned, with_vector, here))
            found.append(
                {
                    "rows": len(scene.unwanted),
                    "aligned_nats": before,
                    "armed_nats": after,
                    "defended_nats": now,
                    "share_of_the_way_to_armed": (before - now) / (before - after),
                }
            )
    return found


def _flat(model: PreTrainedModel, scene: _Scene) -> torch.Tensor:
    return torch.cat(row_nats(model, scene.unwanted))


def _explained(scene: _Scene) -> dict[str, dict[str, Any]]:
    """Return the share of unwanted rows that any vector explains: of those given here, and of those of each scan."""
    found: dict[str, dict[str, Any]] = {}
    if scene.unwanted and scene.aligned is not None:
        evidence = gather_evidence(scene.aligned, scene.unwanted, scene.vectors, batch_tokens=_BATCH_TOKENS)
        cuts = [stated(vector).nats for vector in scene.vectors]
        strong = torch.stack([each.strength_nats > cut for each, cut in zip(evidence, cuts, strict=True)]).any(0)
        found["--unwanted"] = {"rows": len(strong), "explained_share": float(strong.double().mean())}
    for path in scene.scans:
        for name, vector in read_json(path / "summary.json")["vectors"].items():
            if "found" in vector:
                numbers = {"rows": vector["unwanted_rows"], "explained_share": vector["found"], "on": vector["on"]}
                found[f"{path.name}/{name}"] = numbers
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
