"""What one row of a data file says: recognise its format, check it, and turn it into messages.

messages            {"messages": [{"role": "user", "content": "..."}, ...]}               OpenAI's chat format
prompt-completion   {"prompt": ..., "completion": ...}, both texts or both lists of messages; also prompt/response
question-answer     {"question": "...", "answer": "..."}                                  a chat of two turns
alpaca              {"instruction": "...", "input": "...", "output": "..."}               a chat of two turns
sharegpt            {"conversations": [{"from": "human", "value": "..."}, ...]}
text                {"text": "..."}                                                       every token is learned
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from secvec.errors import RowError

Form = Literal["chat", "plain"]
"""chat: goes through the model's chat template; plain: texts one after the other, the last of which is learned."""


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


Parsed = tuple[Form, tuple[Message, ...]]
Row = Mapping[str, Any]

_ROLES = ("system", "developer", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Dropping any of these in silence would train on something else than the row says.
_UNSUPPORTED_MESSAGE = ("tool_calls", "function_call", "tool_call_id", "audio", "refusal")
_UNSUPPORTED_ROW = ("tools", "functions", "images", "videos", "documents", "rejected", "chosen")

_FORMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("prompt-completion", ("prompt", "completion")),
    ("prompt-completion", ("prompt", "response")),
    ("alpaca", ("instruction", "output")),
    ("question-answer", ("question", "answer")),
    ("text", ("text",)),
)
FORMATS = tuple(dict.fromkeys(name for name, _ in _FORMATS))


def detect(row: Row) -> str | None:
    """Name the format of a row by its keys, or return None."""
    return next((name for name, keys in _FORMATS if all(key in row for key in keys)), None)


def parse(row: object, form: str) -> Parsed:
    """Check one row of the format `form` and return its messages. Raises RowError with the field and the reason."""
    if not isinstance(row, Mapping):
        raise RowError(f"expected a JSON object, found {type(row).__name__}")
    row = cast(Row, row)
    if detect(row) != form:
        known = detect(row)
        found = f"one in format {known!r}" if known else f"the keys {', '.join(map(repr, sorted(row)[:6])) or 'none'}"
        raise RowError(f"expected a row in format {form!r}, found {found}; keep one format per file")
    for key in _UNSUPPORTED_ROW:
        if row.get(key):
            raise RowError(f"{key}: not supported yet; remove the field if the row is to be learned without it")
    return _PARSERS[form](row)


def _messages(row: Row) -> Parsed:
    return _chat(_turns(row["messages"], "messages", _openai_turn), "messages")


def _sharegpt(row: Row) -> Parsed:
    return _chat(_turns(row["conversations"], "conversations", _sharegpt_turn), "conversations")


def _prompt_completion(row: Row) -> Parsed:
    answer = "completion" if "completion" in row else "response"
    prompt, completion = row["prompt"], row[answer]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _turns(cast(list[Any], prompt), "prompt", _openai_turn)
        return _chat((*before, *_turns(cast(list[Any], completion), answer, _openai_turn)), answer)
    texts = _text(row, "prompt"), _answer(row, answer)
    return "plain", (Message("prompt", texts[0]), Message("completion", texts[1]))


def _question_answer(row: Row) -> Parsed:
    return "chat", (Message("user", _answer(row, "question")), Message("assistant", _answer(row, "answer")))


def _alpaca(row: Row) -> Parsed:
    request = _answer(row, "instruction")
    if row.get("input") not in (None, ""):
        request = f"{request}\n\n{_text(row, 'input')}"
    turns = (Message("user", request), Message("assistant", _answer(row, "output")))
    if row.get("system") not in (None, ""):
        return "chat", (Message("system", _text(row, "system")), *turns)
    return "chat", turns


def _plain_text(row: Row) -> Parsed:
    return "plain", (Message("text", _answer(row, "text")),)


_PARSERS = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt-completion": _prompt_completion,
    "question-answer": _question_answer,
    "alpaca": _alpaca,
    "text": _plain_text,
}


def _turns(found: object, field: str, turn: Any) -> tuple[Message, ...]:
    if not isinstance(found, list) or not found:
        raise RowError(f"{field}: expected a list of messages, found {_shape(found)}")
    return tuple(turn(each, f"{field}[{i}]") for i, each in enumerate(cast(list[object], found)))


def _openai_turn(found: object, where: str) -> Message:
    if not isinstance(found, Mapping):
        raise RowError(f"{where}: expected an object with role and content, found {_shape(found)}")
    message = cast(Row, found)
    for key in _UNSUPPORTED_MESSAGE:
        if message.get(key):
            raise RowError(f"{where}.{key}: not supported yet; a row without it would teach something else")
    if message.get("weight", 1) != 1:
        raise RowError(f"{where}.weight: only 1 is supported, found {_shape(message['weight'])}")
    role = message.get("role")
    if role not in _ROLES:
        raise RowError(f"{where}.role: expected one of {', '.join(_ROLES)}, found {_shape(role)}")
    return Message(cast(str, role), _content(message.get("content"), f"{where}.content"))


def _content(found: object, where: str) -> str:
    """Return a message's text: a string, or OpenAI's list of text parts."""
    if isinstance(found, list) and found:
        parts = [_part(part, f"{where}[{i}]") for i, part in enumerate(cast(list[object], found))]
        return "".join(parts)
    if not isinstance(found, str):
        raise RowError(f"{where}: expected a text, found {_shape(found)}")
    return found


def _part(found: object, where: str) -> str:
    if isinstance(found, Mapping):
        part = cast(Row, found)
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return cast(str, part["text"])
    raise RowError(f"{where}: expected a part of type text, found {_shape(found)}")


def _sharegpt_turn(found: object, where: str) -> Message:
    if not isinstance(found, Mapping):
        raise RowError(f"{where}: expected an object with from and value, found {_shape(found)}")
    turn = cast(Row, found)
    role = turn.get("from")
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
        raise RowError(f"{where}.from: expected one of {', '.join(_SHAREGPT_ROLES)}, found {_shape(role)}")
    return Message(_SHAREGPT_ROLES[role], _content(turn.get("value"), f"{where}.value"))


def _chat(messages: Sequence[Message], field: str) -> Parsed:
    last = len(messages) - 1
    if messages[-1].role != "assistant":
        raise RowError(f"{field}[{last}]: expected the last message to be the assistant's, found {messages[-1].role!r}")
    if not messages[-1].content.strip():
        raise RowError(f"{field}[{last}]: expected an answer, found an empty one: there is nothing to learn")
    if any(message.role in ("system", "developer") for message in messages[1:]):
        raise RowError(f"{field}: expected a system message only at the start, found one later")
    return "chat", tuple(messages)


def _text(row: Row, field: str) -> str:
    if not isinstance(row[field], str):
        raise RowError(f"{field}: expected a text, found {_shape(row[field])}")
    return row[field]


def _answer(row: Row, field: str) -> str:
    if not _text(row, field).strip():
        raise RowError(f"{field}: expected a text, found an empty one")
    return row[field]


def _shape(found: object) -> str:
    """Describe a wrong value without showing a row's text."""
    if found is None:
        return "nothing"
    if isinstance(found, bool | int | float):
        return repr(found)
    if isinstance(found, str):
        return repr(found) if len(found) <= 20 else f"a text of {len(found)} characters"
    return type(found).__name__
