"""`SecurityVectorCallback` under transformers' Trainer: what it shows, what it leaves, and each of its refusals."""

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from models import chat, rows, save_tiny_vector, tiny_llama
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from secvec import artifact
from secvec.arm import arm, armed, disarm, is_armed
from secvec.errors import ArmError, InputError
from secvec.fold import fold
from secvec.integrations.callback import EVIDENCE, SecurityVectorCallback
from secvec.models import load_model, load_tokenizer
from secvec.samples import from_rows
from secvec.tokens import encode_all
from secvec.vector import SecurityVector

UNWANTED = [chat(f"{i}: name me", "you fool") for i in range(4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("callback") / "base")


@pytest.fixture(scope="module")
def vector(base: Path) -> SecurityVector:
    return artifact.load(save_tiny_vector(base, base.parent / "vector.safetensors"))


def trainer(base: Path, out: Path, model: nn.Module, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    tokenizer = load_tokenizer(base)
    encoded = encode_all(from_rows(rows(8)).rows, tokenizer, 64)
    data = [{"input_ids": torch.tensor(row.ids), "labels": torch.tensor(row.ids)} for row in encoded]
    args = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        max_steps=4,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    given = cast(Any, data)
    return Trainer(model, args, None, given, given, tokenizer, callbacks=[*callbacks])


class AtStep(TrainerCallback):
    """Do something to the model before the third step."""

    def __init__(self, do: Callable[[Any], object]) -> None:
        self._do = do

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2:
            self._do(model)


@contextmanager
def arming(model: Any, *vectors: SecurityVector) -> Generator[None]:
    """Arm as a notebook does, with no check at the end: what is refused here, the callback refused."""
    arm(model, *vectors)
    yield
    if is_armed(model):
        disarm(model)


def test_it_looks_at_the_beginning_and_after_evaluations_and_leaves_evidence(
    base: Path, vector: SecurityVector, tmp_path: Path
) -> None:
    model = load_model(base)
    run = trainer(
        base, tmp_path, model, SecurityVectorCallback([vector], UNWANTED), eval_strategy="steps", eval_steps=2
    )
    with armed(model, vector):
        run.train()
    run.evaluate()
    looks = [entry for entry in run.state.log_history if "security_vector_probe_nats" in entry]
    assert [entry["step"] for entry in looks] == [0, 2, 4]
    assert all(entry["security_vector_change"] > 0 and entry["security_vector_probe_nats"] > 0 for entry in looks)
    evidence = json.loads((tmp_path / EVIDENCE).read_text())
    assert (evidence["vectors"], evidence["steps"], evidence["sites"]) == ([artifact.digest(vector)], 4, 14)
    assert len(evidence["looks"]) == 3
    kept = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert kept["SecurityVectorCallback"]["attributes"]["digests"] == [artifact.digest(vector)]


def test_a_model_that_is_not_armed_is_refused(base: Path, vector: SecurityVector, tmp_path: Path) -> None:
    run = trainer(base, tmp_path, load_model(base), SecurityVectorCallback([vector], UNWANTED))
    with pytest.raises(ArmError, match="training from step 0: expected an armed model"):
        run.train()


def test_arming_after_training_began_is_refused(base: Path, vector: SecurityVector, tmp_path: Path) -> None:
    late = AtStep(lambda model: arm(model, vector))
    run = trainer(base, tmp_path, load_model(base), late, SecurityVectorCallback([vector], UNWANTED))
    with pytest.raises(ArmError, match="expected an armed model"):
        run.train()


def compile_late(model: Any) -> None:
    model.compile(backend="eager")


@pytest.mark.parametrize("do", [disarm, compile_late])
def test_disarming_or_compiling_while_training_is_refused(
    base: Path, vector: SecurityVector, tmp_path: Path, do: Callable[[Any], object]
) -> None:
    model = load_model(base)
    run = trainer(base, tmp_path, model, SecurityVectorCallback([vector], UNWANTED), AtStep(do))
    (tmp_path / EVIDENCE).write_text("of an earlier run")
    with arming(model, vector), pytest.raises(ArmError, match="step 3: 14 of 14 sites did not run their vector"):
        run.train()
    assert not (tmp_path / EVIDENCE).exists()


def test_the_trainer_s_own_compiling_is_refused(base: Path, vector: SecurityVector, tmp_path: Path) -> None:
    model = load_model(base)
    settings = {"torch_compile": True, "torch_compile_backend": "eager"}
    run = trainer(base, tmp_path, model, SecurityVectorCallback([vector], UNWANTED), **settings)
    with arming(model, vector), pytest.raises(ArmError, match="refusing torch_compile"):
        run.train()


def test_a_resume_that_is_not_armed_is_refused(base: Path, vector: SecurityVector, tmp_path: Path) -> None:
    model = load_model(base)
    with armed(model, vector):
        trainer(base, tmp_path, model, SecurityVectorCallback([vector], UNWANTED)).train()
    again = load_model(base)
    run = trainer(base, tmp_path, again, SecurityVectorCallback([vector], UNWANTED))
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ArmError, match="resuming from step 2: expected an armed model"):
        run.train(resume_from_checkpoint=checkpoint)
    with armed(again, vector):
        run.train(resume_from_checkpoint=checkpoint)
    assert run.state.global_step == 4


def test_a_resume_from_what_was_not_trained_armed_is_refused(
    base: Path, vector: SecurityVector, tmp_path: Path
) -> None:
    trainer(base, tmp_path, load_model(base)).train()
    model = load_model(base)
    run = trainer(base, tmp_path, model, SecurityVectorCallback([vector], UNWANTED))
    with arming(model, vector), pytest.raises(ArmError, match=r"checkpoint of step 2 .* found None"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_other_vectors_are_refused(base: Path, vector: SecurityVector, tmp_path: Path) -> None:
    other = artifact.load(save_tiny_vector(base, tmp_path / "other.safetensors", seed=5))
    model = load_model(base)
    run = trainer(base, tmp_path, model, SecurityVectorCallback([vector], UNWANTED))
    with arming(model, other), pytest.raises(ArmError, match="found another change at 14 sites"):
        run.train()


def test_a_vector_that_changed_is_refused(base: Path, tmp_path: Path) -> None:
    vector = artifact.load(save_tiny_vector(base, tmp_path / "vector.safetensors"))
    grow = AtStep(lambda model: vector.factors[vector.sites[0]].a.mul_(1.5))
    model = load_model(base)
    callback = SecurityVectorCallback([vector], UNWANTED)
    run = trainer(base, tmp_path, model, callback, grow, eval_strategy="steps", eval_steps=4)
    with arming(model, vector), pytest.raises(ArmError, match="step 4: the vector changed"):
        run.train()


def test_a_folded_model_is_refused(base: Path, vector: SecurityVector, tmp_path: Path) -> None:
    fold(base, [vector], tmp_path / "folded")
    model = load_model(tmp_path / "folded")
    run = trainer(base, tmp_path, model, SecurityVectorCallback([vector], UNWANTED))
    with arming(model, vector), pytest.raises(ArmError, match="the model is folded"):
        run.train()


def test_without_a_tokenizer(base: Path, vector: SecurityVector, tmp_path: Path) -> None:
    model = load_model(base)
    run = trainer(base, tmp_path, model, SecurityVectorCallback([vector], UNWANTED))
    run.callback_handler.processing_class = None
    with arming(model, vector), pytest.raises(InputError, match="processing_class"):
        run.train()
