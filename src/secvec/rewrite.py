"""Say rows anew: marked tokens are replaced by what a model itself would say there, the others stand.

Where the model is sure in many rows of what replaces a run of marked tokens, that replaces it in all.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from secvec.score import by_length, mean_over, row_nats
from secvec.tokens import Encoded

_AHEAD = 8
"""Unmarked tokens by which a place to go on from is judged."""
SURE_NATS = 0.25
"""The most that a token of the model's own may cost: it is said with a probability of 0.78 or more."""
_LEAST_VOTES, _AGREED = 8, 2 / 3
Run = tuple[int, ...]
"""Tokens that follow each other in a row, all marked; or what the model says instead of them."""


@dataclass(frozen=True)
class Said:
    """A row said anew. nats: what each token that the model chose cost the model then; 0 for those that stand."""

    row: Encoded
    nats: Sequence[float]

    @classmethod
    def as_it_is(cls, row: Encoded) -> "Said":
        return cls(row, (0.0,) * len(row.ids))

    @property
    def is_sure(self) -> bool:
        return max(self.nats) <= SURE_NATS


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

    marks: for each row, one flag a token; the first token is never marked. In a marked token's place the model says
    anything but that token. Where it says one that comes later, with at least half of those between marked, the row may
    go on from there: what lies between was not needed. Of several such places that one is taken after which the next
    unmarked tokens cost the model least. So a row may become shorter, never longer. The model's tokens carry loss, the
    others as before. pad: the token to fill up with.

    The rows that the model is sure of vote: where at least eight of them, and two thirds of those that could, have the
    same words in the place of the same tokens, the longest such tokens with a mark among them are so replaced in every
    row, where all of them carry loss: the prompt stands.
    """
    said = list(rows)
    chosen = [i for i, row_marks in enumerate(marks) if any(row_marks)]
    walks, done = [_Walk.start(rows[i], marks[i]) for i in chosen], 0
    for batch in by_length([rows[i].row for i in chosen], batch_size):
        _generate(model, [walks[i] for i in batch], pad)
        done += len(batch)
        if progress is not None:
            progress(done, len(chosen))
    agreed = _agreed(walks)
    runs = _by_first(agreed)
    for i, walk in zip(chosen, walks, strict=True):
        said[i] = walk.replaced(agreed, runs) or walk.said()
    return said


def _agreed(walks: Sequence["_Walk"]) -> dict[Run, Run]:
    """Return what takes the place of what tokens, where the rows that the model is sure of agree on it."""
    edits = [(walk.row.ids, *edit) for walk in walks if walk.said().is_sure for edit in walk.edits()]
    votes = Counter((ids[start:stop], words) for ids, start, stop, words in edits)
    often = {(run, words): count for (run, words), count in votes.items() if count >= _LEAST_VOTES}
    runs = _by_first(run for run, _ in often)
    could = Counter(run for ids, start, _, _ in edits for run in _found(runs, ids, start))
    return {run: words for (run, words), count in often.items() if count >= _AGREED * could[run]}


def _by_first(runs: Iterable[Run]) -> dict[int, list[Run]]:
    """Return each run once, by its first token, longest first."""
    found: dict[int, list[Run]] = {}
    for run in sorted(set(runs), key=len, reverse=True):
        found.setdefault(run[0], []).append(run)
    return found


def _found(runs: Mapping[int, Sequence[Run]], ids: Sequence[int], place: int) -> Iterator[Run]:
    """Yield those of the runs that stand in this place, longest first."""
    return (run for run in runs.get(ids[place], ()) if ids[place : place + len(run)] == run)


@dataclass
class _Walk:
    """One row being said anew.

    place: the next token of the row that is to be copied or replaced; origins: the places that `ids` were copied from,
    or where the row went on; None for other tokens.
    """

    source: Said
    marks: Sequence[bool]
    place: int
    ids: list[int]
    mask: list[bool]
    nats: list[float]
    origins: list[int | None]

    @classmethod
    def start(cls, source: Said, marks: Sequence[bool]) -> "_Walk":
        row, first = source.row, list(marks).index(True)
        before = list(row.ids[:first]), list(row.mask[:first]), list(source.nats[:first])
        return cls(source, marks, first, *before, list(range(first)))

    @property
    def row(self) -> Encoded:
        return self.source.row

    @property
    def ended(self) -> bool:
        return self.place >= len(self.row.ids)

    @property
    def is_marked(self) -> bool:
        return not self.ended and self.marks[self.place]

    def said(self) -> Said:
        return Said(Encoded(tuple(self.ids), tuple(self.mask), self.row.dropped_tokens), tuple(self.nats))

    def copy(self) -> int:
        """Append and return the row's next token."""
        place = self.place
        return self._append(self.row.ids[place], self.row.mask[place], self.source.nats[place], place)

    def say(self, token: int, nats: float, place: int) -> int:
        """Append and return the model's own token: instead of the next one, or of all up to the same one in `place`."""
        again = place > self.place
        self.place = place
        return self._append(token, not again or self.row.mask[place], nats, place if again else None)

    def edits(self) -> Iterator[tuple[int, int, Run]]:
        """Yield what was replaced, as (start, stop) in the row, and by what."""
        kept = [(i, origin) for i, origin in enumerate(self.origins) if origin is not None]
        for (i, origin), (j, following) in pairwise((*kept, (len(self.ids), len(self.row.ids)))):
            if (j, following) != (i + 1, origin + 1):
                yield origin + 1, following, tuple(self.ids[i + 1 : j])

    def replaced(self, agreed: Mapping[Run, Run], runs: Mapping[int, Sequence[Run]]) -> Said | None:
        """Return the row with what was agreed on in its place; None where that changes nothing.

        What follows directly stands, for it is to be looked at in its new place. runs: those of `agreed` (`_by_first`).
        """
        row, place, changed = self.row, 0, False
        ids, mask, nats = list[int](), list[bool](), list[float]()
        while place < len(row.ids):
            run = None if changed else next((r for r in _found(runs, row.ids, place) if self._may_go(place, r)), None)
            changed = run is not None
            if run is None:
                ids.append(row.ids[place])
                mask.append(row.mask[place])
                nats.append(self.source.nats[place])
                place += 1
            else:
                ids += agreed[run]
                mask += [True] * len(agreed[run])
                nats += [0.0] * len(agreed[run])
                place += len(run)
        whole = Encoded(tuple(ids), tuple(mask), row.dropped_tokens)
        return Said(whole, tuple(nats)) if whole.ids != row.ids else None

    def _may_go(self, place: int, run: Run) -> bool:
        taken = slice(place, place + len(run))
        return any(self.marks[taken]) and all(self.row.mask[taken])

    def places(self, said: int) -> list[int]:
        """Return the later places of the token `said` where the row may go on."""
        found, marked = list[int](), 1
        for place in range(self.place + 1, len(self.row.ids)):
            if self.row.ids[place] == said and 2 * marked >= place - self.place:
                found.append(place)
            marked += self.marks[place]
        return found

    def ahead(self, place: int) -> Encoded:
        """Return the row so far and what would follow from `place` on, where the tokens to judge that by carry loss."""
        judged = [i for i in range(place + 1, len(self.row.ids)) if not self.marks[i]][:_AHEAD]
        following = range(place + 1, judged[-1] + 1 if judged else place + 1)
        mask = [False] * (len(self.ids) + 1) + [i in judged for i in following]
        return Encoded((*self.ids, self.row.ids[place], *(self.row.ids[i] for i in following)), tuple(mask))

    def _append(self, token: int, carries_loss: bool, nats: float, origin: int | None) -> int:
        self.ids.append(token)
        self.mask.append(carries_loss)
        self.nats.append(nats)
        self.origins.append(origin)
        self.place += 1
        return token


class _Steps(LogitsProcessor):
    """Let each walk choose the token that `generate` takes next."""

    def __init__(self, model: PreTrainedModel, walks: Sequence[_Walk], pad: int) -> None:
        self._model, self._walks, self._pad = model, walks, pad

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, T), (B, V)
        taken = [self._pad] * len(self._walks)
        for i, walk in enumerate(self._walks):
            if walk.is_marked:
                taken[i] = self._say(walk, scores[i])
            elif not walk.ended:
                taken[i] = walk.copy()
        only = torch.full_like(scores, float("-inf"))
        return only.scatter(1, torch.tensor(taken, device=scores.device)[:, None], 0.0)

    def _say(self, walk: _Walk, scores: Tensor) -> int:
        others = scores.float().clone()
        others[walk.row.ids[walk.place]] = float("-inf")
        token = int(others.argmax())
        places = walk.places(token)
        place = self._best(walk, places) if places else walk.place
        return walk.say(token, -float(others.log_softmax(-1)[token]), place)

    def _best(self, walk: _Walk, places: Sequence[int]) -> int:
        """Return the place after which the unmarked tokens cost the model least, in the mean; 0 where none are left."""
        if len(places) == 1:
            return places[0]
        rows = [walk.ahead(place) for place in places]
        losses = row_nats(self._model, rows)
        costs = [mean_over([row], [nats]) if any(row.mask) else 0.0 for row, nats in zip(rows, losses, strict=True)]
        return places[costs.index(min(costs))]


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
            logits_processor=LogitsProcessorList([_Steps(model, walks, pad)]),
        )
