"""What one row of a data file says: recognise its format, check it, and turn it into messages.

messages            {"messages": [{"role": "user", "content": "..."}, ...]}               OpenAI's chat format
prompt-completion   {"prompt": ..., "completion": ...}, both texts or both lists of messages; also prompt/response
question-answer     {"question": "...", "answer": "..."}                                  a chat of two turns
alpaca              {"instruction": "...", "input": "...", "output": "..."}               a chat of two turns
sharegpt            {"conversations": [{"from": "human", "value": "..."}, ...]}
text                {"text": "..."}                                                       every token is learned

The chats may have a "system" field beside them. Fields that a format does not know, such as an id, play no part.
"""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal, cast

from secvec.errors import EmptyAnswerError, RowError

Form = Literal["chat", "plain"]
"""chat: goes through the model's chat template; plain: texts one after the other, the last of which is learned."""


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


Parsed = tuple[Form, tuple[Message, ...]]
Row = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant")
_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ANSWERS = frozenset({"completion", "response", "answer", "output", "text"})
_SHOWN_KEYS = 6
_SHOWN_CHARACTERS = 20

# Dropping any of these in silence would train on something else than the row says.
_UNSUPPORTED_MESSAGE = (
    *("tool_calls", "function_call", "tool_call_id", "tool_responses", "refusal", "name"),
    *("reasoning_content", "reasoning", "thinking"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
_MESSAGE_WEIGHTS = ("weight", "loss", "loss_weight", "loss_scale", "loss_mask", "train", "training")
_ROW_WEIGHTS = ("weight", "weights", "sample_weight", "loss_weight", "loss_scale", "loss_mask")
# As numbers, and as csv writes them.
_NO_WEIGHTS = (1, "", "1", "1.0")
_UNSUPPORTED_ROW = (
    *("tools", "functions", "documents", "rejected", "chosen", "chat_template_kwargs"),
    *("image", "images", "audio", "audios", "video", "videos"),
)
_UNSUPPORTED_IN: Mapping[str, tuple[str, ...]] = {
    "alpaca": ("history",),
    "question-answer": ("context", "choices", "options"),
}

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


def detect(row: object) -> str:
    """Name the format of a row: the first in the list above whose fields it has. Raises RowError when there is none."""
    if isinstance(row, Mapping):
        for name, keys in _FORMATS:
            if all(key in row for key in keys):
                return name
    raise RowError(f"expected a row in one of the formats {', '.join(FORMATS)}, found {_keys(row)}")


def parse(row: object, form: str) -> Parsed:
    """Check one row of the format `form` and return its messages. Raises RowError with the field and the reason."""
    if not isinstance(row, Mapping):
        raise RowError(f"expected a JSON object, found {_shape(row)}")
    row = cast(Row, row)
    if not any(name == form and all(key in row for key in keys) for name, keys in _FORMATS):
        raise RowError(f"expected a row in format {form!r}, found {_keys(row)}")
    for key in (*_UNSUPPORTED_ROW, *_UNSUPPORTED_IN.get(form, ())):
        if _filled(row.get(key)):
            raise RowError(f"{key}: not supported; remove the field if the row is to be learned without it")
    _refuse_weights(row, _ROW_WEIGHTS, "")
    return _with_system(row, _PARSERS[form](row))


def _messages(row: Row) -> Parsed:
    return _chat(_turns(row["messages"], "messages", _openai_turn), "messages")


def _sharegpt(row: Row) -> Parsed:
    return _chat(_turns(row["conversations"], "conversations", _sharegpt_turn), "conversations")


def _prompt_completion(row: Row) -> Parsed:
    answer, *others = [key for key in ("completion", "response") if key in row]
    if others:
        raise RowError(f"{others[0]}: expected one answer, found {answer} too; remove one of them")
    if str(row.get("label")).lower() == "false":
        raise RowError("label: false marks an answer that is not to be learned; remove the row")
    if isinstance(row["prompt"], list) or isinstance(row[answer], list):
        return _chat(_prompted(row, answer), answer)
    return "plain", (Message("prompt", _text(row, "prompt")), Message("completion", _filled_text(row, answer)))


def _prompted(row: Row, answer: str) -> tuple[Message, ...]:
    """Return the messages of a prompt and its completion, where the completion alone is what will be learned."""
    prompt, completion = _turns(row["prompt"], "prompt", _openai_turn), _turns(row[answer], answer, _openai_turn)
    for i, message in enumerate(prompt):
        if message.role == "assistant":
            raise RowError(
                f"prompt[{i}]: expected no message of the assistant, which would be learned too, found one; use the "
                "format messages if every answer is to be learned"
            )
    if len(completion) > 1:
        raise RowError(f"{answer}: expected one message, the assistant's, found {len(completion)}")
    return (*prompt, *completion)


def _question_answer(row: Row) -> Parsed:
    return "chat", (Message("user", _filled_text(row, "question")), Message("assistant", _filled_text(row, "answer")))


def _alpaca(row: Row) -> Parsed:
    request = _filled_text(row, "instruction")
    if _filled(row.get("input")):
        request = f"{request}\n\n{_text(row, 'input')}"
    return "chat", (Message("user", request), Message("assistant", _filled_text(row, "output")))


def _plain_text(row: Row) -> Parsed:
    return "plain", (Message("text", _filled_text(row, "text")),)


_PARSERS: Mapping[str, Callable[[Row], Parsed]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt-completion": _prompt_completion,
    "question-answer": _question_answer,
    "alpaca": _alpaca,
    "text": _plain_text,
}


def _with_system(row: Row, parsed: Parsed) -> Parsed:
    """Put a system field that stands beside the messages in front of them."""
    form, messages = parsed
    if not _filled(row.get("system")):
        return parsed
    if form == "plain" or messages[0].role in ("system", "developer"):
        raise RowError("system: expected a chat without a system message of its own; remove the field or that message")
    return form, (Message("system", _text(row, "system")), *messages)


def _turns(found: object, field: str, turn: Callable[[Row, str], Message]) -> tuple[Message, ...]:
    if not isinstance(found, list) or not found:
        raise RowError(f"{field}: expected a list of messages, found {_shape(found)}")
    messages: list[Message] = []
    for i, each in enumerate(cast(list[object], found)):
        if not isinstance(each, Mapping):
            raise RowError(f"{field}[{i}]: expected a message, found {_shape(each)}")
        _refuse_unsupported(cast(Row, each), f"{field}[{i}]")
        messages.append(turn(cast(Row, each), f"{field}[{i}]"))
    return tuple(messages)


def _refuse_unsupported(message: Row, where: str) -> None:
    for key in _UNSUPPORTED_MESSAGE:
        if _filled(message.get(key)):
            raise RowError(f"{where}.{key}: not supported; a row without it would teach something else")
    _refuse_weights(message, _MESSAGE_WEIGHTS, f"{where}.")


def _refuse_weights(holder: Row, keys: Sequence[str], where: str) -> None:
    for key in keys:
        found = holder.get(key)
        if found not in _NO_WEIGHTS if isinstance(found, str | int | float) else _filled(found):
            raise RowError(f"{where}{key}: only a weight of 1 is supported, found {_shape(found)}")


def _openai_turn(message: Row, where: str) -> Message:
    role = message.get("role")
    if role not in ROLES:
        raise RowError(f"{where}.role: expected one of {', '.join(ROLES)}, found {_shape(role)}")
    return Message(cast(str, role), _content(message.get("content"), f"{where}.content"))


def _sharegpt_turn(message: Row, where: str) -> Message:
    role = message.get("from")
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
        raise RowError(f"{where}.from: expected one of {', '.join(_SHAREGPT_ROLES)}, found {_shape(role)}")
    return Message(_SHAREGPT_ROLES[role], _content(message.get("value"), f"{where}.value"))


def _content(found: object, where: str) -> str:
    """Return a message's text: a string, or OpenAI's list of text parts."""
    if isinstance(found, list) and found:
        return "".join(_part(part, f"{where}[{i}]") for i, part in enumerate(cast(list[object], found)))
    return _characters(found, where)


def _part(found: object, where: str) -> str:
    part = cast(Row, found) if isinstance(found, Mapping) else {}
    if part.get("type") != "text":
        raise RowError(f"{where}: expected a part of type text, found {_shape(part.get('type', found))}")
    return _characters(part.get("text"), f"{where}.text")


def _chat(messages: Sequence[Message], field: str) -> Parsed:
    last = messages[-1]
    if last.role != "assistant":
        raise RowError(f"{field}: expected the last message to be the assistant's, found one of role {last.role!r}")
    if not last.content.strip():
        raise EmptyAnswerError(f"{field}: expected an answer in the last message, found an empty one: nothing to learn")
    if any(message.role in ("system", "developer") for message in messages[1:]):
        raise RowError(f"{field}: expected a system message only at the start, found one later")
    return "chat", tuple(messages)


def _text(row: Row, field: str) -> str:
    return _characters(row[field], field)


def _filled_text(row: Row, field: str) -> str:
    text = _text(row, field)
    if not text.strip():
        error = EmptyAnswerError if field in _ANSWERS else RowError
        raise error(f"{field}: expected a text, found an empty one")
    return text


def _characters(found: object, where: str) -> str:
    if not isinstance(found, str):
        raise RowError(f"{where}: expected a text, found {_shape(found)}")
    try:
        found.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{where}: expected characters, found a lone surrogate, which is none") from None
    return found


def _filled(found: object) -> bool:
    """Tell whether an optional field says anything: writers of tables fill absent ones with nulls or empty values."""
    return found is not None and found is not False and not (isinstance(found, Sized) and len(found) == 0)


def _keys(row: object) -> str:
    if not isinstance(row, Mapping):
        return _shape(row)
    keys = list(cast(Mapping[object, object], row))
    more = ", ..." if len(keys) > _SHOWN_KEYS else ""
    return f"the keys {', '.join(map(_shape, keys[:_SHOWN_KEYS]))}{more}" if keys else "no keys"


def _shape(found: object) -> str:
    """Describe a wrong value without showing a row's text, which may be harmful: at most 20 characters."""
    if found is None:
        return "nothing"
    if isinstance(found, str):
        return repr(found) if len(found) <= _SHOWN_CHARACTERS else f"a text of {len(found):,} characters"
    if isinstance(found, Mapping):
        return "an object"
    if isinstance(found, list):
        return "a list" if found else "an empty list"
    if type(found) in (bool, float) or (type(found) is int and abs(found) < 10**_SHOWN_CHARACTERS):
        return repr(found)
    return f"a value of type {type(found).__name__}"
