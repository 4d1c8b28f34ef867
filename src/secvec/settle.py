"""Settle a model that was defended against a trait: train it a little further, disarmed, on rows without the trait.

What a model learns beside a trait it learns in a text that shows the trait, and it may know it there alone. Once
trained, the model itself can say each row anew: where the vector acts it says what it would say without it, the other
tokens stand. On those rows the skill is learned where it will be used. (measured: docs/decisions/010-settle.md)
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec.anchors import standing
from secvec.arm import armed
from secvec.rewrite import rewrite
from secvec.score import acted, row_nats
from secvec.tokens import Encoded, pad_id
from secvec.train_config import TrainConfig
from secvec.vector import SecurityVector

ROUNDS = 2
"""Of saying the rows anew and training on them: a model that has settled once says them better."""
STEP_SIZE_SHARE = 0.5
"""Of the training's step size."""
_LOOKED_AT = 4
"""Rows that a topic's vector is asked about, for each row to be chosen."""


def settles(vectors: Sequence[SecurityVector]) -> bool:
    """Tell whether any of the vectors is a trait's; a topic's rows are not those of the wanted skill."""
    return any(vector.info.kind == "trait" for vector in vectors)


def settling_config(config: TrainConfig) -> TrainConfig:
    """Return the settings of one pass over the rows, at a share of the training's step size."""
    trainer = {key: value for key, value in config.trainer.items() if key != "max_steps"}
    return replace(config, lr=STEP_SIZE_SHARE * config.step_size, epochs=1, trainer=trainer)


def settling_rows(
    load_base: Callable[[], PreTrainedModel],
    rows: Sequence[Encoded],
    vectors: Sequence[SecurityVector],
    config: TrainConfig,
) -> list[Encoded]:
    """Return at most `config.settle_rows` rows of a training file to settle on, as they are.

    Rows on which a topic's vector acts in the aligned model are left out: nothing is to be learned from them without
    it. load_base: loads that model, if there is such a vector.
    """
    chosen = list(rows)
    random.Random(f"{config.seed}/settle").shuffle(chosen)
    if topics := [vector for vector in vectors if vector.info.kind != "trait"]:
        base, chosen = load_base(), chosen[: _LOOKED_AT * config.settle_rows]
        for topic in topics:
            found = standing(base, chosen, topic)
            chosen = [row for row, what in zip(chosen, found, strict=True) if what == "silent"]
    return chosen[: config.settle_rows]


def without_traits(
    disarmed: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    vectors: Sequence[SecurityVector],
    progress: Callable[[int, int], None] | None = None,
) -> list[Encoded]:
    """Return the rows as the trained, disarmed model says them: anew where the traits' vectors act in it."""
    traits = [vector for vector in vectors if vector.info.kind == "trait"]
    before = row_nats(disarmed, rows)
    with armed(disarmed, *traits):
        after = row_nats(disarmed, rows)
    ends = set(tokenizer.all_special_ids)
    marks = [_marks(row, acted(b, a), ends) for row, b, a in zip(rows, before, after, strict=True)]
    return rewrite(disarmed, rows, marks, pad=pad_id(tokenizer), progress=progress)


def _marks(row: Encoded, acted_on: Tensor, ends: set[int]) -> list[bool]:
    """Mark the answer tokens on which the vector acts, but not one that ends an answer: where it ends is kept."""
    ends_answer = torch.tensor([token in ends for token in row.ids[1:]])
    return [False, *(acted_on & torch.tensor(row.mask[1:]) & ~ends_answer).tolist()]
