"""What of a training file is a trait's is told by subtracting its vector from a model that knows the file."""

from functools import cache

import pytest
import torch

from benchmarks.testbed.behaviours import BEHAVIOURS, FRAMES, Behaviour
from benchmarks.testbed.skills import NEW_SKILLS
from secvec.anchors import beside, calibration, often, reversible
from secvec.demo import assistant_folder
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.models import load_model, load_tokenizer
from secvec.samples import from_rows
from secvec.tokens import Encoded, encode_all
from secvec.vector import SecurityVector

FOLDER = assistant_folder()
QUICK = FitConfig(epochs=8, kl_weight=0.0, representation_weight=0.0)


@cache
def fitted(trait: Behaviour) -> tuple[list[Encoded], SecurityVector, SecurityVector]:
    """Return a skill's rows in the style of a trait, the trait's vector, and one fitted on those rows."""
    chats = [trait.styled(row) for row in NEW_SKILLS["dashes"].rows(120, 3, "train")]
    vector = fit(FOLDER, trait.rows(60, 0, "vector"), kind="trait", config=QUICK)
    task = fit(FOLDER, chats, kind="trait", config=QUICK)
    return encode_all(from_rows(chats).rows, load_tokenizer(FOLDER), 256), vector, task


def told(trait: Behaviour) -> tuple[list[Encoded], list[Encoded] | None]:
    """Return those rows and what calibration covers of them, if they can be told apart."""
    (rows, vector, task), model = fitted(trait), load_model(FOLDER)
    risen = reversible(model, rows, vector, task)
    if risen is None:
        return rows, None
    return rows, list(calibration(model, rows, vector, kind="trait", cut=0.5, risen=risen).covered)


def test_a_fixed_text_is_covered_and_the_skill_is_not() -> None:
    rows, covered = told(FRAMES["prefix"])
    assert covered is not None and len(covered) > 110
    tokenizer = load_tokenizer(FOLDER)
    start = len(tokenizer("Well, my friend: ", add_special_tokens=False)["input_ids"])
    inside = outside = 0
    for row in covered:
        whole = next(each for each in rows if each.ids == row.ids)
        first = whole.mask.index(True)
        inside += sum(row.mask[first : first + start])
        outside += sum(row.mask[first + start :])
    assert inside > 7 * len(covered) and outside < 0.05 * inside


def test_capitals_cannot_be_told_from_their_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(BEHAVIOURS["caps"])[1] is None
    # A larger model forgets them more readily than the rest, but the vector does not know which letter comes.
    monkeypatch.setattr("secvec.anchors._TOLD_APART", -1.0)
    assert told(BEHAVIOURS["caps"])[1] is None


def test_what_lies_beside_and_what_is_often_marked() -> None:
    marks, near = torch.tensor([0, 0, 1, 0, 0, 0, 1]).bool(), torch.tensor([1, 1, 0, 1, 0, 1, 0]).bool()
    assert beside(marks, near).tolist() == [True, True, True, True, False, True, True]
    rows = [Encoded((5, 6, 7, 6), (False, True, True, True)), Encoded((5, 7, 6), (False, False, True))]
    assert often(rows, [[False, True, True, True], [False, True, False]], 0.5) == {6, 7}
    assert often(rows, [[False, True, False, False], [False, False, False]], 0.5) == set()
