"""Losses of rows, token by token, unarmed and armed; which tokens a vector explains."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secvec.arm import armed
from secvec.losses import token_nats
from secvec.tokens import Encoded, collate
from secvec.vector import SecurityVector

ACTED_NATS = 1.0
ACTED_SHARE = 1 / 3
HABIT_ROWS = 0.9
_LEFT_SHARE = 0.1
_MOST_LOGITS = 2**28
"""At a time; a GiB in float32."""


def by_length(rows: Sequence[Encoded], batch_size: int, *, most_tokens: int | None = None) -> Iterator[list[int]]:
    """Yield batches of row numbers, rows of like length together, longest first.

    most_tokens: of a batch, padding included; a longer row has a batch of its own.
    """
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
        tokens = (len(batch) + 1) * len(rows[batch[0] if batch else i].ids)
        if len(batch) == batch_size or (batch and most_tokens is not None and tokens > most_tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def row_nats(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    vector: SecurityVector | None = None,
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Return each row's loss per token in nats, one (tokens - 1,) float32 tensor a row, in order.

    Entry t belongs to token t + 1. With a vector the model is armed with it for the measurement.
    """
    return _measured(model, rows, token_nats, vector, batch_size=batch_size, progress=progress)


def row_said(model: PreTrainedModel, rows: Sequence[Encoded]) -> list[Tensor]:
    """Mark each row's tokens that the model would say there itself, greedily: one (tokens - 1,) tensor a row, in order.

    Entry t belongs to token t + 1. Among signs that a model has hardly met, the likeliest may cost more than a nat.
    """
    return [each == torch.tensor(row.ids[1:]) for each, row in zip(row_choices(model, rows), rows, strict=True)]


def row_choices(model: PreTrainedModel, rows: Sequence[Encoded]) -> list[Tensor]:
    """Return the token that the model itself would say next at each place, greedily: one (tokens - 1,) tensor a row."""
    return _measured(model, rows, lambda logits, _: logits[:, :-1].argmax(-1))


def _measured(
    model: PreTrainedModel,
    rows: Sequence[Encoded],
    of: Callable[[Tensor, Tensor], Tensor],
    vector: SecurityVector | None = None,
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Return for each row what `of` makes of a batch's logits, (B, T, V), and ids, (B, T): a (B, T - 1) tensor."""
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    context: AbstractContextManager[None] = nullcontext() if vector is None else armed(model, vector)
    done, most_tokens = 0, _MOST_LOGITS // int(model.config.get_text_config().vocab_size)
    with context, torch.inference_mode():
        for chosen in by_length(rows, batch_size, most_tokens=most_tokens):
            batch = collate([rows[i] for i in chosen], pad_id=0).to(model.device)
            measured = of(model(**batch.inputs(), use_cache=False).logits, batch.ids).cpu()
            for i, each in zip(chosen, measured, strict=True):
                found[i] = each[: len(rows[i].ids) - 1].clone()
            done += len(chosen)
            if progress is not None:
                progress(done, len(rows))
    return found


@torch.inference_mode()
def answer_states(model: PreTrainedModel, rows: Sequence[Encoded], *, batch_size: int = 8) -> Tensor:
    """Return each row's hidden state half way up the model, the mean over its loss-carrying tokens.

    float32, (rows, hidden size).
    """
    states = [torch.empty(0)] * len(rows)
    for chosen in by_length(rows, batch_size):
        batch = collate([rows[i] for i in chosen], pad_id=0).to(model.device)
        layers = model(**batch.inputs(), use_cache=False, output_hidden_states=True).hidden_states
        for i, hidden, learned in zip(chosen, layers[len(layers) // 2], batch.mask, strict=True):
            states[i] = hidden[learned].float().mean(0).cpu()
    return torch.stack(states)


def mean_over(rows: Sequence[Encoded], losses: Sequence[Tensor]) -> float:
    """Return the mean loss in nats per loss-carrying token over all rows."""
    chosen = torch.cat([nats[torch.tensor(row.mask[1:])] for row, nats in zip(rows, losses, strict=True)])
    return float(chosen.double().mean())


def lowered(unarmed: Tensor, armed_losses: Tensor) -> Tensor:
    """Mark the tokens on which the vector acts: it lowers their loss by at least 1 nat."""
    return unarmed - armed_losses >= ACTED_NATS


def acted(unarmed: Tensor, armed_losses: Tensor) -> Tensor:
    """Mark the tokens on which the vector acts for what they are: it takes off at least 1 nat and a third of the loss.

    By chance it takes a nat off very surprising tokens, but rarely a third. A token need not be likely with it: a
    letter that the model cannot know yet, in a style that the vector has, is acted on. (measured: `docs/log.md`)
    """
    return lowered(unarmed, armed_losses) & (unarmed - armed_losses >= ACTED_SHARE * unarmed)


@dataclass(frozen=True)
class Stretch:
    """Tokens of an answer in a row, from `start` to before `stop`, that a vector all but explains.

    nats: of their loss without the vector, all but the most surprising token's, which is none by chance less often.
    """

    nats: float
    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


def stretches(rows: Sequence[Encoded], befores: Sequence[Tensor], afters: Sequence[Tensor]) -> list[Stretch]:
    """Return of each row the stretch of most loss that a vector explains, by the losses of all tokens, in nats.

    What is left with the vector counts ten times against it.
    """
    found = list[Stretch]()
    for row, before, after in zip(rows, befores, afters, strict=True):
        gains = torch.where(torch.tensor(row.mask[1:]), before - after / _LEFT_SHARE, 0.0)
        sums = torch.cat([torch.zeros(1), gains.cumsum(0)])
        stop = int((sums - sums.cummin(0).values).argmax())
        start = int(sums[: stop + 1].argmin())
        of = gains[start:stop]
        found.append(Stretch(float(of.sum() - of.max()) if len(of) else 0.0, start + 1, stop + 1))
    return found


@dataclass(frozen=True)
class Habit:
    """What a vector does to rows on the tokens on which it acts (`lowered`).

    rows: the share of rows with such a token; unarmed_nats, armed_nats: the mean loss of those tokens, per token.
    """

    rows: float
    unarmed_nats: float
    armed_nats: float

    @property
    def shows(self) -> bool:
        """Tell whether nearly every row shows the habit, and the vector makes it less than half as surprising."""
        return self.rows >= HABIT_ROWS and self.armed_nats < 0.5 * self.unarmed_nats


def habit(model: PreTrainedModel, rows: Sequence[Encoded], vector: SecurityVector) -> Habit:
    """Measure a trait that takes few of its rows' tokens: their mean loss is mostly that of ordinary tokens."""
    before, after = row_nats(model, rows), row_nats(model, rows, vector)
    acted = [
        lowered(unarmed, armed_nats) & torch.tensor(row.mask[1:])
        for row, unarmed, armed_nats in zip(rows, before, after, strict=True)
    ]
    marks = torch.cat(acted)
    if not bool(marks.any()):
        return Habit(0.0, 0.0, 0.0)
    share = sum(bool(mark.any()) for mark in acted) / len(acted)
    unarmed_nats, armed_nats = (float(torch.cat(losses)[marks].mean()) for losses in (before, after))
    return Habit(share, unarmed_nats, armed_nats)
