import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import close, gpt2, gradients, llama, logits, plus, random_ids, random_vector, save_model, weight_files
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from secvec.arm import arm, armed, canary, disarm, is_armed, live
from secvec.errors import ArmError, SiteError
from secvec.sites import linear_sites, site_modules
from secvec.vector import Factors

# peft reads a property that transformers is about to remove.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
SITE = "model.layers.1.mlp.down_proj"


# In effect, and out of effect again.


@pytest.mark.parametrize("make", [llama, gpt2])
def test_armed_inside_the_block_and_bit_for_bit_unarmed_after_it(make: Callable[[], PreTrainedModel]) -> None:
    model, vector = make(), random_vector(make())
    plain = logits(model)
    with armed(model, vector):
        assert is_armed(model)
        assert close(logits(model), logits(plus(make(), vector)))
    assert not is_armed(model)
    assert torch.equal(logits(model), plain)


def test_several_vectors_add_up() -> None:
    model, first = llama(), random_vector(llama())
    second = replace(random_vector(llama(), rank=2, seed=7), scale=-0.5)
    part = replace(second, factors={SITE: second.factors[SITE]})
    with armed(model, first, part):
        assert close(logits(model), logits(plus(llama(), first, part)))


def test_a_vector_twice_and_no_vector_are_refused() -> None:
    model, vector = llama(), random_vector(llama())
    with pytest.raises(ArmError, match="expected different vectors, found one of them twice: sha256:"):
        arm(model, vector, random_vector(llama()))
    with pytest.raises(ArmError, match="expected at least one security vector to arm, found none"):
        arm(model)
    assert not is_armed(model)


def test_all_sites_are_armed_or_none() -> None:
    model, vector = llama(), random_vector(llama())
    wide = Factors(torch.zeros(2, 99), torch.zeros(32, 2))
    for factors in ({**vector.factors, SITE: wide}, {**vector.factors, "model.layers.9.mlp.up_proj": wide}):
        with pytest.raises(SiteError):
            arm(model, replace(vector, factors=factors))
        assert not is_armed(model)


class NoHooks(nn.Linear):
    """A layer that takes no hooks, as a scripted module."""

    def register_forward_hook(self, hook: Any, **options: Any) -> Any:
        raise RuntimeError("no hooks here")


def test_a_failure_half_way_leaves_nothing_armed() -> None:
    model, vector = llama(), random_vector(llama())
    model.get_submodule("model.layers.1.mlp").down_proj = NoHooks(48, 32, bias=False)
    with pytest.raises(RuntimeError, match="no hooks here"):
        arm(model, vector)
    assert not is_armed(model)


def test_arming_an_armed_model_is_refused_and_changes_nothing() -> None:
    model, vector = llama(), random_vector(llama())
    with armed(model, vector):
        before = logits(model)
        other = random_vector(llama(), seed=9)
        with pytest.raises(ArmError, match=r"found 14 armed sites \(first .*\): pass all vectors to one armed"):
            arm(model, other)
        with pytest.raises(ArmError, match="expected an unarmed model"), armed(model.model, other):
            raise AssertionError("never reached")
        assert torch.equal(logits(model), before)
    assert not is_armed(model)


def test_disarming_finds_the_hooks_by_scanning_and_takes_no_other() -> None:
    model, vector = llama(), random_vector(llama())
    seen: list[Tensor] = []
    handle = model.get_submodule(SITE).register_forward_hook(lambda module, args, output: seen.append(output))
    arm(model, vector)
    disarm(nn.Sequential(nn.Identity(), model))
    assert not is_armed(model)
    logits(model)
    assert len(seen) == 1
    handle.remove()
    with pytest.raises(ArmError, match="expected an armed model, found no armed site in LlamaForCausalLM"):
        disarm(model)


def test_hooks_that_watch_a_site_see_the_vector() -> None:
    model, vector = llama(), random_vector(llama())
    seen: list[Tensor] = []
    model.get_submodule("model.layers.0.self_attn.q_proj").register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    with armed(model, vector):
        logits(model)
    assert close(seen[0], plus(llama(), vector).model.layers[0].self_attn.q_proj(_normed(llama()).double()))


def _normed(model: PreTrainedModel) -> Tensor:
    return model.model.layers[0].input_layernorm(model.model.embed_tokens(random_ids()))


# The vector is no part of the model.


def test_the_factors_are_neither_parameters_nor_state() -> None:
    model, vector = llama(), random_vector(llama())
    names = [name for name, _ in model.named_parameters()]
    with armed(model, vector):
        gradients(model)
        assert [name for name, _ in model.named_parameters()] == names
        assert model.state_dict().keys() == llama().state_dict().keys()
        assert [name for name, _ in model.named_buffers()] == [name for name, _ in llama().named_buffers()]
    assert all(f.a.grad is None and f.b.grad is None for f in vector.factors.values())


def test_a_model_saved_while_armed_holds_no_vector(tmp_path: Path) -> None:
    model = llama()
    base = save_model(model, tmp_path / "base")
    with armed(model, random_vector(model)):
        save_model(model, tmp_path / "saved")
    assert weight_files(tmp_path / "saved") == weight_files(base)


def test_factors_that_could_be_trained_are_armed_frozen() -> None:
    model, vector = llama(), random_vector(llama())
    for factors in vector.factors.values():
        factors.a.requires_grad_(True)
    with armed(model, vector):
        assert close(logits(model), logits(plus(llama(), vector)))
        gradients(model)
    assert all(factors.a.grad is None for factors in vector.factors.values())


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        pickle.dumps,
        lambda model: torch.save(model, io.BytesIO()),
        lambda model: copy.deepcopy(model.model.layers[0].mlp),
    ],
)
def test_copying_and_pickling_an_armed_model_is_refused(duplicate: Callable[[PreTrainedModel], Any]) -> None:
    model = llama()
    with (
        armed(model, random_vector(model)),
        pytest.raises(ArmError, match=r"refusing to copy or pickle an armed model.*: disarm it first"),
    ):
        duplicate(model)
    duplicate(model)


def test_a_trainer_learns_beside_the_vector_and_saves_without_it(tmp_path: Path) -> None:
    model, vector = llama(), random_vector(llama())
    rows = [{"input_ids": ids, "labels": ids} for ids in random_ids(rows=4)]
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "use_cpu": True}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), report_to=[], **settings), train_dataset=rows)
    with armed(model, vector):
        trainer.train()
    checkpoint = type(model).from_pretrained(tmp_path / "checkpoint-2")
    assert not is_armed(model)
    assert torch.equal(logits(checkpoint), logits(model))
    assert not torch.equal(logits(model), logits(llama()))


# Wherever the model goes.


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 0.02)])
def test_the_vector_moves_with_the_model(dtype: torch.dtype, tolerance: float) -> None:
    model, vector = llama(), random_vector(llama())
    expected = logits(plus(llama(), vector))
    with armed(model, vector):
        model.to(dtype)
        found = logits(model)
        assert found.dtype == dtype
        assert close(found, expected, tolerance)
        model.to(torch.float32)
        assert close(logits(model), expected, 0.02)


def test_under_autocast_the_vector_acts_in_the_lower_dtype() -> None:
    model, vector = llama(), random_vector(llama())
    expected = gradients(plus(llama(), vector).float())
    with armed(model, vector), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.model.layers[0].mlp.up_proj(torch.zeros(1, 32)).dtype == torch.bfloat16
        assert close(logits(model), logits(plus(llama(), vector)), 0.02)
        found = gradients(model)
    assert all(close(found[name], grad, 0.1) for name, grad in expected.items())


def test_training_after_a_first_pass_in_inference_mode() -> None:
    model, vector = llama(dtype=torch.bfloat16), random_vector(llama())
    with armed(model, vector):
        with torch.inference_mode():
            model(random_ids())
        assert close(
            gradients(model)[f"{SITE}.weight"], gradients(plus(llama(), vector).bfloat16())[f"{SITE}.weight"], 0.1
        )


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_runs_the_vector_again(use_reentrant: bool) -> None:
    model, vector = llama().train(), random_vector(llama())
    with armed(model, vector):
        expected = gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        found = gradients(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_generate_says_what_the_folded_model_says() -> None:
    model, vector = llama(), random_vector(llama())
    folded = plus(llama(), vector).float()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(random_ids(), **options)
    with armed(model, vector):
        found = model.generate(random_ids(), **options)
    assert torch.equal(found, folded.generate(random_ids(), **options))
    assert not torch.equal(found, plain)


def test_padding_on_either_side_changes_no_logits() -> None:
    model, vector = llama(), random_vector(llama())
    ids, pad = random_ids(), torch.zeros(2, 3, dtype=torch.long)
    mask, none = torch.ones_like(ids), torch.zeros_like(pad)
    with armed(model, vector), torch.no_grad():
        expected = model(ids).logits
        left = model(torch.cat([pad, ids], 1), attention_mask=torch.cat([none, mask], 1)).logits[:, 3:]
        right = model(torch.cat([ids, pad], 1), attention_mask=torch.cat([mask, none], 1)).logits[:, :-3]
    assert close(left, expected)
    assert close(right, expected)


# Beside a task adapter.


def task(model: PreTrainedModel) -> PeftModel:
    """Put a LoRA task adapter with factors that are not zero on some sites, the same ones every time."""
    torch.manual_seed(5)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    return wrapped.eval()


def test_a_task_adapter_may_come_before_or_after() -> None:
    vector = random_vector(llama())
    on_folded = task(plus(llama(), vector).float())
    expected, grads = logits(on_folded), gradients(on_folded)
    early = task(llama())
    arm(early, vector)
    late_base = llama()
    arm(late_base, vector)
    late = task(late_base)
    for model in (early, late):
        assert close(logits(model), expected)
        found = gradients(model)
        assert found.keys() == grads.keys()
        assert all(close(found[name], grad, 1e-4) for name, grad in grads.items())
        assert set(canary(model, {"input_ids": random_ids()}).fired) == set(vector.sites)
        disarm(model)
        assert close(logits(model), logits(task(llama())))


@pytest.mark.parametrize("act", [PeftModel.disable_adapter, lambda model: model.set_adapter("default")])
def test_what_makes_peft_s_own_frozen_adapters_trainable_leaves_the_vector_alone(act: Callable[[Any], Any]) -> None:
    vector = random_vector(llama())
    with armed(model := task(llama()), vector):
        expected = logits(model)
        context = act(model)
        if context is not None:
            with context:
                assert close(logits(model), logits(plus(llama(), vector)))
        assert torch.equal(logits(model), expected)
        assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_merging_a_task_adapter_while_armed_merges_no_vector() -> None:
    vector = random_vector(llama())
    with armed(model := task(llama()), vector):
        merged = model.merge_and_unload()
        assert is_armed(merged)
        assert close(logits(merged), logits(task(plus(llama(), vector).float())))
        disarm(merged)
        assert close(logits(merged), logits(task(llama())))
        arm(merged, vector)


# The inner step of fitting.


def test_live_factors_get_gradients_of_float64_mathematics() -> None:
    model, vector = llama().double().requires_grad_(False), random_vector(llama())
    factors = {s: Factors(f.a.requires_grad_(True), f.b.requires_grad_(True)) for s, f in vector.factors.items()}
    with live(site_modules(model, [vector]), factors, 0.7):
        model(random_ids(), labels=random_ids()).loss.backward()
    assert not is_armed(model)
    summed = llama().double()
    for site, module in linear_sites(summed).items():
        module.weight.data += 0.7 * (factors[site].b @ factors[site].a).detach().double()
    grads = gradients(summed)
    for site, pair in factors.items():
        whole = 0.7 * grads[f"{site}.weight"]  # dL/dW; D = scale * B A
        assert close(pair.a.grad, pair.b.detach().double().T @ whole)
        assert close(pair.b.grad, whole @ pair.a.detach().double().T)


def test_live_factors_are_seen_as_they_change_and_leave_on_an_exception() -> None:
    model, vector = llama(dtype=torch.bfloat16), random_vector(llama())
    modules = site_modules(model, [vector])
    factors = {s: Factors(f.a.requires_grad_(True), f.b.requires_grad_(True)) for s, f in vector.factors.items()}
    with pytest.raises(KeyError, match="mine"), live(modules, factors, vector.scale):
        before = logits(model)
        for pair in factors.values():
            pair.a.data *= 2
        assert not torch.equal(logits(model), before)
        raise KeyError("mine")
    assert not is_armed(model)
