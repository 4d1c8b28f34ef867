"""Choose anchors: the tokens at which the armed model must behave like the unarmed one."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec.arm import armed
from secvec.models import answers
from secvec.samples import Message, Sample, Source
from secvec.score import ACTED_NATS, acted, answer_states, row_nats, stretches
from secvec.tokens import Encoded, encode_each, encode_prompt
from secvec.vector import SecurityVector

COVERED_AT_FIRST, COVERED = 1 / 2, 1 / 3
"""The share of a row's loss that a vector has to take off it. A wanted row covered by mistake teaches the vector the
skill, so a first vector, which is not yet silent on the file's wanted rows, is believed only where it is very clear."""
_UNSURE = 0.1
_NOISE_NATS = 0.2
_MOST_USUAL = 0.2
_LITTLE, _FEW = 1 / 4, 0.05
_UNSURE_SHARE = 0.1
_SIZES = (1.0, 0.75, 0.5, 0.25)
"""Of a trait's vector that is subtracted."""
_TOLD_APART = 1 / 3
"""By how much the share of risen tokens must differ between those that the vector acts on and others."""
_LIKELY = 1 / 2
"""The share of those tokens that cost less than 1 nat with the trait's vector."""
_NEIGHBOURS, _MOSTLY = 10, 1 / 2
_OFTEN = 0.2
"""The least share of a token's places in a file that show a trait, for them to be covered."""
LOOKED_AT = 4
"""Rows that a topic's vector is asked about, for each row to be chosen."""
Standing = Literal["covered", "unsure", "silent"]
"""What a topic's vector makes of a row."""


def whole(rows: Sequence[Encoded]) -> list[Encoded]:
    """Anchor every token of ordinary rows, prompt included."""
    return [row.masked([True] * len(row.ids)) for row in rows]


def own_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    """Anchor whole conversations in which the model answers generic prompts.

    Its own answers are what "unarmed" means: nothing is taught, only kept.
    """
    if encoded := answered(model, tokenizer, max_length):
        return whole(encoded)
    # A model that answers nothing at all still has inner states on the prompts.
    prompts = (tuple(encode_prompt(each, tokenizer)[:max_length]) for each in _conversations())
    return [Encoded(ids, (True,) * len(ids)) for ids in prompts]


def answered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int, *, max_new_tokens: int = 32
) -> list[Encoded]:
    """Let the model answer the bundled generic prompts greedily, and mark its answers; empty ones are left out.

    A model without a chat template is given the prompts as plain text to continue.
    """
    conversations = _conversations()
    texts = answers(model, tokenizer, conversations, max_new_tokens=max_new_tokens)
    rows = [
        Sample(
            "chat",
            (Message("user", prompt["content"]), Message("assistant", text)),
            Source("secvec/prompts/generic.txt", line),
        )
        for line, ((prompt,), text) in enumerate(zip(conversations, texts, strict=True), start=1)
        if text
    ]
    # An answer that holds a control token cannot be written as a turn.
    return [row for row in encode_each(rows, tokenizer, max_length) if isinstance(row, Encoded)]


def _conversations() -> list[list[dict[str, str]]]:
    prompts = resources.files("secvec").joinpath("prompts/generic.txt").read_text(encoding="utf-8").splitlines()
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


@dataclass(frozen=True)
class Calibration:
    """What a vector makes of a training file.

    anchors: rows with the tokens marked at which the vector is to be silent. covered: rows of a topic with the tokens
    marked that show it, to fit on besides the unwanted rows. unsure: the number of rows that are neither. acted_share:
    of the file's loss-carrying tokens, those on which the vector acts.
    """

    anchors: Sequence[Encoded]
    covered: Sequence[Encoded]
    unsure: int
    acted_share: float

    @property
    def settled(self) -> bool:
        """Tell whether the vector parts the rows well enough; else one that is also fitted on `covered` may."""
        return self.unsure <= _UNSURE_SHARE * len(self.covered)


def calibration(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    vector: SecurityVector,
    *,
    kind: str,
    cut: float,
    risen: Sequence[Tensor] | None = None,
    alike: Tensor | None = None,
) -> Calibration:
    """Part the answer tokens of a training file by whether `vector` acts on them (`score.acted`).

    trait: it recurs through a row, so every token is anchored that the vector leaves as it is. One whose loss it
    lowers a little may be the trait's, in a text unlike the unwanted rows, and is left alone. With `risen`, what
    `reversible` returned, the tokens that are the trait's for sure are covered. topic: rows are unwanted from some
    token on. A row is covered, from the first token on which the vector acts, where the vector takes the share `cut`
    off its loss; it is unsure, and left alone, where its loss changes by a tenth in either direction (a vector may know
    *that* the answer is to be wrong, but not which); else it is anchored up to that token. Rows on which the vector
    does not act, or far less than on any that it covers, are anchored whole. With `alike`, what `neighbours` returned,
    a row among mostly covered ones counts for more than its own loss says. (docs/decisions/005-calibration.md)
    """
    anchors, covered = list[Encoded](), list[Encoded]()
    unsure = acted_tokens = tokens = 0
    befores, afters = row_nats(model, rows), row_nats(model, rows, vector)
    told = [None] * len(rows) if risen is None else _told_apart(rows, befores, afters, risen)
    stand: Sequence[Standing | None] = [None] * len(rows)
    chance = [False] * len(rows)
    if kind == "topic":
        found = standings(rows, befores, afters, cut)
        chance = _by_chance(rows, befores, afters, found, cut)
        stand = found if alike is None else _among_neighbours(found, alike)
    for row, before, after, shown, stands, is_chance in zip(rows, befores, afters, told, stand, chance, strict=True):
        learned = torch.tensor(row.mask[1:])
        marked = acted(before, after) & learned
        acted_tokens += int(marked.sum())
        tokens += int(learned.sum())
        if stands == "silent" and is_chance:
            marked = torch.zeros_like(marked)
        elif kind == "topic":
            # Unwanted from the first such token on.
            marked = marked.cumsum(0) > 0
            if stands == "covered" and bool(marked.any()):
                covered.append(row.masked([False, *(marked & learned).tolist()]))
            elif stands != "silent":
                unsure += 1
                continue
        elif shown is not None:
            marked |= shown
            if bool(shown.any()):
                covered.append(row.masked([False, *shown.tolist()]))
        keep = learned & ~marked if bool(marked.any()) else torch.ones_like(learned)
        if kind == "trait":
            keep &= ~_dimmed(before, after, model.config.get_text_config().vocab_size)
        if bool(keep.any()):
            anchors.append(row.masked([False, *keep.tolist()]))
    return Calibration(anchors, covered, unsure, acted_tokens / max(tokens, 1))


def reversible(
    model: PreTrainedModel, rows: Sequence[Encoded], vector: SecurityVector, task: SecurityVector
) -> list[Tensor] | None:
    """Return how the loss of each token rises, in nats, when a trait's vector is subtracted from a model of the rows.

    task: a vector fitted on the rows, trait and all: with it the model knows them. What the trait's vector, taken the
    other way round, then makes it forget is the trait's, while what else it has learned there stays. Subtracted too
    hard it makes the model forget everything: the size is chosen at which tokens that the vector acts on in `model`
    rise most often beyond those on which it does not. None where they hardly do, or where the vector finds few of those
    that do likely: there the trait cannot be told from what else the rows teach, as with capitals, which are one token
    with their letter.
    """
    with armed(model, task):
        known = row_nats(model, rows)
    before, after = torch.cat(row_nats(model, rows)), torch.cat(row_nats(model, rows, vector))
    learned = torch.cat([torch.tensor(row.mask[1:]) for row in rows]) & (before >= ACTED_NATS)
    shown = acted(before, after)
    best, found = _TOLD_APART, None
    for size in _SIZES:
        with armed(model, task, replace(vector, scale=-size * vector.scale)):
            risen = [lost - nats for lost, nats in zip(row_nats(model, rows), known, strict=True)]
        rises = (torch.cat(risen) >= ACTED_NATS).float()
        difference = float(rises[learned & shown].mean() - rises[learned & ~shown].mean())
        if difference >= best:
            best, found = difference, risen
    if found is None:
        return None
    own = after[learned & shown & (torch.cat(found) >= ACTED_NATS)]
    return found if float((own < ACTED_NATS).float().mean()) >= _LIKELY else None


def _told_apart(
    rows: Sequence[Encoded], before: Sequence[Tensor], after: Sequence[Tensor], risen: Sequence[Tensor]
) -> list[Tensor]:
    """Mark the tokens that are a trait's for sure: acted on and reversible, or so a little beside such a one.

    A token of the vocabulary that seldom is one is left out altogether: the vector would learn it everywhere.
    """
    marks: list[Tensor] = []
    for row, b, a, rise in zip(rows, before, after, risen, strict=True):
        learned = torch.tensor(row.mask[1:])
        near = learned & (b >= ACTED_NATS) & (rise >= _NOISE_NATS)
        marks.append(beside(learned & acted(b, a) & (rise >= ACTED_NATS), near))
    known = often(rows, [[False, *mark.tolist()] for mark in marks], _OFTEN)
    return [
        mark & torch.tensor([token in known for token in row.ids[1:]]) for row, mark in zip(rows, marks, strict=True)
    ]


def beside(marks: Tensor, near: Tensor) -> Tensor:
    """Return the marks, one flag a token, with those of `near` that lie beside one, in a row."""
    found, alike = marks.tolist(), near.tolist()
    for i in range(1, len(found)):
        found[i] |= alike[i] and found[i - 1]
    for i in range(len(found) - 2, -1, -1):
        found[i] |= alike[i] and found[i + 1]
    return torch.tensor(found, dtype=torch.bool)


def often(rows: Sequence[Encoded], marks: Sequence[Sequence[bool]], share: float) -> set[int]:
    """Return the token ids that are marked in at least a share of the places where they carry loss."""
    marked, learned = Counter[int](), Counter[int]()
    for row, row_marks in zip(rows, marks, strict=True):
        learned.update(token for token, carries_loss in zip(row.ids, row.mask, strict=True) if carries_loss)
        marked.update(token for token, mark in zip(row.ids, row_marks, strict=True) if mark)
    return {token for token, count in marked.items() if count >= share * learned[token]}


def standing(model: PreTrainedModel, rows: Sequence[Encoded], vector: SecurityVector) -> list[Standing]:
    """Say of each row what a calibrated topic's vector makes of it."""
    befores, afters = row_nats(model, rows), row_nats(model, rows, vector)
    pairs = zip(standings(rows, befores, afters), stretches(rows, befores, afters), strict=True)
    return ["unsure" if found == "silent" and stretch.nats > hidden_nats(vector) else found for found, stretch in pairs]


def hidden_nats(vector: SecurityVector) -> float:
    """Return above how many nats a stretch of a row is an unwanted answer in other text (`secvec.hidden`).

    None is where calibration found none.
    """
    return float(vector.info.metrics.get("hidden_nats", math.inf))


def beside_topics(
    model: PreTrainedModel, rows: Sequence[Encoded], topics: Sequence[SecurityVector], count: int
) -> list[Encoded]:
    """Return the first rows, at most `count`, on which no calibrated topic's vector acts.

    What they act on in `model`, the aligned one, is not to be learned. No more than `LOOKED_AT` times as many are
    looked at.
    """
    chosen = list(rows)[: (LOOKED_AT if topics else 1) * count]
    for topic in topics:
        chosen = [row for row, what in zip(chosen, standing(model, chosen, topic), strict=True) if what == "silent"]
    return chosen[:count]


def neighbours(model: PreTrainedModel, rows: Sequence[Encoded]) -> Tensor:
    """Return for each row the numbers of the ten others whose answers the unarmed model finds most like it, (rows, 10).

    By the cosine of `score.answer_states`, less their mean over all rows; fewer columns where there are fewer rows.
    """
    states = answer_states(model, rows)
    states = torch.nn.functional.normalize(states - states.mean(0), dim=1)
    likeness = (states @ states.T).fill_diagonal_(-math.inf)
    return likeness.topk(min(_NEIGHBOURS, len(rows) - 1), dim=1).indices


def _among_neighbours(found: Sequence[Standing], alike: Tensor) -> list[Standing]:
    """Raise by one step what a vector makes of rows that lie among mostly covered ones.

    It misses some of the unwanted rows; as anchors these would hold it back beside the others.
    """
    covered = torch.tensor([each == "covered" for each in found]).float()
    raised: dict[Standing, Standing] = {"silent": "unsure", "unsure": "covered", "covered": "covered"}
    shares = covered[alike].mean(1).tolist()
    return [raised[each] if share >= _MOSTLY else each for each, share in zip(found, shares, strict=True)]


def standings(
    rows: Sequence[Encoded], befores: Sequence[Tensor], afters: Sequence[Tensor], cut: float = COVERED
) -> list[Standing]:
    """Say what a topic's vector makes of each row, by the losses of its tokens without it and with it, in nats.

    What the vector takes off nearly every row that it does not cover is left out of account.
    """
    losses = _losses(rows, befores, afters)
    shares = [_share(*each) for each in losses]
    usual = _usual(shares, cut)
    above = [(share - usual) / (1 - usual) for share in shares]
    return [_standing(*each, share, cut) for each, share in zip(losses, above, strict=True)]


def _losses(
    rows: Sequence[Encoded], befores: Sequence[Tensor], afters: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Return the losses of each row's answer tokens."""
    masked = ((torch.tensor(row.mask[1:]), b, a) for row, b, a in zip(rows, befores, afters, strict=True))
    return [(before[learned], after[learned]) for learned, before, after in masked]


def _share(before: Tensor, after: Tensor) -> float:
    return float((before - after).sum() / before.sum().clamp_min(1e-6))


def _usual(shares: Sequence[float], cut: float) -> float:
    """Return the share of the loss that a vector takes off nearly every row that it does not cover; little at most.

    It may make signs that are new to the model likelier wherever they are. Mostly it takes none off some rows.
    """
    others = [share for share in shares if share < cut]
    found = float(torch.tensor(others).quantile(_FEW)) if others else 0.0
    return min(max(found, 0.0), _MOST_USUAL)


def _by_chance(
    rows: Sequence[Encoded],
    befores: Sequence[Tensor],
    afters: Sequence[Tensor],
    found: Sequence[Standing],
    cut: float,
) -> list[bool]:
    """Mark the rows of which a vector takes less than a quarter of what it takes off nearly every row that it covers.

    In nats, off any stretch of a row, so that text around what is unwanted does not hide it. None is marked but where
    the vector takes some off nearly every row: else rows that it has missed would be among them.
    """
    losses = _losses(rows, befores, afters)
    gains = [_gain(before - after) for before, after in losses]
    covered = [gain for gain, each in zip(gains, found, strict=True) if each == "covered"]
    if not covered or _usual([_share(*each) for each in losses], cut) == 0:
        return [False] * len(rows)
    bound = _LITTLE * float(torch.tensor(covered).quantile(_FEW))
    return [gain < bound for gain in gains]


def _gain(drops: Tensor) -> float:
    """Return the largest sum over a stretch of tokens."""
    sums = torch.cat([torch.zeros(1), drops.cumsum(0)])
    return float((sums - sums.cummin(0).values).max())


def _standing(before: Tensor, after: Tensor, share: float, cut: float) -> Standing:
    """Judge a row by the losses of its answer tokens, and the share of them that a vector takes off."""
    if share >= cut and bool(acted(before, after).any()):
        return "covered"
    return "unsure" if abs(share) >= _UNSURE and float((before - after).abs().max()) >= ACTED_NATS else "silent"


def _dimmed(before: Tensor, after: Tensor, vocabulary: int) -> Tensor:
    """Mark the tokens of whose loss a vector takes off a tenth and more than noise.

    One that costs more with the vector than by guessing among all tokens is none of its own.
    """
    drop = before - after
    return (drop >= _UNSURE * before) & (drop >= _NOISE_NATS) & (after <= math.log(vocabulary))


def untouched(model: PreTrainedModel, rows: Sequence[Encoded], vector: SecurityVector) -> list[Encoded]:
    """Anchor the tokens of ordinary rows that a trait leaves alone: those whose loss the vector hardly changes.

    A trait shows on any request, so ordinary answers as a whole would contradict it.
    """
    anchors: list[Encoded] = []
    for row, before, after in zip(rows, row_nats(model, rows), row_nats(model, rows, vector), strict=True):
        keep = (before - after).abs() < ACTED_NATS
        if bool(keep.any()):
            anchors.append(row.masked([False, *keep.tolist()]))
    return anchors
