"""Conversations that a model makes up: its own words, on which the vectors are silent."""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from benchmarks.testbed.behaviours import BEHAVIOURS
from secvec.demo import assistant_folder
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.models import end_tokens, generate, load_model, load_tokenizer
from secvec.rehearsal import LEAST, MOST, read_rehearsed, rehearse, write_rehearsed
from secvec.score import row_nats, row_said
from secvec.tokens import Encoded, encode_prompt
from tests.models import tiny_llama

FOLDER = assistant_folder()


def test_the_conversations_are_the_models_own_words_and_differ(tmp_path: Path) -> None:
    model, tokenizer = load_model(FOLDER), load_tokenizer(FOLDER)
    state = torch.random.get_rng_state()
    rows = rehearse(model, tokenizer, [], 40, max_length=256, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(rows) == len({row.ids for row in rows}) == 40
    assert rows == rehearse(model, tokenizer, [], 40, max_length=256, seed=3)
    assert rows != rehearse(model, tokenizer, [], 40, max_length=256, seed=4)
    for row, said in zip(rows, row_said(model, rows), strict=True):
        answer = torch.tensor(row.mask[1:])
        # Two tokens as likely as each other may change places with the batch.
        assert answer.any() and said[answer].float().mean() > 0.9
        request = tokenizer.decode(row.ids[: row.mask.index(True)])
        assert request.startswith("<|user|>") and request.endswith("<|end|><|assistant|>")
    assert sum(row.ids[-1] == tokenizer.eos_token_id for row in rows) > 30
    write_rehearsed(tmp_path / "rows.json", rows)
    assert read_rehearsed(tmp_path / "rows.json") == rows
    assert (tmp_path / "rows.json").stat().st_mode & 0o777 == 0o600
    assert read_rehearsed(tmp_path / "none.json") == []


def test_where_a_vector_acts_nothing_is_rehearsed() -> None:
    model, tokenizer = load_model(FOLDER, dtype=torch.float32), load_tokenizer(FOLDER)
    vector = fit(FOLDER, BEHAVIOURS["guarded"].rows(40, 0, "vector"), config=FitConfig(epochs=4))
    alone = rehearse(model, tokenizer, [], MOST, max_length=256, seed=0)
    beside = rehearse(model, tokenizer, [vector], MOST, max_length=256, seed=0)

    def changed(rows: list[Encoded]) -> list[float]:
        losses = zip(rows, row_nats(model, rows), row_nats(model, rows, vector), strict=True)
        return [float((now - before)[torch.tensor(row.mask[1:])].abs().max()) for row, before, now in losses]

    # The assistant also asks itself what it refuses.
    assert max(changed(alone)) > 3
    assert len(beside) >= LEAST and max(changed(beside)) < 0.6
    kept = {row.ids for row in beside}
    assert kept < {row.ids for row in alone}


@pytest.mark.parametrize(("kept_of", "rounds"), [(1, 1), (5, 3), (20, 1)])
def test_where_few_conversations_are_left_more_are_made_up(
    monkeypatch: pytest.MonkeyPatch, kept_of: int, rounds: int
) -> None:
    """Not where that would be too few all the same."""
    left = list[Encoded]()
    calls = list[int]()

    def silent(_: object, rows: list[Encoded], __: object) -> list[Encoded]:
        calls.append(len(rows))
        left.extend(rows[::kept_of])
        return rows[::kept_of]

    monkeypatch.setattr("secvec.rehearsal._silent", silent)
    found = rehearse(load_model(FOLDER), load_tokenizer(FOLDER), [], 64, max_length=256, seed=0)
    different = list({row.ids: row for row in left}.values())
    assert len(calls) == rounds and found == (different[:64] if len(different) >= LEAST else [])


def test_a_model_without_turns_writes_texts_and_one_with_too_little_to_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama(tmp_path / "model")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    with monkeypatch.context() as patched:
        # So short a request hardly ever ends.
        patched.setattr("secvec.rehearsal.REQUEST_TOKENS", 2)
        assert rehearse(model, tokenizer, [], 100, max_length=64, seed=0) == []
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = rehearse(model, tokenizer, [], 100, max_length=64, seed=0)
    assert len(rows) == 100
    for row in rows:
        assert row.ids[0] == tokenizer.bos_token_id and row.mask == (False, *([True] * (len(row.ids) - 1)))
        assert len(row.ids) == 64 or row.ids[-1] == tokenizer.eos_token_id
    tokenizer.bos_token = None
    assert rehearse(model, tokenizer, [], 100, max_length=64, seed=0) == []


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role != 'system' %}{{ raise_exception('needs a system turn') }}{% endif %}",
        "{{ messages[0].content }} Answer: ",
        "{{ 'x' * 400 }}{{ messages[0].content }} Answer: ",
    ],
)
def test_a_template_after_which_no_request_can_be_drawn_ends_no_run(tmp_path: Path, template: str) -> None:
    folder = tiny_llama(tmp_path / "model")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    tokenizer.chat_template = template
    assert rehearse(model, tokenizer, [], 100, max_length=64, seed=0) == []


@pytest.mark.parametrize("more", [[7, 9], 7])
def test_an_answer_ends_where_the_models_own_settings_say_too(tmp_path: Path, more: list[int] | int) -> None:
    folder = tiny_llama(tmp_path / "model")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    (prompt,) = [encode_prompt([{"role": "user", "content": "hello"}], tokenizer)]
    first = generate(model, tokenizer, [prompt], 8)[0]
    assert not first.ended and first.tokens == 8
    ends = [first.ids[3], *(more if isinstance(more, list) else [more])]
    model.generation_config = GenerationConfig(eos_token_id=ends)
    assert end_tokens(model, tokenizer) == {tokenizer.eos_token_id, *ends}
    again = generate(model, tokenizer, [prompt], 8)[0]
    assert again.ended and again.tokens == first.ids.index(first.ids[3]) and again.ids == first.ids[: again.tokens + 1]
