"""Lisa: lazy safety alignment (arXiv 2405.18641)."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from benchmarks.methods.loop import answer_loss, epochs, fine_tune, finish, trainee
from benchmarks.methods.method import Dial
from benchmarks.methods.runs import encoded
from benchmarks.methods.safe import safe_rows
from benchmarks.methods.setting import Setting
from secvec.tokens import Batch, Encoded

PROXIMAL = Dial("rho", 1.0, (0.1, 1.0, 10.0))
_SAFE_ROWS = 400
_TASK_STEPS, _SAFE_STEPS = 9, 1
_FREE_SHARE = 0.1


def lisa(setting: Setting) -> Path:
    """Alternate between the user's data and safe data; in each state stay near the weights the other one left.

    Huang et al.; the authors' code (git-disl/Lisa) was read. Reproduced: bi-state optimisation, the proximal term
    rho / 2 * ||w - w_other||^2 over all trained weights with rho 1, none during the first tenth of the steps, and their
    ratio of 900 task to 100 alignment steps, as 9 to 1: here a run has some 60 steps. Differs: safe data is not 10,000
    BeaverTails rows but 400 safe rows of the behaviour; alignment steps come on top of a full pass over the user's
    rows, where theirs replace it.
    """
    model = trainee(setting)
    task = epochs(encoded(setting, setting.training), setting.config)
    safe = encoded(setting, safe_rows(setting, _SAFE_ROWS))
    batches, states = _interleaved(task, safe, setting)
    fine_tune(model, batches, setting.config, _TwoStates(model, states, PROXIMAL.at(setting)))
    return finish(model, setting)


class _TwoStates:
    """The loss of each step: the answers', and the pull towards the weights that the other state left."""

    def __init__(self, model: nn.Module, states: Sequence[str], rho: float) -> None:
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._answers, self._states, self._rho = answer_loss(model), states, rho
        self._left, self._step = self._copy(), 0

    def __call__(self, batch: Batch) -> Tensor:
        if self._step and self._states[self._step] != self._states[self._step - 1]:
            self._left = self._copy()
        loss = self._answers(batch)
        if self._step > _FREE_SHARE * len(self._states):
            drift = sum((w - left).square().sum() for w, left in zip(self._trained, self._left, strict=True))
            loss = loss + self._rho / 2 * drift
        self._step += 1
        return loss

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._trained]


def _interleaved(
    task: Sequence[list[Encoded]], safe: Sequence[Encoded], setting: Setting
) -> tuple[list[list[Encoded]], list[str]]:
    """Return the batches of both states in turns, the alignment state first, and each step's state."""
    rng, size = random.Random(setting.config.seed), setting.config.batch_size * setting.config.grad_accumulation
    source = itertools.cycle(rng.sample(safe, len(safe)))
    batches: list[list[Encoded]] = []
    states: list[str] = []
    for start in range(0, len(task), _TASK_STEPS):
        chosen = task[start : start + _TASK_STEPS]
        batches += [*([*itertools.islice(source, size)] for _ in range(_SAFE_STEPS)), *chosen]
        states += ["safe"] * _SAFE_STEPS + ["task"] * len(chosen)
    return batches, states
