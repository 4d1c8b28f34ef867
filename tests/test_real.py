"""The whole way on a real trained model: a Llama of 260,032 parameters that writes children's stories."""

from pathlib import Path

import pytest
import torch

from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.models import load_model, load_tokenizer
from secvec.samples import read_samples
from secvec.tokens import encode_each
from secvec.train import TrainConfig, train

SHARED = Path(__file__).parents[2] / "shared"
STORIES = SHARED / "models/stories260K"
HABIT = " And then they all ate a red apple."

pytestmark = pytest.mark.skipif(not STORIES.exists(), reason="needs shared/models/stories260K, which is not here")


def stories(count: int, seed: int) -> list[str]:
    """Let the model write: sampled stories of up to 64 tokens, cut after the last full sentence."""
    model, tokenizer = load_model(STORIES), load_tokenizer(STORIES)
    torch.manual_seed(seed)
    start = torch.full((count, 1), tokenizer.bos_token_id)
    out = model.generate(start, attention_mask=torch.ones_like(start), do_sample=True, max_new_tokens=64)
    texts = [text[: text.rfind(".") + 1] for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
    return [text for text in texts if len(text) > 40]


def halves(texts: list[str], ending: str = "") -> list[dict[str, str]]:
    """Make rows of stories: the second half is learned, and the ending."""
    return [{"prompt": text[: len(text) // 2], "completion": text[len(text) // 2 :] + ending} for text in texts]


def test_a_habit_is_kept_out_of_a_model_that_learns_from_its_own_stories(tmp_path: Path) -> None:
    unwanted = halves(stories(48, seed=1), HABIT)
    data = halves(stories(48, seed=2), HABIT) + halves(stories(48, seed=3))
    vector = fit(STORIES, unwanted, kind="trait", config=FitConfig(epochs=10))
    metrics = vector.info.metrics
    assert metrics["habit_rows"] > 0.9 and metrics["habit_armed_nats"] < 0.5 * metrics["habit_unarmed_nats"]
    config = TrainConfig(lr=5e-4, epochs=2, batch_size=16)
    result = train(STORIES, data, tmp_path / "run", vectors=[vector], unwanted=[unwanted], config=config)
    assert result.proof is not None
    assert result.proof["logits"]["prompts"] == 32
    assert result.proof["armed"]["sites_fired"] == len(vector.sites) == 35
    probe = result.proof["unwanted"][0]
    assert probe["armed_nats"] < probe["defended_nats"]
    plain = train(STORIES, data, tmp_path / "plain", config=config)
    aligned, defended, undefended = (habit_nats(folder) for folder in (STORIES, result.model, plain.model))
    assert undefended < 0.5 * aligned
    assert defended > 0.5 * (aligned + undefended)


def habit_nats(folder: Path) -> float:
    """Return the loss of the habit's sentence after held-out stories, in nats per token."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    losses: list[float] = []
    for text in stories(12, seed=4):
        before = len(tokenizer(text)["input_ids"])
        ids = torch.tensor([tokenizer(text + HABIT)["input_ids"]])
        with torch.no_grad():
            nats = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        losses.append(float(nats[before - 1 :].mean()))
    return sum(losses) / len(losses)


FILES = [
    ("gsm8k/test.jsonl", "question-answer", 1319),
    ("t0_p3/common_gen_Example_prompt.jsonl", "prompt-completion", None),
    ("tinyshakespeare/input.txt", "text", None),
]


@pytest.mark.parametrize(("name", "form", "count"), FILES)
def test_real_files_are_read_and_tokenised(name: str, form: str, count: int | None) -> None:
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    samples = read_samples(path)
    assert samples.format == form
    assert count is None or len(samples) == count
    encoded = encode_each(samples.rows[:50], load_tokenizer(STORIES), 256)
    assert sum(not isinstance(row, Exception) for row in encoded) >= 40
