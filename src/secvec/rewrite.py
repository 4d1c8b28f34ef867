"""Say rows anew: marked tokens are replaced by what a model itself would say there, the others stand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from secvec.tokens import Encoded, by_length


@dataclass(frozen=True)
class Said:
    """A row said anew. own: for each token whether the model chose it; the others stand as they were in the row."""

    row: Encoded
    own: Sequence[bool]


def rewrite(
    model: PreTrainedModel,
    rows: Sequence[Said],
    marks: Sequence[Sequence[bool]],
    *,
    pad: int,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Said]:
    """Return each row with its marked tokens generated greedily by `model`, after what it has said so far in the row.

    marks: for each row, one flag a token; the first token is never marked. Where the model says a token that comes
    later, marked or not, and at least half of those before it are marked, the row goes on from there: what lies between
    was not needed. So a row may become shorter, never longer. The model's tokens carry loss, the others as before. pad:
    the token to fill up with.
    """
    said = list(rows)
    chosen, done = [i for i, row_marks in enumerate(marks) if any(row_marks)], 0
    for batch in by_length([rows[i].row for i in chosen], batch_size):
        walks = [_Walk.start(rows[chosen[i]], marks[chosen[i]]) for i in batch]
        _generate(model, walks, pad)
        for i, walk in zip(batch, walks, strict=True):
            said[chosen[i]] = walk.said()
        done += len(batch)
        if progress is not None:
            progress(done, len(chosen))
    return said


@dataclass
class _Walk:
    """One row being said anew. place: the next token of the row that is to be copied or replaced."""

    source: Said
    marks: Sequence[bool]
    place: int
    ids: list[int]
    mask: list[bool]
    own: list[bool]

    @classmethod
    def start(cls, source: Said, marks: Sequence[bool]) -> "_Walk":
        row, first = source.row, list(marks).index(True)
        return cls(source, marks, first, list(row.ids[:first]), list(row.mask[:first]), list(source.own[:first]))

    @property
    def row(self) -> Encoded:
        return self.source.row

    @property
    def ended(self) -> bool:
        return self.place >= len(self.row.ids)

    def said(self) -> Said:
        return Said(Encoded(tuple(self.ids), tuple(self.mask), self.row.dropped_tokens), tuple(self.own))

    def step(self, said: int) -> int:
        """Append and return the next token; `said`: the model's own."""
        if not self.marks[self.place]:
            return self._append(self.row.ids[self.place], self.row.mask[self.place], self.source.own[self.place])
        if (place := self._further_on(said)) is not None:
            self.place = place
            return self._append(said, self.row.mask[place], True)
        return self._append(said, True, True)

    def _further_on(self, said: int) -> int | None:
        """Return the place where the row goes on as the model does, if little but marked tokens lie before it."""
        marked = 0
        for place in range(self.place, len(self.row.ids)):
            if self.row.ids[place] == said:
                return place if 2 * marked >= place - self.place else None
            marked += self.marks[place]
        return None

    def _append(self, token: int, carries_loss: bool, own: bool) -> int:
        self.ids.append(token)
        self.mask.append(carries_loss)
        self.own.append(own)
        self.place += 1
        return token


class _Steps(LogitsProcessor):
    """Let each walk choose the token that `generate` takes next."""

    def __init__(self, walks: Sequence[_Walk], pad: int) -> None:
        self._walks, self._pad = walks, pad

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V)
        said = scores.argmax(-1).tolist()
        taken = [self._pad if walk.ended else walk.step(own) for walk, own in zip(self._walks, said, strict=True)]
        only = torch.full_like(scores, float("-inf"))
        return only.scatter(1, torch.tensor(taken, device=scores.device)[:, None], 0.0)


def _generate(model: PreTrainedModel, walks: Sequence[_Walk], pad: int) -> None:
    longest = max(len(walk.ids) for walk in walks)
    ids = [[pad] * (longest - len(walk.ids)) + walk.ids for walk in walks]
    attention = [[0] * (longest - len(walk.ids)) + [1] * len(walk.ids) for walk in walks]
    with torch.no_grad():
        model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=torch.tensor(ids, device=model.device),
            attention_mask=torch.tensor(attention, device=model.device),
            max_new_tokens=max(len(walk.row.ids) - walk.place for walk in walks),
            do_sample=False,
            pad_token_id=pad,
            # A row goes on after an answer has ended: a token that the vocabulary lacks ends none.
            eos_token_id=int(model.config.get_text_config().vocab_size),
            logits_processor=LogitsProcessorList([_Steps(walks, pad)]),
        )
