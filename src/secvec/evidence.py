"""How much a vector lowers the losses of rows, and how strongly that speaks for the unwanted behaviour."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secvec.arm import armed
from secvec.score import by_length, row_nats
from secvec.tokens import Encoded
from secvec.vector import SecurityVector

LEAST_SHARE = 0.15
"""Of a row's loss that a vector has to take away to explain the row (docs/decisions/009)."""


@dataclass(frozen=True)
class Evidence:
    """What one vector does to each of n rows: (n,) mean losses in nats per loss-carrying token, float64."""

    unarmed_nats: Tensor
    armed_nats: Tensor

    @property
    def drop_nats(self) -> Tensor:
        return self.unarmed_nats - self.armed_nats

    @property
    def strength_nats(self) -> Tensor:
        """The drop where it is a fair share of the loss, else 0: a surprising row loses a lot by chance."""
        fair = self.drop_nats >= LEAST_SHARE * self.unarmed_nats
        return torch.where(fair, self.drop_nats, torch.zeros_like(self.drop_nats))


def gather_evidence(
    model: PreTrainedModel, rows: Sequence[Encoded], vectors: Sequence[SecurityVector], *, batch_tokens: int
) -> list[Evidence]:
    """Score rows unarmed once and armed with each vector alone; return one Evidence a vector, rows in order."""
    batches = list(by_length(rows, len(rows), most_tokens=batch_tokens))
    unarmed = _means(model, rows, None, batches)
    return [Evidence(unarmed, _means(model, rows, vector, batches)) for vector in vectors]


def _means(
    model: PreTrainedModel, rows: Sequence[Encoded], vector: SecurityVector | None, batches: Sequence[Sequence[int]]
) -> Tensor:
    means = torch.zeros(len(rows), dtype=torch.float64)
    context: AbstractContextManager[None] = nullcontext() if vector is None else armed(model, vector)
    with context:
        for batch in batches:
            chosen = [rows[i] for i in batch]
            # The vector is in effect already: `row_nats` would put it in and out for each batch.
            means[batch] = _row_means(chosen, row_nats(model, chosen, batch_size=len(batch)))
    return means


def _row_means(rows: Sequence[Encoded], losses: Sequence[Tensor]) -> Tensor:
    """Return the mean of each row's losses over its loss-carrying tokens, all rows at once."""
    mask = torch.tensor([carries for row in rows for carries in row.mask[1:]], dtype=torch.float64)
    row_of = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row.ids) - 1 for row in rows]))
    sums, tokens = torch.zeros(2, len(rows), dtype=torch.float64)
    return sums.index_add_(0, row_of, torch.cat(list(losses)).double() * mask) / tokens.index_add_(0, row_of, mask)
