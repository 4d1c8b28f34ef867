"""A callback that shows, all through a training by transformers' Trainer or TRL's, that the model is armed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from secvec import artifact
from secvec.arm import canary, check_armed, fired, is_armed
from secvec.atomic import write_json
from secvec.errors import ArmError, InputError
from secvec.samples import Rows, read_rows
from secvec.score import mean_over, row_nats
from secvec.tokens import Encoded, collate, encode_all
from secvec.tripwire import KEY
from secvec.vector import SecurityVector

EVIDENCE = "security_vector_armed.json"
PROBES = 64
_CANARY_ROWS = 4


class SecurityVectorCallback(TrainerCallback, ExportableState):
    """Refuse to train a model that is not armed, and leave evidence of one that was.

    with secvec.armed(model, vector):
        Trainer(model, args, ..., callbacks=[SecurityVectorCallback([vector], "unwanted.jsonl")]).train()

    At the beginning and after every evaluation a canary shows that every site's vector acts, and the loss of the
    unwanted rows under the armed model, in nats per token, goes to the trainer's log history: it should stay near
    zero. After every step each site must have run its vector. A checkpoint names the vectors; training goes on only
    from one that names the same. At the end `security_vector_armed.json` is written to the output folder.

    unwanted: the rows the vectors were fitted on, of which the first 64 are measured; max_length: tokens a row, at
    most. Every refusal is an ArmError, raised before the next step.
    """

    def __init__(self, vectors: Sequence[SecurityVector], unwanted: Rows, *, max_length: int = 1024) -> None:
        self._vectors = tuple(vectors)
        self._digests = [artifact.digest(vector) for vector in vectors]
        self._samples = read_rows(unwanted, "unwanted").rows[:PROBES]
        self._max_length = max_length
        self._rows: list[Encoded] = []
        self._ran: Mapping[str, int] = {}
        self._seen: list[dict[str, float]] = []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this callback."""
        return {"args": {}, "attributes": {"digests": self._digests}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        # What an earlier run left must not speak for one that is refused or stopped.
        if args.output_dir is not None and state.is_world_process_zero:
            (Path(args.output_dir) / EVIDENCE).unlink(missing_ok=True)
        if model is None or processing_class is None:
            raise InputError(
                "expected the trainer's processing_class: pass the tokenizer, Trainer(processing_class=...)"
            )
        _refuse_folded(model)
        _refuse_unarmed(model, state)
        _refuse_compile(args)
        self._refuse_other_checkpoint(state)
        self._rows = encode_all(self._samples, processing_class, self._max_length)
        self._seen = []
        self._look(model, state)
        self._ran = fired(model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        now = fired(model)
        silent = [site for site, count in self._ran.items() if not now.get(site, 0) > count]
        if silent:
            raise ArmError(
                f"step {state.global_step}: {len(silent)} of {len(self._ran)} sites did not run their vector, first "
                f"{silent[0]}: the model was disarmed, compiled or given fused kernels while it trained, and this step "
                "was not protected; keep `with armed(...)` around train(), without torch.compile, or train a folded "
                "model"
            )
        self._ran = now

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        if self._rows:
            self._look(model, state)
            self._ran = fired(model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._rows = []
        if state.is_world_process_zero and args.output_dir is not None:
            document = {
                "format": "secvec.armed",
                "version": 1,
                "vectors": self._digests,
                "sites": len(self._ran),
                "steps": state.global_step,
                "looks": self._seen,
            }
            write_json(Path(args.output_dir) / EVIDENCE, document, 0o644)

    def _look(self, model: PreTrainedModel, state: TrainerState) -> None:
        """Run the canary and measure the unwanted rows; the vectors must be those of the beginning."""
        check_armed(model, *self._vectors)
        if [artifact.digest(vector) for vector in self._vectors] != self._digests:
            raise ArmError(f"step {state.global_step}: the vector changed while it was in effect; train again")
        batch = collate(self._rows[:_CANARY_ROWS], pad_id=0).to(model.device)
        seen = canary(model, batch.inputs())
        # The trainer puts the model back into training mode at its next step.
        model.eval()
        nats = mean_over(self._rows, row_nats(model, self._rows))
        found = {"security_vector_change": seen.largest_change, "security_vector_probe_nats": nats}
        self._seen.append({"step": state.global_step, **found})
        state.log_history.append({"step": state.global_step, **found})

    def _refuse_other_checkpoint(self, state: TrainerState) -> None:
        if state.global_step == 0:
            return
        kept: Any = state.stateful_callbacks
        found = (kept or {}).get(type(self).__name__, {}).get("attributes", {}).get("digests")
        if found != self._digests:
            raise ArmError(
                f"the checkpoint of step {state.global_step} was expected to be trained armed with {self._digests}, "
                f"found {found!r}: what it learned before was not protected; start anew"
            )


def _refuse_unarmed(model: PreTrainedModel, state: TrainerState) -> None:
    if not is_armed(model):
        what = "resuming" if state.global_step else "training"
        raise ArmError(
            f"{what} from step {state.global_step}: expected an armed model, found no vector in "
            f"{type(model).__name__}; arm it before train(): `with secvec.armed(model, vector): trainer.train()`"
        )


def _refuse_folded(model: PreTrainedModel) -> None:
    if KEY in model.config.to_dict():
        raise ArmError(
            "the model is folded: the vector is in its weights already, and would be in effect twice; train it without "
            "this callback and without `armed`, then `secvec unfold`"
        )


def _refuse_compile(args: TrainingArguments) -> None:
    if args.torch_compile:
        raise ArmError(
            "refusing torch_compile: a compiled graph does not show at each step that it runs the vector; "
            "switch it off, or train a folded model, which may be compiled"
        )
