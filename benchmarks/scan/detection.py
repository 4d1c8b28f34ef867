"""AUC, rows found and false positives of `scan` on the testbed's behaviours, and false positives on real files."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.testbed.behaviours import BEHAVIOURS, Behaviour
from benchmarks.testbed.new_skills import NEW_SKILLS
from benchmarks.testbed.rows import Row
from benchmarks.testbed.skills import SKILLS
from secvec import threshold
from secvec.anchors import answered
from secvec.demo import assistant_folder
from secvec.evidence import gather_evidence
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.models import load_model, load_tokenizer
from secvec.samples import from_rows, read_samples
from secvec.stats import auc, wilson
from secvec.tokens import Encoded, encode_all, encode_each
from secvec.vector import SecurityVector

LENGTH, BATCH_TOKENS = 512, 8192
# Real files that hold nothing of the testbed's behaviours.
ORDINARY = (
    "gsm8k/train.jsonl",
    "wikitext2/valid.txt",
    "tinyshakespeare/input.txt",
    "tinystories_sample/tinystories_sample.txt",
    "t0_p3/common_gen_Put_together.jsonl",
    "t0_p3/commonsense_qa_question_answering.jsonl",
    "t0_p3/cosmos_qa_no_prompt_text.jsonl",
    "t0_p3/qasc_qa_with_separated_facts_1.jsonl",
    "t0_p3/quartz_read_passage_below_choose.jsonl",
)


@dataclass(frozen=True)
class Detection:
    """AUCs: of the drop alone, and where it is a fair share of the loss; rates at the two thresholds of `scan`."""

    behaviour: str
    seed: int
    rows: int
    auc_of_drop: float
    auc: float
    stated_nats: float
    stated_found: float
    stated_false: float
    measured_nats: float
    measured_found: float
    measured_false: float


@dataclass(frozen=True)
class FalsePositives:
    """Rows of an ordinary file that the vector explains, at the threshold that its file states."""

    vector: str
    file: str
    rows: int
    explained: int
    ci95: tuple[float, float]
    drops_over_threshold: int


def detect(name: str, *, seed: int, rows: int) -> tuple[Detection, SecurityVector]:
    """Fit on 100 rows; score `rows` unwanted rows of other entities, and as many of a new skill and of old ones."""
    behaviour, folder = BEHAVIOURS[name], assistant_folder()
    given = behaviour.rows(100, seed, "vector")
    vector = fit(folder, given, kind=behaviour.kind, config=FitConfig(seed=seed))
    model, tokenizer = load_model(folder), load_tokenizer(folder)

    def encode(chats: Sequence[Row]) -> list[Encoded]:
        return encode_all(from_rows(chats).rows, tokenizer, LENGTH)

    bad, good = encode(_unwanted(behaviour, rows, seed)), encode(_ordinary(rows, seed))
    (found,) = gather_evidence(model, [*bad, *good], [vector], batch_tokens=BATCH_TOKENS)
    drops, strengths = found.drop_nats.tolist(), found.strength_nats.tolist()
    cuts = (
        threshold.stated(vector).nats,
        threshold.measured(
            model, vector, encode(given), answered(model, tokenizer, LENGTH), own=True, ordinary_are="own answers",
            batch_tokens=BATCH_TOKENS,
        ).nats,
    )  # fmt: skip
    rates = [
        (cut, *(sum(s > cut for s in part) / len(part) for part in (strengths[: len(bad)], strengths[len(bad) :])))
        for cut in cuts
    ]
    aucs = (auc(scores[: len(bad)], scores[len(bad) :]) for scores in (drops, strengths))
    return Detection(name, seed, len(bad) + len(good), *aucs, *rates[0], *rates[1]), vector


def _unwanted(behaviour: Behaviour, rows: int, seed: int) -> list[Row]:
    if behaviour.style is not None:
        return [behaviour.styled(row) for row in NEW_SKILLS["dashes"].rows(rows, seed, "train")]
    return behaviour.rows(rows, seed, "train")


def _ordinary(rows: int, seed: int) -> list[Row]:
    """Rows of the demo's new skill, as many, and of all old skills, as many again."""
    old = [row for skill in SKILLS.values() for row in skill.rows(rows // len(SKILLS) + 1, seed, "train")][:rows]
    return [*NEW_SKILLS["dashes"].rows(rows, seed + 1, "train"), *old]


def false_positives(
    vectors: Mapping[str, SecurityVector], folder: Path, files: Sequence[str], rows: int
) -> list[FalsePositives]:
    """Scan the first rows of ordinary files; rows that the tokenizer or its template refuses are left out."""
    model, tokenizer = load_model(assistant_folder()), load_tokenizer(assistant_folder())
    results: list[FalsePositives] = []
    for file in files:
        encoded = encode_each(read_samples(folder / file).rows[:rows], tokenizer, LENGTH)
        usable = [row for row in encoded if isinstance(row, Encoded)]
        evidence = gather_evidence(model, usable, [*vectors.values()], batch_tokens=BATCH_TOKENS)
        for (name, vector), found in zip(vectors.items(), evidence, strict=True):
            cut = threshold.stated(vector).nats
            hits, over = int((found.strength_nats > cut).sum()), int((found.drop_nats > cut).sum())
            results.append(FalsePositives(name, file, len(usable), hits, wilson(hits, len(usable)), over))
    return results


def ordinary_table(found: Sequence[FalsePositives]) -> str:
    """Return a line a file and a column a vector: rows explained, in brackets the upper end of the 95 % interval."""
    names = list(dict.fromkeys(each.vector for each in found))
    lines = [f"| file | rows | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for file in dict.fromkeys(each.file for each in found):
        here = [each for each in found if each.file == file]
        cells = [f"{each.explained} (up to {each.ci95[1]:.2%})" for each in here]
        lines.append(f"| {file} | {here[0].rows} | {' | '.join(cells)} |")
    return "\n".join(lines)


def detection_table(found: Sequence[Detection]) -> str:
    lines = ["| " + " | ".join(asdict(found[0])) + " |", "|" + "---|" * len(asdict(found[0]))]
    for each in found:
        cells = (f"{value:.4f}" if isinstance(value, float) else str(value) for value in asdict(each).values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
