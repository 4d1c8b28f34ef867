"""The small files around a model's weights: config, tokenizer, chat template, generation settings."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from secvec.errors import CheckpointError
from secvec.headers import INDEX
from secvec.tripwire import KEY, PROVENANCE, read_json, refuse_folded

_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".vocab", ".bpe"})
_TEMPLATES = "additional_chat_templates"
# Written by us, by name, or about a training run that is over.
_OWN = frozenset(
    {
        "config.json",
        "adapter_config.json",
        INDEX,
        PROVENANCE,
        "trainer_state.json",
        "all_results.json",
        "train_results.json",
        "eval_results.json",
    }
)
_CONTEXT_LENGTH = ("max_position_embeddings", "n_positions")
# These models' linear layers are transformers' Conv1D, which stores (d_in, d_out).
TRANSPOSED_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat templates, generation settings and code; not the config, not the weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _SUFFIXES and path.name not in _OWN:
            shutil.copyfile(path, target / path.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, target / _TEMPLATES, dirs_exist_ok=True)


def copy_index(source: Path, target: Path) -> None:
    if (source / INDEX).exists():
        shutil.copyfile(source / INDEX, target / INDEX)


def model_config(folder: Path) -> dict[str, Any]:
    """Read the config of a model folder that may be folded or unfolded.

    Raises CheckpointError for an adapter, a folder without config, and a quantised model.
    """
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: expected a model, found an adapter; name the model it was trained on")
    config = read_json(folder / "config.json")
    if config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{folder}: expected unquantised weights, found quantization_config in config.json; "
            "fold the unquantised model, or arm the quantised one in memory (secvec.armed)"
        )
    return config


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the tokens that a model of this config can take, None where that does not say."""
    inner = config.get("text_config")
    places = [config, cast(Mapping[str, Any], inner)] if isinstance(inner, Mapping) else [config]
    stated = [place.get(name) for place in places for name in _CONTEXT_LENGTH]
    return min((each for each in stated if isinstance(each, int) and each > 0), default=None)


def tokens_a_row(folder: Path, max_length: int) -> int:
    """Return the most tokens of a row that the model in a folder can take, at most `max_length`."""
    context = context_length(read_json(folder / "config.json"))
    return max_length if context is None else min(max_length, context)


def base_config(folder: Path) -> dict[str, Any]:
    """Read the config of a model that a vector is to be folded into. Raises CheckpointError when one already is."""
    refuse_folded(folder, "fold into")
    return model_config(folder)


def write_config(config: Mapping[str, Any], folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def finished_config(trained: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of an unfolded model: the trained one without the mark, in the base's dtype."""
    config = {name: value for name, value in trained.items() if name not in (KEY, "dtype", "torch_dtype")}
    return config | {name: base[name] for name in ("dtype", "torch_dtype") if name in base}
