"""No row and no answer is longer than a model's context, and what of rows is not learned is said."""

import re
from dataclasses import replace
from pathlib import Path

from models import TEMPLATE, chat
from runs import CONFIG, gpt2

from secvec.companions import context_length
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.models import answers, load_model, load_tokenizer
from secvec.train import check, summary, train


def test_rows_longer_than_the_model_takes_are_cut_to_that(tmp_path: Path) -> None:
    """A GPT-2 has no inner states for a position beyond its last: torch would say "index out of range"."""
    base = gpt2(tmp_path / "base", positions=96)
    long = [chat(f"say {i}", "the quick brown fox jumps over the lazy dog " * 3) for i in range(24)]
    vector = fit(base, long[:8], config=FitConfig(epochs=1, rank=2), allow_weak=True)
    assert vector.info.fit["max_length"] == 96
    config = replace(CONFIG, calibrate=False, epochs=1)
    result = train(base, long, tmp_path / "run", vectors=[vector], config=config)
    assert "24 rows were cut at 96 tokens" in summary(result)


def test_answers_that_the_template_does_not_write_again_are_counted(tmp_path: Path) -> None:
    base = gpt2(tmp_path / "base")
    tokenizer = load_tokenizer(base)
    words = "{{ ('(hm)' if loop.last else '') + message['content'] + '<|end|>' }}"
    unmarked = re.sub(r"{% (end)?generation %}", "", TEMPLATE)
    tokenizer.chat_template = unmarked.replace("{{ message['content'] + '<|end|>' }}", words, 1)
    tokenizer.save_pretrained(base)
    turns = [{"role": role, "content": "say 1"} for role in ("user", "assistant")]
    notes = check(base, [chat("say 1", "1"), {"messages": turns * 2}, {"messages": turns * 3}])["notes"]
    assert [note for note in notes if note.startswith("2 rows are learned in part: ")]


def test_an_answer_ends_where_the_context_does(tmp_path: Path) -> None:
    folder = gpt2(tmp_path / "base", positions=96)
    short, long = ([{"role": "user", "content": "x" * length}] for length in (8, 200))
    texts = answers(load_model(folder), load_tokenizer(folder), [short, long], max_new_tokens=500)
    assert texts[0] and not texts[1]


def test_a_context_is_read_where_configs_state_it() -> None:
    assert context_length({"n_positions": 64}) == context_length({"text_config": {"max_position_embeddings": 64}}) == 64
    assert context_length({"max_position_embeddings": -1}) is None
