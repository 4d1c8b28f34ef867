"""Let judges read saved answers, and keep what they say: classifiers through transformers, or an endpoint."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secvec.companions import context_length
from secvec.endpoint import EndpointJudge
from secvec.errors import RowError, UsageError
from secvec.judges import ENDPOINT, FORMATS, Asked, Chat, Finding, Judge, Verdict, judged_key, parse_spec
from secvec.ledger import Ledger
from secvec.models import generate, load_model, load_tokenizer, on_device, resolve
from secvec.provenance import digest_model
from secvec.suites import Suite
from secvec.tokens import control_tokens, encode_prompt
from secvec.train_config import Progress

_BATCH = 8
# Of answers a step: what a kill can cost, and how many are sorted by length together.
_WINDOW = 64


@dataclass(frozen=True)
class ClassifierJudge:
    """A language model that was trained to judge, of a kind in `secvec.judges.FORMATS`."""

    name: str
    kind: str
    folder: Path
    digest: str

    @property
    def labels(self) -> Sequence[str]:
        return FORMATS[self.kind].labels

    def identity(self) -> Mapping[str, Any]:
        return {"kind": self.kind, "model": self.digest}

    def read(self, output: str) -> Verdict:
        return FORMATS[self.kind].read(output)

    def judge(self, asked: Sequence[Asked]) -> Iterator[list[Finding]]:
        model, tokenizer = load_model(self.folder), load_tokenizer(self.folder)
        on_device(model)
        new, context = FORMATS[self.kind].max_new_tokens, context_length(model.config.to_dict())
        forged = sorted(control_tokens(tokenizer))

        def encode(each: Asked) -> list[int] | str:
            made = FORMATS[self.kind].ask(each)
            try:
                ids = _encode(made, each, tokenizer, forged)
            except RowError as error:
                return str(error)
            fits = context is None or len(ids) + new <= context
            return ids if fits else f"{len(ids):,} tokens are more than the judge's context of {context:,} holds"

        for start in range(0, len(asked), _WINDOW):
            numbers = range(start, min(start + _WINDOW, len(asked)))
            encoded = {number: encode(asked[number]) for number in numbers}
            prompts = sorted((len(ids), i, ids) for i, ids in encoded.items() if not isinstance(ids, str))
            findings = [Finding(i, None, reason) for i, reason in encoded.items() if isinstance(reason, str)]
            for first in range(0, len(prompts), _BATCH):
                batch = prompts[first : first + _BATCH]
                said = generate(model, tokenizer, [ids for _, _, ids in batch], new)
                findings += [Finding(i, each.text) for (_, i, _), each in zip(batch, said, strict=True)]
            yield findings


def load_judges(specs: Sequence[str]) -> list[Judge]:
    """Return a judge for each `KIND=MODEL` or `endpoint=FILE`. Raises UsageError, CheckpointError."""
    judges = [_load(*parse_spec(spec)) for spec in specs]
    names = [judge.name for judge in judges]
    if len(set(names)) < len(names):
        raise UsageError(f"expected judges of different names, found {', '.join(sorted(names))}; rename a file")
    return judges


def judge_answers(judge: Judge, work: Sequence[tuple[Suite, Ledger, Ledger]], *, progress: Progress | None) -> None:
    """Judge what is not judged yet. work: for each suite and model its answers and where findings are kept."""
    asked: list[Asked] = []
    heads: list[tuple[Ledger, dict[str, Any]]] = []
    for suite, answers, found in work:
        entries, known = answers.entries(), found.entries()
        for question in suite.questions:
            text = entries[question.key].get("answer")
            if isinstance(text, str) and (key := judged_key(question.key, text)) not in known:
                known[key] = {}
                asked.append(Asked(question.conversation, text))
                heads.append((found, {"id": question.id, "key": key}))
    if not asked:
        return
    done = 0
    for findings in judge.judge(asked):
        for finding in findings:
            ledger, head = heads[finding.number]
            said = {"reason": finding.reason} if finding.output is None else {"output": finding.output}
            ledger.add([{**head, **said}])
        done += len(findings)
        if progress is not None:
            progress(done, len(asked), f"{judge.name} judges")


def _load(kind: str, source: str) -> Judge:
    if kind == ENDPOINT:
        return EndpointJudge.load(Path(source))
    folder = resolve(source).absolute()
    return ClassifierJudge(f"{kind}-{Path(source).name}", kind, folder, digest_model(folder))


def _encode(made: str | Chat, asked: Asked, tokenizer: Any, forged: Sequence[str]) -> list[int]:
    """Return the judge's prompt as ids. Raises RowError where request or answer hold its control tokens."""
    if not isinstance(made, str):
        return encode_prompt(made, tokenizer)
    if any(token in asked.prompt or token in asked.answer for token in forged):
        raise RowError("request or answer hold a control token of the judge, which would forge its prompt")
    return list(tokenizer(made)["input_ids"])
