"""Models and tokenizers that cannot be loaded: one line, whatever the library trips over."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from models import rows, tiny_llama

from secvec.errors import CheckpointError
from secvec.models import answers, end_tokens, load_model, load_tokenizer
from secvec.train import TrainConfig, train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.mark.parametrize(
    "entries", [{"vocab_size": "x"}, {"hidden_size": -5}, {"dtype": "foo"}, {"rope_parameters": 3}, {"model_type": "?"}]
)
def test_a_damaged_config_is_refused_in_one_line(base: Path, tmp_path: Path, entries: dict[str, Any]) -> None:
    model = Path(shutil.copytree(base, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | entries))
    with pytest.raises(CheckpointError, match="model: cannot be loaded as a causal language model: ") as refused:
        load_model(model)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("file", "data"), [("tokenizer.json", "[]"), ("tokenizer.json", "{"), ("tokenizer_config.json", "[]")]
)
def test_a_damaged_tokenizer_is_refused_in_one_line(base: Path, tmp_path: Path, file: str, data: str) -> None:
    model = Path(shutil.copytree(base, tmp_path / "model"))
    (model / file).write_text(data)
    with pytest.raises(CheckpointError, match="model: cannot load a tokenizer from here: ") as refused:
        load_tokenizer(model)
    assert "\n" not in str(refused.value)


def test_damaged_generation_settings_are_refused(base: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(base, tmp_path / "model"))
    (model / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="model: cannot be loaded as a causal language model: "):
        load_model(model)


def test_a_models_own_way_of_drawing_changes_no_greedy_answer_and_ends_no_training(base: Path, tmp_path: Path) -> None:
    """Transformers saves no model that draws at a temperature without saying that it draws; many lie on the hub."""
    model, tokenizer = Path(shutil.copytree(base, tmp_path / "model")), load_tokenizer(base)
    settings = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 3.0, "num_beams": 2, "eos_token_id": [4, 9]}
    (model / "generation_config.json").write_text(json.dumps(settings))
    prompts = [[{"role": "user", "content": word}] for word in ("a", "bb", "ccc")]
    loaded = load_model(model)
    assert answers(loaded, tokenizer, prompts) == answers(load_model(base), tokenizer, prompts)
    assert end_tokens(loaded, tokenizer) >= {4, 9}
    config = TrainConfig(epochs=1, max_length=64, save_every=1)
    result = train(model, rows(4), tmp_path / "run", config=config).model
    assert json.loads((result / "generation_config.json").read_text()) == settings
