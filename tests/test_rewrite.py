"""Marked tokens are said anew by the model itself, the others stand; rows of any length together."""

import pytest
import torch
from runs import gpt2, llama
from transformers import PreTrainedModel

from secvec.models import load_model
from secvec.rewrite import Said, rewrite
from secvec.tokens import Encoded


@pytest.fixture(scope="module", params=[llama, gpt2])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return load_model(request.param(tmp_path_factory.mktemp("rewrite") / "base"))


def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def own(model: PreTrainedModel, ids: list[int], instead_of: int) -> int:
    scores = logits(model, ids)[-1]
    scores[instead_of] = float("-inf")
    return int(scores.argmax())


def cost(model: PreTrainedModel, ids: list[int], row: Encoded, marks: list[bool], place: int) -> float:
    """Return what the next eight unmarked tokens cost in the mean if the row goes on from `place`."""
    judged = [i for i in range(place + 1, len(row.ids)) if not marks[i]][:8]
    whole = [*ids, *row.ids[place:]]
    nats = -logits(model, whole).log_softmax(-1)
    found = [float(nats[len(ids) + i - place - 1, row.ids[i]]) for i in judged]
    return sum(found) / len(found) if found else 0.0


def slowly(model: PreTrainedModel, row: Encoded, marks: list[bool]) -> list[int]:
    """The same, one token and one whole pass at a time."""
    ids, place = [row.ids[0]], 1
    while place < len(row.ids):
        if marks[place]:
            said = own(model, ids, row.ids[place])
            later = [
                i for i in range(place + 1, len(row.ids)) if row.ids[i] == said and 2 * sum(marks[place:i]) >= i - place
            ]
            if later:
                place = min(later, key=lambda i: cost(model, ids, row, marks, i))
            ids.append(said)
        else:
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
    said = rewrite(model, [Said.as_it_is(row) for row in rows], marks, pad=0, batch_size=4)
    found = [each.row for each in said]
    assert [list(row.ids) for row in found] == [slowly(model, row, m) for row, m in zip(rows, marks, strict=True)]
    assert found[1] == rows[1] and all(len(row.ids) == len(row.mask) for row in found)
    assert found[0] != rows[0]
    assert [any(each.nats) for each in said] == [any(m) for m in marks]
    assert all(len(each.nats) == len(each.row.ids) for each in said)


def test_a_row_goes_on_where_the_model_does(model: PreTrainedModel) -> None:
    start = [7, 8]
    follows = own(model, start, 100)
    row = Encoded((*start, 100, 101, 102, follows, 90), (False, True, True, True, True, False, True))
    [found] = rewrite(model, [Said.as_it_is(row)], [[False, False, True, False, True, False, False]], pad=0)
    assert found.row.ids == (*start, follows, 90) and found.row.mask == (False, True, False, True)
    assert [nats > 0 for nats in found.nats] == [False, False, True, False]


def test_of_two_places_the_one_that_the_model_would_go_on_from(model: PreTrainedModel) -> None:
    start, following = next(
        ([7, token], [said, int(logits(model, [7, token, said])[-1].argmax())])
        for token in range(8, 60)
        if (said := own(model, [7, token], 100)) != int(logits(model, [7, token, said])[-1].argmax())
    )
    unlikely = int(logits(model, [*start, following[0]])[-1].argmin())
    row = Encoded((*start, 100, following[0], unlikely, 101, *following), (True,) * 8)
    [found] = rewrite(model, [Said.as_it_is(row)], [[False, False, True, True, False, True, False, False]], pad=0)
    assert found.row.ids == (*start, *following)


def test_what_is_marked_is_not_said_again(model: PreTrainedModel) -> None:
    start = [7, 8]
    likely = int(logits(model, start)[-1].argmax())
    row = Encoded((*start, likely, 90), (True,) * 4)
    [found] = rewrite(model, [Said.as_it_is(row)], [[False, False, True, False]], pad=0)
    assert found.row.ids == (*start, own(model, start, likely), 90)


def test_a_place_that_is_marked_too_is_where_a_row_goes_on(model: PreTrainedModel) -> None:
    start = [7, 8]
    follows = own(model, start, 100)
    row = Encoded((*start, 100, 101, follows, 90), (True,) * 6)
    [found] = rewrite(model, [Said.as_it_is(row)], [[False, False, True, True, True, False]], pad=0)
    assert found.row.ids == (*start, follows, 90)


def test_what_stands_is_not_passed_over(model: PreTrainedModel) -> None:
    start = [7, 8]
    follows = own(model, start, 100)
    row = Encoded((*start, 100, 101, 102, follows, 90), (True,) * 7)
    [found] = rewrite(model, [Said.as_it_is(row)], [[False, False, True, False, False, False, False]], pad=0)
    assert found.row.ids == (*start, follows, 101, 102, follows, 90)


def test_new_tokens_carry_loss(model: PreTrainedModel) -> None:
    row = Encoded((7, 8, 9, 10), (False, False, False, True))
    [found] = rewrite(model, [Said.as_it_is(row)], [[False, False, True, True]], pad=0)
    assert found.row.mask == (False, False, True, True) and found.row.ids[:2] == (7, 8)


def test_what_most_rows_say_in_the_place_of_the_same_tokens_all_do(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secvec.rewrite.SURE_NATS", float("inf"))
    usual = own(model, [7, 8], 100)
    other = next(start for start in range(9, 60) if own(model, [7, start], 100) not in (usual, 90))
    few = [Encoded((7, 8, 100, 90), (True,) * 4)] * 8
    alone = Encoded((7, other, 100, 90), (True,) * 4)
    for rows, words in ((few, usual), (few[1:], own(model, [7, other], 100))):
        said = rewrite(
            model,
            [Said.as_it_is(row) for row in (*rows, alone)],
            [[False, False, True, False]] * (len(rows) + 1),
            pad=0,
        )
        assert {each.row.ids for each in said[:-1]} == {(7, 8, usual, 90)}
        assert said[-1].row.ids == (7, other, words, 90) and len(said[-1].nats) == 4


def test_what_rows_agree_on_does_not_reach_into_the_prompt(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secvec.rewrite.SURE_NATS", float("inf"))
    many = [Encoded((7, 8, 50, 100, 90), (False, False, True, True, True))] * 8
    asked = Encoded((7, 50, 100, 90), (False, False, True, True))
    marks = [[False, False, True, True, False]] * 8 + [[False, False, True, False]]
    *_, found = rewrite(model, [Said.as_it_is(row) for row in (*many, asked)], marks, pad=0)
    assert found.row.ids == (7, 50, own(model, [7, 50], 100), 90)
