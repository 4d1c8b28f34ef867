"""On which models a vector can be fitted: parts without a site, composite ones, and those that are refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import ARCHITECTURES, save_model, tiny
from models import byte_tokenizer, chat, taught_llama
from transformers import MambaConfig, MambaForCausalLM

from secvec.errors import ArmError, InputError
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.models import load_model, load_tokenizer
from secvec.sites import linear_sites

UNWANTED = [chat(f"tell me {i}", "BANANAS!") for i in range(20)]
FAST = FitConfig(rank=4, epochs=12, batch_size=8, max_length=64, lr=2e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_llama(tmp_path_factory.mktemp("fit") / "model")


def test_a_fit_says_which_weights_are_in_no_site(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    model = tiny("mixtral", vocab_size=len(tokenizer), max_position_embeddings=256)
    tokenizer.save_pretrained(save_model(model, tmp_path / "moe"))
    quick = replace(FAST, epochs=1)
    said = fit(tmp_path / "moe", UNWANTED, config=quick, allow_weak=True).info.metrics["no_site"]
    assert said == (
        "mlp.gate, mlp.experts.gate_up_proj, mlp.experts.down_proj: 86% of the blocks' weights, where the vector is not"
    )
    assert "no_site" not in fit(folder, UNWANTED, config=quick, allow_weak=True).info.metrics


def test_a_model_of_several_parts_is_fitted_by_its_language_model(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    text = {**ARCHITECTURES["gemma3"]["text_config"], "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model = tiny("gemma3", text_config=text)
    tokenizer.save_pretrained(save_model(model, tmp_path / "parts"))
    vector = fit(tmp_path / "parts", UNWANTED, config=replace(FAST, lr=None, epochs=1), allow_weak=True)
    assert vector.factors.keys() == linear_sites(model).keys()


def test_sites_that_the_model_never_runs_are_named(tmp_path: Path) -> None:
    """Mamba reads the weights of one of its layers without calling it."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, state_size=4, num_hidden_layers=2)
    save_model(MambaForCausalLM(config), tmp_path)
    with pytest.raises(ArmError, match=r"2 of 8 sites had no gradient, first backbone\.layers\.0\.mixer\.dt_proj"):
        fit(tmp_path, UNWANTED, config=replace(FAST, epochs=1), allow_weak=True)


def test_a_model_that_gives_no_numbers_is_refused(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    torch.nn.init.constant_(model.get_output_embeddings().weight, float("nan"))
    load_tokenizer(folder).save_pretrained(save_model(model, tmp_path))
    with pytest.raises(InputError, match="the model gives the unwanted rows a loss of nan nats/token: is it damaged"):
        fit(tmp_path, UNWANTED, kind="trait", config=FAST)
