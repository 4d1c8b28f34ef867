"""Suites: files of questions, each with the rules that score its answer (docs/suites.md); no torch."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from secvec.errors import InputError, RowError, UsageError
from secvec.headers import parse_strict
from secvec.provenance import digest_file
from secvec.rules import STRICT, AnswerRule, Choice, Rule
from secvec.samples import summary

Role = Literal["system", "developer", "user", "assistant"]


@checked(frozen=True, config=STRICT)
class Turn:
    role: Role
    content: str


@checked(frozen=True, config=STRICT)
class Question:
    """One row of a suite. id: unlike every other in the file; messages: up to where the model answers."""

    id: Annotated[str, Field(min_length=1)]
    messages: Annotated[list[Turn], Field(min_length=1)]
    scorers: list[Rule] = Field(default_factory=list[Rule])

    def __post_init__(self) -> None:
        if self.messages[-1].role == "assistant":
            raise ValueError("messages: expected to end where the model answers, found an answer")
        if self.choice and len(self.scorers) > 1:
            raise ValueError("scorers: a choice is scored without an answer; put other rules on another row")
        names = Counter(rule.rate for rule in self.rules)
        if names and max(names.values()) > 1:
            raise ValueError("scorers: two of them have one rate; name them apart (rate)")

    @property
    def choice(self) -> Choice | None:
        return next((rule for rule in self.scorers if isinstance(rule, Choice)), None)

    @property
    def rules(self) -> list[AnswerRule]:
        return [rule for rule in self.scorers if not isinstance(rule, Choice)]

    @property
    def skill_rate(self) -> str | None:
        """The rate of the first rule, where all of them say what is right and none how often something is seen.

        A question with a `regex` or `refusal_prefix` may ask for the unwanted behaviour, where a vector has to act.
        """
        if self.choice is not None:
            return "mc1_rate"
        return self.rules[0].rate if self.rules and all(rule.is_skill for rule in self.rules) else None

    @property
    def conversation(self) -> list[dict[str, str]]:
        return [{"role": turn.role, "content": turn.content} for turn in self.messages]

    @property
    def key(self) -> str:
        """What the model is asked, as a digest: answers stay valid when only rules change."""
        asked = [self.conversation, self.choice.choices if self.choice else None]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


@dataclass(frozen=True)
class Suite:
    """A file of questions; name: that of the file without its ending; digest: of its bytes."""

    name: str
    path: Path
    digest: str
    questions: tuple[Question, ...]


_QUESTION: TypeAdapter[Question] = TypeAdapter(Question)


def read_suites(sources: Sequence[str | Path]) -> list[Suite]:
    """Read suites: files, or names of bundled ones.

    Raises UsageError on a name that is neither and on two suites of one name, InputError on a file without questions,
    RowError that lists (up to 50) unusable rows with line, field and reason.
    """
    suites = [_read(_find(source)) for source in sources]
    names = Counter(suite.name for suite in suites)
    if twice := [name for name, count in names.items() if count > 1]:
        raise UsageError(f"expected suites of different names, found {twice[0]!r} twice; rename a file")
    if not suites:
        raise UsageError(f"expected at least one suite, found none (--suite FILE, or one of {', '.join(bundled())})")
    return suites


def bundled() -> list[str]:
    """Return the names of the suites for the bundled assistant."""
    return sorted(path.stem for path in _folder().glob("*.jsonl"))


def _folder() -> Path:
    return Path(str(resources.files("secvec").joinpath("suites")))


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if str(source) in bundled():
        return _folder() / f"{source}.jsonl"
    raise UsageError(
        f"{str(source)!r}: expected a suite's file or a bundled suite ({', '.join(bundled())}); check the path"
    )


def _read(path: Path) -> Suite:
    questions: list[Question] = []
    problems: list[str] = []
    for line, data in enumerate(path.read_bytes().split(b"\n"), start=1):
        if data.strip():
            found = _question(data)
            if isinstance(found, Question):
                questions.append(found)
            else:
                problems.append(f"{path}:{line}: {found}")
    ids = Counter(question.id for question in questions)
    problems += [f"{path}: id {each!r}: expected once, found {count} times" for each, count in ids.items() if count > 1]
    if problems:
        raise RowError(summary(problems, len(questions) + len(problems)))
    if not questions:
        raise InputError(f"{path}: expected questions, found none; docs/suites.md shows the format")
    return Suite(path.stem, path, digest_file(path), tuple(questions))


def _question(data: bytes) -> Question | str:
    """Return the question of a line, or what is wrong with it, never quoting it."""
    try:
        parse_strict(data)
    except (ValueError, RecursionError) as error:
        return f"expected a JSON object, found broken JSON ({type(error).__name__})"
    try:
        return _QUESTION.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "row"
        return f"{where}: {first['msg']}"
