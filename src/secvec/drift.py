"""Watch a defended training: is the model, without its vectors, learning the unwanted rows all the same?

Imports transformers' trainer: import this module only where training starts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secvec.arm import armed
from secvec.drift_record import BOUND, drift_of
from secvec.probes import SHARE, Probe
from secvec.processes import alone
from secvec.vector import SecurityVector

POINTS = 10
"""Measurements in a training, evenly spaced."""
ROWS = 16
"""Unwanted rows a vector that are measured."""
_SLOWER = 0.1
Action = Literal["note", "stop", "slow"]


@dataclass(frozen=True)
class Watch:
    """What is watched in a training of a folded model. probes: by the vector's number, at least one."""

    probes: Mapping[int, Probe]
    vectors: Sequence[SecurityVector]
    action: Action


class DriftCallback(TrainerCallback):
    """Measure the probes with the vectors and without, write them among the metrics, and act where they drifted.

    The trained weights hold the vectors, so the disarmed model is they with the vectors' opposites in effect. Of
    several processes the main one measures and decides, and all of them act, in the same step. Comes
    after the callback that saves: the step at which training is stopped is not saved, for a run that goes on from there
    after a kill would train past it; from the checkpoint before it stops there again.
    """

    def __init__(self, watch: Watch, metrics: Path) -> None:
        self._watch, self._metrics = watch, metrics
        self._opposites = [replace(vector, scale=-vector.scale) for vector in watch.vectors]
        self._stopped = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        every = max(state.max_steps // POINTS, 1)
        if state.global_step % every or not alone(lambda: self._look(model, state.global_step)):
            return
        if self._watch.action == "stop":
            control.should_training_stop, control.should_save, self._stopped = True, False, True
        else:
            _slow(lr_scheduler)

    def _look(self, model: PreTrainedModel, step: int) -> bool:
        """Measure, write it down, and tell whether to act on it."""
        lines = self._measured(model)
        drifted = max(line["unwanted_share"] for line in lines) > BOUND
        acts = drifted and self._watch.action != "note" and not drift_of(self._metrics)["acted_at_step"]
        if acts:
            lines.append({"drift": self._watch.action})
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps({"step": step, **line}) + "\n" for line in lines))
        return acts

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._stopped:
            control.should_save = False

    def _measured(self, model: PreTrainedModel) -> list[dict[str, Any]]:
        was_training = model.training
        model.eval()
        probes = self._watch.probes
        with_vectors = [probe.nats(model) for probe in probes.values()]
        with armed(model, *self._opposites):
            without = [probe.measure(model) for probe in probes.values()]
        model.train(was_training)
        return [
            {
                "vector": number,
                "unwanted_aligned_nats": found["aligned_nats"],
                "unwanted_armed_nats": armed_nats,
                "unwanted_disarmed_nats": found["defended_nats"],
                "unwanted_share": found[SHARE],
            }
            for number, armed_nats, found in zip(probes, with_vectors, without, strict=True)
        ]


def _slow(scheduler: Any) -> None:
    """Lower the step size for the rest of a training; the scheduler's own state keeps that for a resume."""
    inner: Any = scheduler.scheduler if isinstance(scheduler, AcceleratedScheduler) else scheduler
    assert isinstance(inner, LambdaLR)
    inner.base_lrs = [_SLOWER * rate for rate in inner.base_lrs]
