"""A model that shows a trait on the training file's own requests is not published, whatever else its proof shows."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from models import rows
from runs import CONFIG, UNWANTED, fitted_vector, llama

from benchmarks.testbed.behaviours import BEHAVIOURS
from benchmarks.testbed.skills import SKILLS
from secvec.arm import armed
from secvec.demo import assistant_folder
from secvec.errors import ProofError
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.frames import Frame
from secvec.models import load_model, load_tokenizer
from secvec.samples import from_rows
from secvec.tokens import Encoded, encode_all
from secvec.train import summary, train
from secvec.trait_rows import Learned, TraitRows, judged


def test_a_model_that_shows_the_trait_is_told_from_one_that_does_not() -> None:
    folder, caps = assistant_folder(), BEHAVIOURS["caps"]
    model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    quick = FitConfig(epochs=8, kl_weight=0.0, representation_weight=0.0)
    vector = fit(folder, caps.rows(100, 0, "vector"), kind="trait", config=quick)
    calm = SKILLS["reverse"].rows(300, 3, "train")
    mixed = [caps.styled(row) if i >= 150 else row for i, row in enumerate(calm)]
    found = TraitRows.of(model, encode_all(from_rows(mixed).rows, tokenizer, 128), vector, Frame(), tokenizer)
    aligned = found.learned(model)
    assert aligned.rows == 256 and 120 <= aligned.shown <= 140 and aligned.said == 0
    with armed(model, vector):
        shouting = found.learned(model)
    assert shouting.said > 0.9 * shouting.shown == 0.9 * aligned.shown


def test_a_row_is_said_so_by_most_of_what_shows_the_trait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of signs that it has hardly met, a model that shows them gets some wrong."""
    model = load_model(llama(tmp_path / "base"))
    row, shows = Encoded(tuple(range(9)), (True,) * 9), torch.tensor([False] * 4 + [True] * 4)
    for count, said in ((2, 0), (3, 1), (4, 1)):
        says = torch.tensor([False] * 4 + [i < count for i in range(4)])
        monkeypatch.setattr("secvec.trait_rows.row_said", lambda _, rows, says=says: [says for _ in rows])
        assert TraitRows([row], [shows]).learned(model) == Learned(1, 1, said)


@pytest.mark.parametrize(
    ("found", "enough"),
    [
        (Learned(100, 20, 11), True),
        (Learned(100, 20, 10), False),
        (Learned(100, 19, 19), False),
        (Learned(256, 51, 51), False),
    ],
)
def test_it_takes_more_than_half_of_rows_that_are_not_few(found: Learned, enough: bool) -> None:
    if not enough:
        assert judged(found) == asdict(found)
        return
    with pytest.raises(ProofError, match=r"of 100 rows looked at 20 show it, and it says 11 of them so"):
        judged(found)


@pytest.mark.parametrize("settle_rows", [0, 16])
def test_a_run_is_refused_by_what_its_last_model_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settle_rows: int
) -> None:
    base = llama(tmp_path / "base")
    config = replace(CONFIG, epochs=1, lr=3e-4, settle_rows=settle_rows)
    says = iter([Learned(100, 60, 0 if settle_rows else 31), Learned(100, 60, 31)])
    monkeypatch.setattr(TraitRows, "learned", lambda *_: next(says))
    vector, out = fitted_vector(base), tmp_path / "run"
    with pytest.raises(ProofError, match=r"it says 31 of them so"):
        train(base, rows(), out, vectors=[vector], unwanted=[UNWANTED], config=config)
    assert not (out / "model").exists() and not (out / "proof.json").exists()
    monkeypatch.setattr(TraitRows, "learned", lambda *_: Learned(100, 60, 30))
    result = train(base, rows(), out, vectors=[vector], unwanted=[UNWANTED], config=config, resume=True)
    assert result.proof is not None and result.proof["trait_rows"] == [asdict(Learned(100, 60, 30))]
    assert "training rows that show the trait: 60 of 100 looked at; the model says 30 of them so" in summary(result)
    assert "| of those, said so by this model | 30 |" in (result.model / "README.md").read_text()
