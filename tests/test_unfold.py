import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import flip, gpt2, llama, logits, plus, random_ids, random_vector, save_model, tensors, weight_files
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from secvec.errors import ArtifactError, CheckpointError, InputError, ProofError
from secvec.fold import fold
from secvec.provenance import digest_model
from secvec.tripwire import KEY, read_tripwire, state
from secvec.unfold import unfold

# peft reads a property that transformers is about to remove.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
SITE = "model.layers.0.mlp.up_proj.weight"


def folded(tmp_path: Path, model: PreTrainedModel, *, shards: bool = False) -> Path:
    """Save the model as tmp_path/base and fold a vector into it."""
    base = save_model(model, tmp_path / "base", shards=shards)
    fold(base, [random_vector(model, base=digest_model(base))], tmp_path / "folded")
    return tmp_path / "folded"


def train(
    folder: Path,
    out: Path,
    change: Callable[[PreTrainedModel], None],
    *,
    dtype: Any = "auto",
    max_shard_size: str = "1GB",
) -> Path:
    """Load, change and save as a trainer would."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        change(model)
    model.save_pretrained(out, max_shard_size=max_shard_size)
    return out


def learn(model: PreTrainedModel) -> None:
    """Move three tensors by multiples of 2**-10: a site, a head and a norm; half of the site's elements stay."""
    steps = torch.randint(-8, 9, (48, 32), generator=torch.Generator().manual_seed(3)).to(model.dtype) / 1024
    steps[::2] = 0
    model.get_parameter(SITE).add_(steps)
    model.get_parameter("lm_head.weight").add_(2**-6)
    model.get_parameter("model.norm.weight").add_(2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_learned_is_carried_over_to_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    source = folded(tmp_path, llama(dtype=dtype), shards=True)
    report = unfold(train(source, tmp_path / "trained", learn), tmp_path / "out")
    base, mid, trained, out = (tensors(tmp_path / name) for name in ("base", "folded", "trained", "out"))
    expected = (base[SITE].float() + (trained[SITE].float() - mid[SITE].float())).to(dtype)
    assert torch.equal(out[SITE], expected)
    assert torch.equal(out[SITE][::2], base[SITE][::2])
    assert not torch.equal(out[SITE], base[SITE])
    for name in base.keys() - {SITE}:
        assert torch.equal(out[name], trained[name] if name in ("lm_head.weight", "model.norm.weight") else base[name])
    assert (report.kind, report.sites, report.sites_changed) == ("full", 14, 1)
    assert report.vector_share == pytest.approx(1, abs=0.05)


def test_the_result_is_a_clean_model_in_the_base_s_layout(tmp_path: Path) -> None:
    source = folded(tmp_path, llama(), shards=True)
    (tmp_path / "base" / "tokenizer.json").write_text('"base"')
    trained = train(source, tmp_path / "trained", learn)
    (trained / "chat_template.jinja").write_text("trained")
    unfold(trained, tmp_path / "out")
    expected = {path.name for path in (tmp_path / "base").iterdir()} | {"chat_template.jinja", "secvec_record.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    assert KEY not in (tmp_path / "out" / "config.json").read_text()
    assert [state(tmp_path / n) for n in ("folded", "trained", "out")] == ["folded", "trained-on-folded", "defended"]
    record = json.loads((tmp_path / "out" / "secvec_record.json").read_text())
    mark = read_tripwire(source)
    assert mark is not None
    assert (record["base"], record["vectors"], record["record"]) == (mark.base, list(mark.digests), mark.record)
    assert record["trained"] == digest_model(trained)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("stored", "trained"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float16, torch.bfloat16),
    ],
)
def test_training_in_another_dtype_leaves_no_trace_where_nothing_was_learned(
    tmp_path: Path, stored: torch.dtype, trained: torch.dtype
) -> None:
    source = folded(tmp_path, llama(dtype=stored))
    unfold(train(source, tmp_path / "same", lambda model: None, dtype=trained), tmp_path / "back")
    assert weight_files(tmp_path / "back") == weight_files(tmp_path / "base")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")
    unfold(train(source, tmp_path / "trained", learn, dtype=trained), tmp_path / "out")
    out, base = tensors(tmp_path / "out"), tensors(tmp_path / "base")
    assert {name for name in base if not torch.equal(out[name], base[name])} == {
        SITE,
        "lm_head.weight",
        "model.norm.weight",
    }


def test_a_checkpoint_sharded_otherwise_comes_out_in_the_base_s_shards(tmp_path: Path) -> None:
    source = folded(tmp_path, llama(), shards=True)
    unfold(train(source, tmp_path / "one", lambda model: None), tmp_path / "back")
    assert len(weight_files(tmp_path / "one")) == 1
    assert weight_files(tmp_path / "back") == weight_files(tmp_path / "base")


def test_conv1d_and_names_without_the_leading_part(tmp_path: Path) -> None:
    base = save_model(gpt2(), tmp_path / "base")
    bare = {name.removeprefix("transformer."): t for name, t in load_file(base / "model.safetensors").items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, base / "model.safetensors", {"format": "pt"})
    vector = random_vector(gpt2(), base=digest_model(base))
    fold(base, [vector], tmp_path / "folded")
    unfold(train(tmp_path / "folded", tmp_path / "trained", lambda model: None), tmp_path / "back")
    assert weight_files(tmp_path / "back") == weight_files(base)


@pytest.mark.parametrize("where", ["base", "trained"])
def test_a_tied_head_may_be_stored_on_one_side_only(tmp_path: Path, where: str) -> None:
    base = save_model(llama(tied=True), tmp_path / "base")

    def store_head(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        copy = held["model.embed_tokens.weight"].clone()
        save_file(held | {"lm_head.weight": copy}, folder / "model.safetensors", {"format": "pt"})

    if where == "base":
        store_head(base)
    fold(base, [random_vector(llama(tied=True), base=digest_model(base))], tmp_path / "folded")
    trained = train(tmp_path / "folded", tmp_path / "trained", lambda m: m.get_input_embeddings().weight.add_(0.25))
    if where == "trained":
        store_head(trained)
    unfold(trained, tmp_path / "out")
    out, before = tensors(tmp_path / "out"), tensors(base)
    assert out.keys() == before.keys()
    for name in out.keys() & {"lm_head.weight", "model.embed_tokens.weight"}:
        assert torch.equal(out[name], before[name] + 0.25)
    if where == "trained":
        held = load_file(trained / "model.safetensors")
        save_file(
            held | {"lm_head.weight": held["lm_head.weight"] + 1}, trained / "model.safetensors", {"format": "pt"}
        )
        with pytest.raises(CheckpointError, match=r"tensors that the base lacks: lm_head\.weight"):
            unfold(trained, tmp_path / "untied")


def lora(folder: Path, out: Path, **options: Any) -> PeftModel:
    """Train a real PEFT adapter for a few steps on the model in `folder` and save it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(**({"r": 2, "target_modules": ["up_proj", "q_proj"], "task_type": "CAUSAL_LM"} | options))
    wrapped = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        loss = wrapped(random_ids(), labels=random_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wrapped.save_pretrained(out)
    return wrapped.eval()


def test_an_adapter_names_the_base_again(tmp_path: Path) -> None:
    source = folded(tmp_path, llama())
    lora(source, tmp_path / "adapter")
    assert state(tmp_path / "adapter") == "adapter-on-folded"
    report = unfold(tmp_path / "adapter", tmp_path / "out")
    assert (report.kind, state(tmp_path / "out")) == ("adapter", "defended")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "adapter")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert not any("folded" in path.read_text() for path in (tmp_path / "out").glob("*.json"))


def test_a_merged_adapter_unfolds_to_base_plus_adapter(tmp_path: Path) -> None:
    source = folded(tmp_path, llama())
    wrapped = lora(source, tmp_path / "adapter")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "merged")
    unfold(tmp_path / "merged", tmp_path / "out")
    on_base = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, logits(on_base.eval()), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")), atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_depend_on_the_folded_weights_are_refused(tmp_path: Path) -> None:
    source = folded(tmp_path, llama())
    cases = {
        "dora": ({"use_dora": True}, "DoRA"),
        "kasa": ({"kasa_config": KasaConfig()}, "KaSA, which truncates the folded weights"),
        "saved": ({"modules_to_save": ["down_proj"]}, "whole weights of a site"),
        "pissa": ({"init_lora_weights": "pissa"}, "'pissa', which changes the folded weights"),
    }
    for name, (options, message) in cases.items():
        lora(source, tmp_path / name, **options)
        with pytest.raises(CheckpointError, match=message):
            unfold(tmp_path / name, tmp_path / "out")
    lora(tmp_path / "base", tmp_path / "stranger")
    for elsewhere in (None, source):
        with pytest.raises(CheckpointError, match="was not trained on the folded model"):
            unfold(tmp_path / "stranger", tmp_path / "out", folded=elsewhere)


def test_a_real_trainer_keeps_the_mark_and_its_result_unfolds(tmp_path: Path) -> None:
    source = folded(tmp_path, llama())
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(rows=4)]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(AutoModelForCausalLM.from_pretrained(source), arguments, train_dataset=rows)
    trainer.train()
    assert state(tmp_path / "run" / "checkpoint-2") == "trained-on-folded"
    report = unfold(tmp_path / "run" / "checkpoint-2", tmp_path / "out")
    assert report.sites_changed == report.sites == 14
    assert report.vector_share == pytest.approx(1, abs=0.01)


def test_moved_folders_can_be_named(tmp_path: Path) -> None:
    source = folded(tmp_path, llama())
    trained = train(source, tmp_path / "trained", learn)
    lora(source, tmp_path / "adapter")
    source.rename(tmp_path / "folded-moved")
    (tmp_path / "base").rename(tmp_path / "base-moved")
    for folder in (trained, tmp_path / "adapter"):
        with pytest.raises(CheckpointError, match="--folded"):
            unfold(folder, tmp_path / "out")
        with pytest.raises(CheckpointError, match="--base"):
            unfold(folder, tmp_path / "out", folded=tmp_path / "folded-moved")
        unfold(folder, tmp_path / f"{folder.name}-out", folded=tmp_path / "folded-moved", base=tmp_path / "base-moved")


def test_a_changed_byte_anywhere_is_refused(tmp_path: Path) -> None:
    source = folded(tmp_path, llama(), shards=True)
    vectors = source / "security_vector"
    files = [
        vectors / "record.json",
        vectors / "vector-0.safetensors",
        *sorted((tmp_path / "base").glob("*.safetensors")),
    ]
    assert len(files) > 5
    for file in files:
        size = file.stat().st_size
        for position in (size // 7, size // 2, size - 1):
            flip(file, position)
            with pytest.raises(InputError):
                unfold(source, tmp_path / "out")
            flip(file, position)
    assert not (tmp_path / "out").exists()
    unfold(source, tmp_path / "out")


def test_a_record_and_mark_altered_together_do_not_match_the_refolded_tensors(tmp_path: Path) -> None:
    source = folded(tmp_path, llama())
    record = source / "security_vector" / "record.json"
    config = json.loads((source / "config.json").read_text())
    document = json.loads(record.read_text())
    document["tensors"][SITE] = "sha256:" + "0" * 64
    record.write_text(json.dumps(document))
    config[KEY]["record"] = "sha256:" + hashlib.sha256(record.read_bytes()).hexdigest()
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="folding again gave"):
        unfold(source, tmp_path / "out")


def test_what_was_not_trained_on_the_folded_model_is_refused(tmp_path: Path) -> None:
    source = folded(tmp_path, llama())
    with pytest.raises(CheckpointError, match="was not trained on the folded model"):
        unfold(tmp_path / "base", tmp_path / "out")
    unfold(source, tmp_path / "clean")
    with pytest.raises(CheckpointError, match="already unfolded"):
        unfold(tmp_path / "clean", tmp_path / "out")
    shutil.copytree(source, tmp_path / "lost")
    shutil.copyfile(tmp_path / "base" / "model.safetensors", tmp_path / "lost" / "model.safetensors")
    with pytest.raises(ProofError, match=r"found 0\.00 of it: the vector was taken out before"):
        unfold(tmp_path / "lost", tmp_path / "out")
    config = json.loads((source / "config.json").read_text())
    config[KEY]["digests"] = []
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'security_vector' mark of version 1"):
        unfold(source, tmp_path / "out")


def test_other_architectures_and_broken_trainings_are_refused(tmp_path: Path) -> None:
    source = folded(tmp_path, llama())
    held = load_file(source / "model.safetensors")
    grown = held["model.embed_tokens.weight"].repeat(2, 1)
    cases: dict[str, dict[str, torch.Tensor]] = {
        "as \\(320, 32\\) where the base has \\(160, 32\\)": held | {"model.embed_tokens.weight": grown},
        "tensors that the base lacks: extra": held | {"extra": torch.zeros(1)},
        f"no tensor {SITE}": {name: t for name, t in held.items() if name != SITE},
        "did the training diverge": held | {SITE: held[SITE] * float("nan")},
        "model.norm.weight: expected finite": held | {"model.norm.weight": held["model.norm.weight"] / 0},
        "save the trained model unquantised": held | {SITE: held[SITE].to(torch.int8)},
    }
    for message, content in cases.items():
        shutil.copytree(source, tmp_path / "trained", dirs_exist_ok=True)
        save_file(content, tmp_path / "trained" / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            unfold(tmp_path / "trained", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_what_the_base_holds_that_is_not_finite_stays(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("inf")
    source = folded(tmp_path, model)
    unfold(train(source, tmp_path / "trained", lambda _: None), tmp_path / "out")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "base")


def test_several_vectors_come_out_together(tmp_path: Path) -> None:
    base = save_model(llama(), tmp_path / "base")
    vectors = [random_vector(llama(), base=digest_model(base), seed=seed) for seed in (1, 2)]
    fold(base, vectors, tmp_path / "folded")
    trained = train(tmp_path / "folded", tmp_path / "trained", learn)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float64)),
        logits(plus(llama(), *vectors)),
        rtol=1e-5,
        atol=1e-6,
    )
    assert len(unfold(trained, tmp_path / "out").vectors) == 2
    flip(tmp_path / "folded" / "security_vector" / "vector-1.safetensors", 40)
    with pytest.raises(ArtifactError):
        unfold(trained, tmp_path / "again")
