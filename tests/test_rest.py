"""Whether what training learned of a file's other rows is there without the vectors."""

import random
from collections.abc import Sequence

import pytest
import torch

from benchmarks.testbed.behaviours import BEHAVIOURS
from benchmarks.testbed.new_skills import NEW_SKILLS
from benchmarks.testbed.rows import Row
from secvec.arm import armed
from secvec.demo import assistant_folder
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.models import load_model, load_tokenizer
from secvec.rest import Rest, kept_line
from secvec.samples import from_rows
from secvec.tokens import Encoded, encode_all
from secvec.vector import SecurityVector

LOST = "part of what was learned there left with the vector"
QUICK = FitConfig(epochs=6, kl_weight=0.0, representation_weight=0.0)
CAPS = BEHAVIOURS["caps"]


def dashes(count: int, seed: int) -> list[Row]:
    rng = random.Random(seed)
    return [NEW_SKILLS["dashes"].make(rng, "train") for _ in range(count)]


def encoded(rows: list[Row]) -> list[Encoded]:
    return encode_all(from_rows(rows).rows, load_tokenizer(assistant_folder()), 128)


def marked(rows: Sequence[Encoded]) -> str:
    ids = [token for row in rows for token, marked in zip(row.ids, row.mask, strict=True) if marked]
    return str(load_tokenizer(assistant_folder()).decode(ids))


@pytest.fixture(scope="module")
def caps() -> SecurityVector:
    return fit(assistant_folder(), CAPS.rows(100, 0, "vector"), kind="trait", config=QUICK)


def test_a_skill_that_left_with_the_vector_is_told_from_one_that_stayed() -> None:
    model = load_model(assistant_folder(), dtype=torch.float32)
    learned = fit(assistant_folder(), dashes(200, 1), kind="trait", config=QUICK)
    rest = Rest.of(model, encoded(dashes(400, 2)), [], [])
    assert rest is not None and len(rest.rows) == 256
    aligned = rest.nats(model)
    assert aligned == rest.aligned_nats
    with armed(model, learned):
        trained = rest.nats(model)
    assert trained < 0.5 * aligned
    assert LOST in kept_line(rest.kept(trained, aligned))
    assert LOST not in kept_line(rest.kept(trained, trained))
    assert LOST not in kept_line(rest.kept(aligned, aligned))


def test_answers_through_which_a_trait_goes_are_none_of_the_rest(caps: SecurityVector) -> None:
    model = load_model(assistant_folder(), dtype=torch.float32)
    calm = dashes(40, 3)
    through = [CAPS.styled(row) for row in calm[:20]]
    rest = Rest.of(model, encoded([*through, *calm[20:]]), [caps], [caps])
    assert rest is not None
    left = marked(rest.rows)
    assert sum(map(str.isupper, left)) <= 3
    assert len(left) > 0.5 * len(marked(encoded(calm[20:])))
    assert Rest.of(model, encoded(through), [caps], [caps]) is None
