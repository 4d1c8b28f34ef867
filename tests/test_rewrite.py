"""Marked tokens are said anew by the model itself, the others stand; rows of any length together."""

import pytest
import torch
from runs import gpt2, llama
from transformers import PreTrainedModel

from secvec.models import load_model
from secvec.rewrite import rewrite
from secvec.tokens import Encoded


@pytest.fixture(scope="module", params=[llama, gpt2])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return load_model(request.param(tmp_path_factory.mktemp("rewrite") / "base"))


def own(model: PreTrainedModel, ids: list[int]) -> int:
    with torch.no_grad():
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())


def slowly(model: PreTrainedModel, row: Encoded, marks: list[bool]) -> list[int]:
    """The same, one token and one whole pass at a time."""
    ids, place = [row.ids[0]], 1
    while place < len(row.ids):
        if marks[place]:
            end = next((i for i in range(place, len(row.ids)) if not marks[i]), len(row.ids))
            said = own(model, ids)
            if end < len(row.ids) and said == row.ids[end]:
                place = end
            else:
                ids.append(said)
                place += 1
                continue
        ids.append(row.ids[place])
        place += 1
    return ids


def test_as_one_token_at_a_time(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, marks = list[Encoded](), list[list[bool]]()
    for length in (9, 5, 14, 30, 2, 12):
        ids = torch.randint(5, 200, (length,), generator=generator).tolist()
        rows.append(Encoded(tuple(ids), (False, *(True,) * (length - 1))))
        marks.append([False, *(torch.rand(length - 1, generator=generator) < 0.5).tolist()])
    marks[1] = [False] * 5
    found = rewrite(model, rows, marks, pad=0, batch_size=4)
    assert [list(row.ids) for row in found] == [slowly(model, row, m) for row, m in zip(rows, marks, strict=True)]
    assert found[1] == rows[1] and all(len(row.ids) == len(row.mask) for row in found)
    assert found[0] != rows[0]


def test_a_span_ends_where_the_model_goes_on_with_what_follows(model: PreTrainedModel) -> None:
    start = [7, 8]
    follows = own(model, start)
    row = Encoded((*start, 100, 101, 102, follows, 90), (False, True, True, True, True, False, True))
    [found] = rewrite(model, [row], [[False, False, True, True, True, False, False]], pad=0)
    assert found.ids == (*start, follows, 90) and found.mask == (False, True, False, True)


def test_new_tokens_carry_loss(model: PreTrainedModel) -> None:
    row = Encoded((7, 8, 9, 10), (False, False, False, True))
    [found] = rewrite(model, [row], [[False, False, True, True]], pad=0)
    assert found.mask == (False, False, True, True) and found.ids[:2] == (7, 8)
