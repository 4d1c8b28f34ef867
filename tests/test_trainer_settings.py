"""Settings of TRL's trainer that it would stumble over in the middle of a run: refused in one line."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import rows, tiny_llama

from secvec.errors import UsageError
from secvec.train import TrainConfig, check, train

QUICK = TrainConfig(lr=1e-3, epochs=1, batch_size=64)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("trainer_settings") / "base")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_steps": 1.5}, "trainer.max_steps: expected a whole number, found 1.5"),
        ({"max_steps": "many"}, "trainer.max_steps: expected a whole number, found 'many'"),
        ({"max_grad_norm": "high"}, "trainer.max_grad_norm: expected a number, found 'high'"),
        ({"weight_decay": True}, "trainer.weight_decay: expected a number, found True"),
        ({"dataloader_drop_last": True, "max_steps": 3}, "24 rows are fewer than one step of 64"),
        ({"adam_beta1": 2}, "refuses its settings: Invalid beta parameter"),
        ({"optim_args": "foo"}, "refuses its settings: not enough values"),
        ({"optim": "galore_adamw"}, "refuses its settings: You need to install `galore_torch`"),
        ({"lr_scheduler_kwargs": {"foo": 1}}, "refuses its settings: .* unexpected keyword argument 'foo'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "refuses its settings: One of min_lr or min_lr_rate"),
        pytest.param(
            {"activation_offloading": True},
            "there is no GPU",
            marks=pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_is_refused_before_the_long_work(base: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        check(base, rows(24), config=replace(QUICK, trainer=settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"loss_type": "steep"}, "the trainer refuses its settings: Invalid `loss_type` steep"),
        (
            {"optim": "galore_adamw", "optim_target_modules": ["q_proj"]},
            "the trainer refuses its settings: You need to install `galore_torch`",
        ),
    ],
)
def test_settings_that_the_trainer_refuses_when_it_starts(
    tmp_path: Path, base: Path, settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        train(base, rows(), tmp_path / "run", config=replace(QUICK, trainer=settings))
