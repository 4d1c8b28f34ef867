"""Settle a model that was defended against a trait: train it a little further, disarmed, on rows without the trait.

What a model learns beside a trait it learns in a text that shows the trait, and it may know it there alone. Once
trained, the model itself can say each row anew: where the vector acts it says what it would say without it, the other
tokens stand. On those rows the skill is learned where it will be used. (measured: docs/decisions/010-settle.md)
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec.anchors import beside, beside_topics, often
from secvec.arm import armed
from secvec.rewrite import Said, rewrite
from secvec.score import lowered, row_nats
from secvec.tokens import Encoded, pad_id
from secvec.train_config import TrainConfig
from secvec.vector import SecurityVector

ROUNDS = 3
"""Of saying the rows anew and training on them, at most."""
STEP_SIZE_SHARE = 0.25
"""Of the training's step size."""
ENOUGH = 0.1
"""Of the rows, to settle on."""
_KNOWN_SHARE = 0.99
"""Of the rows, said by the model without further training: then it has settled."""
_LOOKS = 3
"""At each row while it is said anew."""
_EXPLAINED_SHARE = 0.8
"""Of a token's loss that the vectors take off it in the trained model."""
_HESITANT_NATS = 0.2
"""That the vectors take off a token beside one that shows the trait, if it is a part of that."""
_MOSTLY = 0.5
"""The share of a token's places in the rows as they were that show the trait, for it to be looked for again."""
_LEAST_SEEN = 8
"""Places of a token, to judge one by the others."""


def settles(vectors: Sequence[SecurityVector]) -> bool:
    """Tell whether any of the vectors is a trait's; a topic's rows are not those of the wanted skill."""
    return any(vector.info.kind == "trait" for vector in vectors)


def settling_config(config: TrainConfig) -> TrainConfig:
    """Return the settings of one pass over the rows, at a share of the training's step size."""
    trainer = {key: value for key, value in config.trainer.items() if key != "max_steps"}
    return replace(config, lr=STEP_SIZE_SHARE * config.step_size, epochs=1, trainer=trainer)


def settling_rows(
    base: PreTrainedModel,
    rows: Sequence[Encoded],
    vectors: Sequence[SecurityVector],
    config: TrainConfig,
) -> list[Encoded]:
    """Return at most `config.settle_rows` rows of a training file to settle on, as they are.

    Rows on which a topic's vector acts in the aligned model are left out: nothing is to be learned from them without
    it. base: that model.
    """
    chosen = list(rows)
    random.Random(f"{config.seed}/settle").shuffle(chosen)
    topics = [vector for vector in vectors if vector.info.kind != "trait"]
    return beside_topics(base, chosen, topics, config.settle_rows)


def without_traits(
    disarmed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    vectors: Sequence[SecurityVector],
    progress: Callable[[int, int], None] | None = None,
) -> list[Encoded]:
    """Return the rows as the trained, disarmed model says them, where it is sure of it: anew where the traits show.

    A trait goes on where it has begun, so that some of its tokens are no surprise to the disarmed model: rows are
    looked at again once said, for tokens of which most showed the trait at first. A row that shows it after that, or
    in which the model had to guess or ends elsewhere too, is left out. None are returned where less than a tenth would
    be left: the model would learn those few by heart.
    """
    traits = [vector for vector in vectors if vector.info.kind == "trait"]
    ends = set(tokenizer.all_special_ids)
    said = [Said.as_it_is(row) for row in rows]
    shown = _shown(disarmed, rows, traits, ends)
    known = often(rows, shown, _MOSTLY)
    for _ in range(_LOOKS):
        said = rewrite(disarmed, said, shown, pad=pad_id(tokenizer), progress=progress)
        now = [each.row for each in said]
        shown = [
            [mark and token in known for token, mark in zip(row.ids, marks, strict=True)]
            for row, marks in zip(now, _shown(disarmed, now, traits, ends), strict=True)
        ]
    found = [
        each.row
        for each, marks, row in zip(said, shown, rows, strict=True)
        if not any(marks) and each.is_sure and _ended(each.row, ends) == _ended(row, ends)
    ]
    return found if len(found) >= ENOUGH * len(rows) else []


def _ended(row: Encoded, ends: set[int]) -> int:
    return sum(token in ends for token in row.ids)


def says(disarmed: PreTrainedModel, rows: Sequence[Encoded]) -> bool:
    """Tell whether the model says nearly all rows itself: each answer token with a probability of a half or more."""
    worst = [
        float(nats[torch.tensor(row.mask[1:])].max()) for row, nats in zip(rows, row_nats(disarmed, rows), strict=True)
    ]
    return sum(nats <= math.log(2) for nats in worst) >= _KNOWN_SHARE * len(rows)


def _as_mostly(rows: Sequence[Encoded], marks: Sequence[Sequence[bool]]) -> list[list[bool]]:
    """Mark a token where the same, after the same two or at least one, is mostly marked; a rare one as it was.

    A single look may miss a token of the trait, or take a wanted one for its own.
    """
    seen, marked = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    for row, row_marks in zip(rows, marks, strict=True):
        for place in _learned(row):
            after = _after(row, place)
            seen.update(after)
            marked.update(after if row_marks[place] else ())
    found = [list(row_marks) for row_marks in marks]
    for row, row_marks in zip(rows, found, strict=True):
        for place in _learned(row):
            known = next((after for after in _after(row, place) if seen[after] >= _LEAST_SEEN), None)
            if known is not None:
                row_marks[place] = 2 * marked[known] >= seen[known]
    return found


def _learned(row: Encoded) -> list[int]:
    return [place for place in range(1, len(row.ids)) if row.mask[place]]


def _after(row: Encoded, place: int) -> list[tuple[int, ...]]:
    """Return a token with the two before it, and with one."""
    return [row.ids[place - before : place + 1] for before in (2, 1) if before <= place]


def _shown(
    disarmed: PreTrainedModel, rows: Sequence[Encoded], traits: Sequence[SecurityVector], ends: set[int]
) -> list[list[bool]]:
    """Mark the answer tokens that the vectors all but explain, one that ends an answer excepted: where it ends is kept.

    A model that was trained with the vectors in effect finds the trait likely with them. What it has only begun to
    learn becomes likelier with them too, but not likely. A token beside such a one needs less.
    """
    before = row_nats(disarmed, rows)
    with armed(disarmed, *traits):
        after = row_nats(disarmed, rows)
    found: list[list[bool]] = []
    for row, b, a in zip(rows, before, after, strict=True):
        goes_on = torch.tensor([token not in ends for token in row.ids[1:]])
        explained = (b - a >= _EXPLAINED_SHARE * b) & torch.tensor(row.mask[1:]) & goes_on
        marks = beside(explained & lowered(b, a), explained & (b - a >= _HESITANT_NATS))
        found.append([False, *marks.tolist()])
    return _as_mostly(rows, found)
