"""What a run of `train` is given, checked before anything is written."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec import artifact
from secvec.companions import model_config, tokens_a_row
from secvec.compatible import check_vector
from secvec.errors import CheckpointError, UsageError
from secvec.frames import frames_of, unframed
from secvec.launch import process_count
from secvec.models import load_model, load_tokenizer, on_device, resolve
from secvec.probes import Probe, probes_of
from secvec.provenance import digest_model, digest_samples, versions
from secvec.recall import Recalled, recall
from secvec.samples import Rows, Sample, Samples, read_rows
from secvec.settle import settles
from secvec.tokens import Encoded, encode_all
from secvec.train_config import TrainConfig
from secvec.trainer_settings import check_settings
from secvec.tripwire import refuse_folded
from secvec.vector import SecurityVector

PLAIN = "no --vector: trained without protection, the model may have learned anything that is in the data"
UNCALIBRATED = (
    "calibrate=false: the vector was used as it is, not calibrated for this file; the wanted skill may be learned less "
    "well than by plain training"
)
RECALLED = "no --unwanted: in place of these rows, what the vector itself brings back"


@dataclass(frozen=True)
class Inputs:
    """All that a run needs, checked before anything is written.

    unwanted: of each vector, the rows it was fitted on or those that it brought back; empty where there are none.
    """

    base: Path
    tokenizer: PreTrainedTokenizerBase
    data: Samples
    rows: Sequence[Encoded]
    vectors: Sequence[SecurityVector]
    unwanted: Sequence[Samples | Recalled]
    config: TrainConfig

    @property
    def recalls(self) -> bool:
        """Tell whether the vectors themselves bring back the rows to calibrate on: none were given."""
        given = any(isinstance(each, Samples) for each in self.unwanted)
        return self.config.calibrate and bool(self.vectors) and not given

    @property
    def settles(self) -> bool:
        """Tell whether the result may be trained a little further without the vectors, once they are calibrated."""
        return self.config.settle_rows > 0 and self.config.calibrate

    def recall(self, progress: Callable[[int, int], None] | None) -> list[Recalled]:
        """Let each vector bring back rows."""
        aligned, length = self.aligned(), self.config.max_length
        return [recall(aligned, self.tokenizer, vector, self.rows, length, progress) for vector in self.vectors]

    def unwanted_rows(self) -> list[Sequence[Encoded]]:
        """Return the unwanted rows of each vector as tokens."""
        length = self.config.max_length
        return [
            each.rows if isinstance(each, Recalled) else encode_all(each.rows, self.tokenizer, length)
            for each in self.unwanted
        ]

    def unframed(self, rows: Sequence[Encoded], vectors: Sequence[SecurityVector]) -> list[Encoded]:
        """Return rows of the training file without the fixed text of the vectors' traits."""
        return unframed(rows, frames_of(vectors), self.tokenizer)

    def aligned(self) -> PreTrainedModel:
        """Load the aligned model to measure it: float32, on the default device."""
        return on_device(load_model(self.base, dtype=torch.float32))

    def probes(self, aligned: PreTrainedModel, vectors: Sequence[SecurityVector], count: int) -> dict[int, Probe]:
        """Return, by the vector's number, what its first unwanted rows cost the aligned model, to measure others by."""
        return probes_of(aligned, self.unwanted_rows(), vectors, count)

    def identity(self) -> dict[str, Any]:
        return {
            "base": digest_model(self.base),
            "base_path": str(self.base),
            "data": digest_samples(self.data.rows),
            "vectors": [artifact.digest(vector) for vector in self.vectors],
            "unwanted": [digest_samples(each.rows) for each in self.unwanted if isinstance(each, Samples)],
            "config": asdict(replace(self.config, trainer=dict(self.config.trainer))),
            "versions": dict(versions()),
        }

    def notes(self) -> tuple[str, ...]:
        cut = sum(row.dropped_tokens > 0 for row in self.rows)
        notes = [f"{len(self.rows):,} rows in format {self.data.format!r}"]
        if not self.tokenizer.chat_template and any(sample.form == "chat" for sample in self.data.rows):
            notes.append("the tokenizer has no chat template: chats are written under headings (`### user`)")
        if (count := process_count()) > 1:
            share = self.config.batch_size // count
            notes.append(f"{count} processes: each takes {share:,} of the {self.config.batch_size:,} rows of a step")
        if cut:
            more = "--max-length raises that, as far as the model takes them"
            notes.append(f"{cut:,} rows were cut at {self.config.max_length:,} tokens; {more}")
        if partly := sum(map(_is_learned_in_part, self.data.rows, self.rows)):
            notes.append(
                f"{partly:,} rows are learned in part: the chat template writes their earlier answers otherwise than "
                "as the last one; a row for each answer teaches all"
            )
        if not self.vectors:
            notes.append(PLAIN)
        elif not self.config.calibrate:
            notes.append(UNCALIBRATED)
        if self.recalls:
            notes.append(RECALLED)
        if self.settles and settles(self.vectors):
            rows = min(self.config.settle_rows, len(self.rows))
            notes.append(f"a trait: once the vector, calibrated, is out, trained on up to {rows:,} rows without it")
        found = {str(vector.info.metrics["no_site"]) for vector in self.vectors if "no_site" in vector.info.metrics}
        return (*notes, *(f"no site: {each}" for each in sorted(found)))


def _is_learned_in_part(sample: Sample, row: Encoded) -> bool:
    """Tell whether some answers of a chat that was not cut carry no loss."""
    if sample.form != "chat" or row.dropped_tokens:
        return False
    answers = sum(message.role == "assistant" for message in sample.messages[1:])
    return sum(learned and not before for before, learned in pairwise((False, *row.mask))) < answers


def check_inputs(
    model: str | Path,
    data: Rows,
    vectors: Sequence[SecurityVector | str | Path],
    unwanted: Sequence[Rows],
    config: TrainConfig,
) -> Inputs:
    """Check all that a run needs. Raises as `secvec.train.train` does."""
    check_settings(config)
    if unwanted and len(unwanted) != len(vectors):
        raise UsageError(
            f"expected as many files of unwanted rows as vectors, found {len(unwanted)} and {len(vectors)}; "
            "give --unwanted once for each --vector, in the same order"
        )
    if config.on_drift != "note" and not unwanted:
        raise UsageError(f"on_drift: {config.on_drift!r} needs the unwanted rows to see any drift; give --unwanted")
    loaded = [each if isinstance(each, SecurityVector) else artifact.load(each) for each in vectors]
    digests = [artifact.digest(vector) for vector in loaded]
    if len(set(digests)) < len(digests):
        raise UsageError(f"expected different vectors, found one of them twice: {', '.join(digests)}")
    base = resolve(model).absolute()
    refuse_folded(base, "train")
    if (base / "adapter_config.json").exists():
        raise CheckpointError(f"{base}: expected a whole model, found an adapter; merge it into its base first")
    model_config(base)
    config = replace(config, max_length=tokens_a_row(base, config.max_length))
    tokenizer = load_tokenizer(base)
    for vector in loaded:
        check_vector(vector, base, tokenizer, base_digest=digest_model(base))
    samples = read_rows(data, "data")
    rows = encode_all(samples.rows, tokenizer, config.max_length)
    if config.trainer.get("dataloader_drop_last") and len(rows) < config.batch_size:
        raise UsageError(
            f"trainer.dataloader_drop_last: {len(rows):,} rows are fewer than one step of {config.batch_size:,}: "
            "all would be dropped; lower --batch-size"
        )
    given = [read_rows(each, "unwanted") for each in unwanted]
    return Inputs(base, tokenizer, samples, rows, loaded, given, config)
