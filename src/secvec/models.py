"""Find and load models and tokenizers; write greedy answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secvec.companions import context_length
from secvec.errors import CheckpointError
from secvec.tokens import encode_prompt, pad_id

Dtype = torch.dtype | None


def resolve(model: str | Path) -> Path:
    """Return the local folder of a model: the folder itself, or the downloaded snapshot of a hub id.

    Raises CheckpointError when `model` is neither.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: expected a Hugging Face model folder, found no config.json in it")
        return folder
    try:
        return Path(snapshot_download(str(model)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{str(model)!r} is neither a local model folder nor a hub model that can be reached "
            f"({type(error).__name__}); give the path of a folder with config.json"
        ) from error


def load_model(folder: Path, *, dtype: Dtype = None) -> PreTrainedModel:
    """Load a causal language model, in its own dtype unless `dtype` is given, ready for inference.

    Of its generation settings only the special tokens stay: greedy is greedy then, whatever it is served with, and
    transformers saves it.
    """
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if dtype is None else dtype)
    # Transformers checks little: a damaged file shows as whatever error its contents lead to.
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be loaded as a causal language model: {_first_line(error)}") from error
    if settings := model.generation_config:
        model.generation_config = GenerationConfig(
            bos_token_id=settings.bos_token_id,
            eos_token_id=settings.eos_token_id,
            pad_token_id=settings.pad_token_id,
        )
    model.eval()
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder. Raises CheckpointError when there is none."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    # As above.
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot load a tokenizer from here: {_first_line(error)}") from error
    return tokenizer


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(model: PreTrainedModel) -> PreTrainedModel:
    """Move a model to the default device."""
    return model.to(default_device())  # pyright: ignore[reportArgumentType]


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[dict[str, str]]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Return the model's greedy answer to each conversation, in order; prompts of like length run together.

    An answer ends where the model's context does; there is none to a prompt that fills it.
    """
    ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    texts, limit = [""] * len(ids), context_length(model.config.to_dict())
    left = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt)) for prompt in ids]
    order = sorted((i for i in range(len(ids)) if left[i] > 0), key=lambda i: -len(ids[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        asked = [ids[i] for i in chosen]
        for i, answer in zip(chosen, generate(model, tokenizer, asked, left[chosen[0]]), strict=True):
            texts[i] = answer.text
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return texts


@dataclass(frozen=True)
class Answer:
    """text: without special tokens and spaces around it; ids: up to its end; ended: whether the model itself ended it.

    The token that ends it is one of its ids.
    """

    text: str
    ids: tuple[int, ...]
    ended: bool

    @property
    def tokens(self) -> int:
        """How many there are before the end."""
        return len(self.ids) - self.ended


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[Answer]:
    """Return the model's greedy answer to each prompt's token ids; all run together, padded on the left."""
    ends = end_tokens(model, tokenizer)
    written = _continued(model, tokenizer, prompts, max_new_tokens, do_sample=False)
    texts = [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]
    return [
        Answer(text, tuple(ids), bool(ends.intersection(ids[-1:]))) for text, ids in zip(texts, written, strict=True)
    ]


def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], count: int, max_new_tokens: int
) -> list[list[int]]:
    """Draw what the model may write after one prompt, `count` times at temperature 1, from torch's own generator.

    Each is the ids up to its end, the token that ends it included.
    """
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return _continued(model, tokenizer, [prompt] * count, max_new_tokens, **drawn)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer: the tokenizer's, and those that the model's generation settings name."""
    settings: Any = model.generation_config
    named = settings.eos_token_id if settings else None
    ends: list[Any] = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return {int(end) for end in ends if end is not None}


def _continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    **settings: Any,
) -> list[list[int]]:
    """Return what the model writes after each prompt, up to its end."""
    longest, pad, ends = max(len(ids) for ids in prompts), pad_id(tokenizer), end_tokens(model, tokenizer)
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=model.device)
    attention = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.no_grad():
        out: Tensor = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids,
            attention_mask=attention,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            **settings,
        )
    written: list[list[int]] = out[:, longest:].tolist()
    return [ids[: next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))] for ids in written]


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0][:200]
