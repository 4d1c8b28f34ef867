"""The proof: it holds for honest runs of every kind of model, and each of its checks can fail."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_vector as any_vector
from checkpoints import tiny
from models import rows
from peft import LoraConfig, get_peft_model
from runs import UNWANTED, fitted_vector, gpt2, llama, random_vector
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from secvec.artifact import save
from secvec.errors import ProofError
from secvec.fold import fold
from secvec.models import load_tokenizer
from secvec.origin import vector_path
from secvec.peft_format import to_peft
from secvec.proof import Evidence, proof_lines, prove
from secvec.provenance import digest_file, digest_model
from secvec.samples import from_rows
from secvec.sites import linear_sites
from secvec.tokens import Encoded, encode_all
from secvec.tripwire import PROVENANCE
from secvec.unfold import unfold
from secvec.vector import SecurityVector

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
SITE = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
Train = Callable[[Path, Path], None]


def train_fully(folded: Path, trained: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Move every weight a little, as a trainer would, and save as one does."""
    model = AutoModelForCausalLM.from_pretrained(folded, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator).to(dtype)
    model.save_pretrained(trained)


def train_in_bfloat16(folded: Path, trained: Path) -> None:
    train_fully(folded, trained, dtype=torch.bfloat16)


def train_adapter(folded: Path, trained: Path, *, seed: int = 4) -> None:
    model = AutoModelForCausalLM.from_pretrained(folded)
    is_conv = model.config.model_type == "gpt2"
    config = LoraConfig(r=4, target_modules=list(linear_sites(model)), task_type="CAUSAL_LM", fan_in_fan_out=is_conv)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(str(trained))


def encoded(base: Path, chats: Sequence[dict[str, Any]]) -> list[Encoded]:
    return encode_all(from_rows(chats).rows, load_tokenizer(base), 128)


def evidence(
    base: Path, folder: Path, vectors: Sequence[SecurityVector], train: Train, *, unwanted: bool = False
) -> Evidence:
    """Fold, train and unfold in `folder`; no trainer is needed for what the proof looks at."""
    folded, trained, result = (folder / name for name in ("folded", "trained", "result"))
    fold(base, vectors, folded)
    train(folded, trained)
    report = unfold(trained, result, folded=folded, base=base)
    method = "lora" if report.kind == "adapter" else "full"
    probes = [encoded(base, UNWANTED)] * len(vectors) if unwanted else []
    return Evidence(method, base, folded, trained, result, vectors, report, encoded(base, rows(8)), probes)


@dataclass(frozen=True)
class Honest:
    full: Evidence
    lora: Evidence


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Honest:
    folder = tmp_path_factory.mktemp("honest")
    base = llama(folder / "base")
    vectors = [fitted_vector(base)]
    return Honest(
        evidence(base, folder / "full", vectors, train_fully, unwanted=True),
        evidence(base, folder / "lora", vectors, train_adapter, unwanted=True),
    )


def copied(honest: Evidence, folder: Path) -> Evidence:
    """Copy the folders of a run, to be tampered with."""
    names = ("folded", "trained", "result")
    for name in names:
        shutil.copytree(getattr(honest, name), folder / name)
    return replace(honest, folded=folder / "folded", trained=folder / "trained", result=folder / "result")


@pytest.fixture
def full(honest: Honest, tmp_path: Path) -> Evidence:
    return copied(honest.full, tmp_path)


@pytest.fixture
def lora(honest: Honest, tmp_path: Path) -> Evidence:
    return copied(honest.lora, tmp_path)


def edit(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def put(file: Path, name: str, tensor: Tensor) -> None:
    edit(file, lambda tensors: tensors.update({name: tensor}))


def nudge(file: Path, name: str, element: int) -> None:
    """Move one weight by the least step that its dtype knows."""

    def change(tensors: dict[str, Tensor]) -> None:
        flat = tensors[name].view(torch.int32).flatten()
        flat[element] ^= 1

    edit(file, change)


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(run: Evidence, words: str) -> None:
    with pytest.raises(ProofError, match=words):
        prove(run)


def test_an_honest_full_run_is_proved(honest: Honest) -> None:
    proof = prove(honest.full)
    assert proof["vector"]["before"] == proof["vector"]["after"]
    assert proof["models"]["result"] == digest_model(honest.full.result)
    assert proof["armed"]["sites_fired"] == 14
    assert proof["disarmed"] == {"state": "defended", "sites_without_vector": 14, "tensors_exact": 21}
    assert proof["logits"]["largest_difference"] <= 1e-4 and proof["logits"]["prompts"] == 8
    (probe,) = proof["unwanted"]
    assert probe["armed_nats"] < 1 < probe["aligned_nats"] and abs(probe["share_of_the_way_to_armed"]) < 0.1
    assert json.loads(json.dumps(proof)) == proof
    assert len(proof_lines(proof)) == 4


def test_an_honest_adapter_is_proved(honest: Honest) -> None:
    proof = prove(honest.lora)
    assert proof["disarmed"] == {"state": "defended", "base": str(honest.lora.base)}
    assert proof["logits"]["largest_difference"] < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("train", [train_fully, train_adapter])
def test_dtypes_and_tied_heads(tmp_path: Path, dtype: torch.dtype, tied: bool, train: Train) -> None:
    base = llama(tmp_path / "base", dtype=dtype, tied=tied)
    vectors = [random_vector(base), random_vector(base, seed=2)]
    assert len(prove(evidence(base, tmp_path, vectors, train))["vector"]["before"]) == 2


def test_training_in_fewer_bits_than_the_base_has(tmp_path: Path) -> None:
    base = llama(tmp_path / "base")
    run = evidence(base, tmp_path, [random_vector(base)], train_in_bfloat16)
    assert prove(run)["logits"]["largest_difference"] < 1e-4


@pytest.mark.parametrize("bare", [False, True], ids=["whole", "bare"])
@pytest.mark.parametrize("train", [train_fully, train_adapter])
def test_gpt2(tmp_path: Path, bare: bool, train: Train) -> None:
    base = gpt2(tmp_path / "base", bare=bare)
    run = evidence(base, tmp_path, [random_vector(base)], train)
    prove(run)
    if train is train_fully:
        site = "h.0.attn.c_attn.weight" if bare else "transformer.h.0.attn.c_attn.weight"
        put(run.result / WEIGHTS, site, load_file(run.folded / WEIGHTS)[site])
        refused(run, f"{site}: expected W_base")


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gemma3"])
def test_models_whose_tensors_have_other_names_in_memory(tmp_path: Path, architecture: str) -> None:
    base = tmp_path / "base"
    model = tiny(architecture)
    model.save_pretrained(base)
    vector = any_vector(model, base=digest_model(base))
    folded, trained, result = (tmp_path / name for name in ("folded", "trained", "result"))
    fold(base, [vector], folded)
    train_fully(folded, trained)
    report = unfold(trained, result)
    ids = Encoded(tuple(range(3, 20)), (True,) * 17)
    prove(Evidence("full", base, folded, trained, result, [vector], report, [ids], []))


def test_another_vector_in_the_folded_folder(full: Evidence) -> None:
    save(random_vector(full.base), vector_path(full.folded, 0))
    refused(full, "folded: the vector changed")


def test_a_damaged_vector_in_the_folded_folder(full: Evidence) -> None:
    vector_path(full.folded, 0).write_bytes(b"")
    refused(full, "cannot be proved clean")


def test_a_lost_vector_in_the_folded_folder(full: Evidence) -> None:
    vector_path(full.folded, 0).unlink()
    refused(full, "cannot be proved clean")


def test_another_vector_was_taken_out(full: Evidence) -> None:
    refused(replace(full, report=replace(full.report, vectors=("sha256:other",))), "result: the vector changed")


def test_more_vectors_were_folded_in_than_given(full: Evidence) -> None:
    refused(replace(full, report=replace(full.report, vectors=(*full.report.vectors, "sha256:two"))), "vector changed")


def test_another_base(full: Evidence, tmp_path: Path) -> None:
    shutil.copytree(full.base, tmp_path / "base")
    nudge(tmp_path / "base" / WEIGHTS, EMBEDDING, 5)
    refused(replace(full, base=tmp_path / "base"), "the base model changed")


def test_trained_weights_that_were_altered_after_unfolding(full: Evidence) -> None:
    nudge(full.trained / WEIGHTS, SITE, 5)
    refused(full, "the trained model changed")


def test_a_folded_site_without_the_vector(full: Evidence) -> None:
    put(full.folded / WEIGHTS, SITE, load_file(full.base / WEIGHTS)[SITE])
    refused(full, f"found 1 other tensors, first {SITE}")


def test_a_folded_site_with_more_than_the_vector(full: Evidence) -> None:
    edit(full.folded / WEIGHTS, lambda tensors: tensors[SITE].__setitem__((3, 3), 0.5))
    refused(full, f"found 1 other tensors, first {SITE}")


def test_a_folded_site_that_is_off_by_one_step(full: Evidence) -> None:
    nudge(full.folded / WEIGHTS, SITE, 5)
    refused(full, SITE)


def test_a_folded_tensor_that_is_no_site(full: Evidence) -> None:
    nudge(full.folded / WEIGHTS, EMBEDDING, 5)
    refused(full, f"found 1 other tensors, first {EMBEDDING}")


def test_a_result_that_holds_the_vector_at_one_site(full: Evidence) -> None:
    put(full.result / WEIGHTS, SITE, load_file(full.trained / WEIGHTS)[SITE])
    refused(full, f"{SITE}: expected W_base")


@pytest.mark.parametrize("name", [SITE, EMBEDDING, "model.norm.weight", "lm_head.weight"])
def test_a_result_with_an_altered_tensor(full: Evidence, name: str) -> None:
    nudge(full.result / WEIGHTS, name, 7)
    refused(full, f"{name}: expected W_base")


def test_a_result_that_lacks_a_tensor_or_has_one_more(full: Evidence) -> None:
    put(full.result / WEIGHTS, "model.extra", torch.zeros(3))
    refused(full, "expected 21 tensors, found 22")
    edit(full.result / WEIGHTS, lambda tensors: (tensors.pop("model.extra"), tensors.pop(SITE)))
    refused(full, f"{SITE}: expected W_base")


def test_a_result_in_another_dtype(full: Evidence) -> None:
    edit(full.result / WEIGHTS, lambda tensors: tensors.update({SITE: tensors[SITE].half()}))
    refused(full, f"{SITE}: expected W_base")


def test_a_result_that_is_not_finite(full: Evidence) -> None:
    edit(full.result / WEIGHTS, lambda tensors: tensors[SITE].__setitem__((0, 0), torch.nan))
    refused(full, f"{SITE}: expected W_base")


def test_a_result_that_carries_the_mark(full: Evidence) -> None:
    shutil.copyfile(full.trained / "config.json", full.result / "config.json")
    refused(full, "expected a defended model, found 'trained-on-folded'")


def test_a_result_whose_mark_is_damaged(full: Evidence) -> None:
    edit_json(full.result / "config.json", security_vector={"state": "gone"})
    refused(full, "cannot be proved clean")


def test_a_result_without_its_record(full: Evidence) -> None:
    (full.result / PROVENANCE).unlink()
    refused(full, "expected a defended model, found 'plain'")


def test_a_result_whose_config_computes_something_else(full: Evidence) -> None:
    edit_json(full.result / "config.json", rms_norm_eps=0.5)
    refused(full, "expected the logits of W_base")


def test_a_result_that_is_no_model(full: Evidence) -> None:
    (full.result / WEIGHTS).write_bytes(b"")
    refused(full, "cannot be proved clean")


def learn_the_vector(vector: SecurityVector) -> Train:
    """Train as if W itself had moved by D: what the defence is there to prevent."""

    def train(folded: Path, trained: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folded)
        for site, module in linear_sites(model).items():
            module.weight.data += vector.delta(site).float()
        model.save_pretrained(trained)

    return train


def test_a_model_that_has_learned_the_unwanted_rows(honest: Honest, tmp_path: Path) -> None:
    vectors = honest.full.vectors
    run = evidence(honest.full.base, tmp_path, vectors, learn_the_vector(vectors[0]), unwanted=True)
    refused(run, "has learned the unwanted behaviour")


def test_an_adapter_that_has_learned_the_unwanted_rows(honest: Honest, tmp_path: Path) -> None:
    vectors = honest.lora.vectors
    run = evidence(honest.lora.base, tmp_path, vectors, lambda f, t: to_peft(vectors[0], t, str(f)), unwanted=True)
    refused(run, "has learned the unwanted behaviour")


def test_unwanted_rows_that_the_vector_does_not_explain(full: Evidence) -> None:
    refused(replace(full, unwanted=[encoded(full.base, rows(8))]), "does not explain these unwanted rows")


def test_a_vector_that_rounding_swallows(tmp_path: Path) -> None:
    base = llama(tmp_path / "base", dtype=torch.bfloat16)
    run = evidence(base, tmp_path, [random_vector(base, size=1e-4)], train_fully)
    refused(run, "lost in the rounding of the weights")


def test_another_adapter_in_the_result(lora: Evidence, tmp_path: Path) -> None:
    train_adapter(lora.folded, tmp_path / "other", seed=5)
    shutil.copyfile(tmp_path / "other" / ADAPTER, lora.result / ADAPTER)
    refused(lora, "expected the adapter that was trained, found another one")


def test_another_adapter_in_the_place_of_the_trained_one(lora: Evidence, tmp_path: Path) -> None:
    train_adapter(lora.folded, tmp_path / "other", seed=5)
    for folder in (lora.trained, lora.result):
        shutil.copyfile(tmp_path / "other" / ADAPTER, folder / ADAPTER)
    refused(lora, "the trained model changed")


@pytest.mark.parametrize(("key", "value"), [("lora_alpha", 64), ("target_modules", ["up_proj"]), ("use_rslora", True)])
def test_an_adapter_whose_settings_were_altered(lora: Evidence, key: str, value: Any) -> None:
    edit_json(lora.result / "adapter_config.json", **{key: value})
    refused(lora, f"expected the trained adapter's {key}")


def test_an_adapter_that_names_the_folded_model(lora: Evidence) -> None:
    edit_json(lora.result / "adapter_config.json", base_model_name_or_path=str(lora.folded))
    refused(lora, "found 'adapter-on-folded'")


def test_an_adapter_that_is_not_finite(lora: Evidence) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        next(iter(tensors.values()))[0, 0] = torch.nan

    for folder in (lora.trained, lora.result):
        edit(folder / ADAPTER, spoil)
    report = replace(lora.report, trained=digest_file(lora.trained / ADAPTER))
    refused(replace(lora, report=report), "not finite")
