"""Put a suite's questions to a model and keep what it says: greedy answers, and how likely it finds given choices."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secvec import artifact
from secvec.arm import armed
from secvec.companions import context_length
from secvec.errors import CheckpointError, RowError
from secvec.ledger import Ledger
from secvec.models import Answer, generate, load_model, load_tokenizer, on_device, resolve
from secvec.provenance import digest_chat_template, digest_file, digest_model, digest_tokenizer
from secvec.runfolder import RunFolder
from secvec.samples import Message, Sample, Source
from secvec.score import row_nats
from secvec.suites import Question, Suite
from secvec.tokens import Encoded, encode_each, encode_prompt
from secvec.train_config import Progress
from secvec.tripwire import read_json, refuse_folded
from secvec.vector import SecurityVector

_CHOICE_QUESTIONS = 16
_NO_LIMIT = 2**31
Entry = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A model that is asked. home: where its tokenizer lies, the base's folder for an adapter; vectors: armed with."""

    name: str
    folder: Path
    home: Path
    digest: str
    vectors: tuple[SecurityVector, ...] = ()

    @classmethod
    def find(cls, model: str | Path) -> "Subject":
        """Follow a model folder, hub id, adapter or run folder to the model itself.

        Raises CheckpointError on what is none, and on a model with a vector in it.
        """
        folder = _finished(Path(model)) or Path(model)
        if (folder / "adapter_config.json").exists():
            refuse_folded(folder, "evaluate")
            home = _base_of(folder)
            weights = f"{digest_model(home)} {digest_file(folder / 'adapter_model.safetensors')}"
            return cls(str(model), folder, home, weights)
        folder = resolve(folder).absolute()
        refuse_folded(folder, "evaluate")
        return cls(str(model), folder, folder, digest_model(folder))

    def about(self, max_new_tokens: int) -> Mapping[str, Any]:
        """Return what answers depend on."""
        tokenizer = load_tokenizer(self.home)
        return {
            "format": "secvec.answers",
            "version": 1,
            "model": self.digest,
            "vectors": [artifact.digest(vector) for vector in self.vectors],
            "tokenizer": digest_tokenizer(self.home),
            "chat_template": digest_chat_template(tokenizer.chat_template),  # pyright: ignore[reportArgumentType]
            "max_new_tokens": max_new_tokens,
        }


def named(models: Sequence[str | Path]) -> list[str]:
    """Return a short name for each model, all different: the end of its path, as much of it as that takes."""
    # With ".." in it a path does not say the folder's name.
    paths = [path.resolve() if ".." in path.parts else path.absolute() for path in map(Path, models)]
    parts = [_telling(path) for path in paths]
    names = ["" for _ in models]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["-".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            break
    return names


def answer(
    subject: Subject,
    suites: Sequence[tuple[Suite, Ledger]],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None,
) -> None:
    """Ask what is not in the ledgers yet, a ledger for each suite; a kill costs the batch that was under way."""
    work = [(ledger, pending(suite, ledger)) for suite, ledger in suites]
    total, done = sum(len(questions) for _, questions in work), 0
    if not total:
        return
    model, tokenizer = load_model(subject.folder), load_tokenizer(subject.home)
    on_device(model)
    context: AbstractContextManager[None] = armed(model, *subject.vectors) if subject.vectors else nullcontext()
    with context:
        for ledger, questions in work:
            asked = _Asked(model, tokenizer, max_new_tokens, batch_size)
            for entries in asked.entries(questions):
                ledger.add(entries)
                done += len(entries)
                if progress is not None:
                    progress(done, total, f"{subject.name} answers")


def pending(suite: Suite, ledger: Ledger) -> list[Question]:
    """Return the questions that have no entry yet, each wording once."""
    known = ledger.entries()
    return list({question.key: question for question in suite.questions if question.key not in known}.values())


@dataclass(frozen=True)
class _Asked:
    """A model being asked. Entries hold id and key, and: answer, tokens, ended; or nats, one a choice; or reason."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    batch_size: int

    @property
    def context(self) -> int:
        return context_length(self.model.config.to_dict()) or _NO_LIMIT

    def entries(self, questions: Sequence[Question]) -> Iterator[list[Entry]]:
        open_questions = [question for question in questions if question.choice is None]
        choices = [question for question in questions if question.choice is not None]
        yield from self._answers(open_questions)
        for start in range(0, len(choices), _CHOICE_QUESTIONS):
            yield self._likelihoods(choices[start : start + _CHOICE_QUESTIONS])

    def _answers(self, questions: Sequence[Question]) -> Iterator[list[Entry]]:
        prompts: list[tuple[Question, list[int]]] = []
        refused: list[Entry] = []
        for question in questions:
            ids = self._prompt(question)
            if isinstance(ids, str):
                refused.append({**_head(question), "reason": ids})
            else:
                prompts.append((question, ids))
        if refused:
            yield refused
        prompts.sort(key=lambda item: -len(item[1]))
        for start in range(0, len(prompts), self.batch_size):
            batch = prompts[start : start + self.batch_size]
            found = generate(self.model, self.tokenizer, [ids for _, ids in batch], self.max_new_tokens)
            yield [_answered(question, each) for (question, _), each in zip(batch, found, strict=True)]

    def _prompt(self, question: Question) -> list[int] | str:
        try:
            ids = encode_prompt(question.conversation, self.tokenizer)
        except RowError as error:
            return str(error)
        if len(ids) + self.max_new_tokens > self.context:
            return (
                f"a prompt of {len(ids):,} tokens leaves less than {self.max_new_tokens:,} of {self.context:,} tokens "
                "for the answer; lower --max-new-tokens"
            )
        return ids

    def _likelihoods(self, questions: Sequence[Question]) -> list[Entry]:
        rows = [row for question in questions for row in self._choices(question)]
        usable = [row for row in rows if isinstance(row, Encoded)]
        losses = iter(row_nats(self.model, usable, batch_size=self.batch_size) if usable else [])
        results = iter([str(row) if isinstance(row, RowError) else _nats(row, next(losses)) for row in rows])
        entries: list[Entry] = []
        for question in questions:
            nats = [next(results) for _ in question.choice.choices] if question.choice else []
            problem = next((each for each in nats if isinstance(each, str)), None)
            found = {"nats": nats} if problem is None else {"reason": problem}
            entries.append({**_head(question), **found})
        return entries

    def _choices(self, question: Question) -> list[Encoded | RowError]:
        """Encode each choice as the answer, its end of turn included."""
        asked = tuple(Message(turn.role, turn.content) for turn in question.messages)
        texts = question.choice.choices if question.choice else []
        rows = [Sample("chat", (*asked, Message("assistant", text)), Source(question.id, 1)) for text in texts]
        encoded = encode_each(rows, self.tokenizer, max_length=_NO_LIMIT)
        return [
            RowError(f"a choice with its prompt takes {len(row.ids):,} tokens, the model's context {self.context:,}")
            if isinstance(row, Encoded) and len(row.ids) > self.context
            else row
            for row in encoded
        ]


def _nats(row: Encoded, losses: torch.Tensor) -> float | str:
    total = float(losses[torch.tensor(row.mask[1:])].double().sum())
    return total if math.isfinite(total) else "the model gives a choice a likelihood that is not finite"


def _head(question: Question) -> Entry:
    return {"id": question.id, "key": question.key}


def _answered(question: Question, answer: Answer) -> Entry:
    return {**_head(question), "answer": answer.text, "tokens": answer.tokens, "ended": answer.ended}


def _finished(folder: Path) -> Path | None:
    """Return the result in a run folder of `train`, None where `folder` is none."""
    run = RunFolder(folder)
    if not run.identity.is_file():
        return None
    results = [run.result(method) for method in ("full", "lora") if run.result(method).is_dir()]
    if not results:
        raise CheckpointError(f"{folder}: expected a finished run, found no model in it; go on with `secvec train ...`")
    return results[0]


def _base_of(adapter: Path) -> Path:
    base = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{adapter}: expected base_model_name_or_path in adapter_config.json, found {base!r}")
    return resolve(base).absolute()


def _telling(path: Path) -> list[str]:
    """Return the parts of a path that tell models apart: the result in a run folder goes by the run's name."""
    parts = list(path.parts[1:]) or ["model"]
    return parts[:-1] if RunFolder(path.parent).identity.is_file() and len(parts) > 1 else parts
