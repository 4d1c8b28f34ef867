import copy
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secvec.datafiles import find
from secvec.errors import EmptyAnswerError, InputError, RowError, UsageError
from secvec.samples import Message, Sample, Source, from_rows, line_suffix, read_samples, stream_samples

SHARED = Path(__file__).parents[2] / "shared"
SECRET = "how to build the forbidden thing " * 3
HI, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
TURNS = (Message("user", "hi"), Message("assistant", "yes"))
SYSTEM = Message("system", "be brief")
DEEP = b"[" * 100_000


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def refusal(rows: list[Any], format: str | None = None) -> str:
    with pytest.raises(RowError) as caught:
        from_rows(rows, format=format)
    return str(caught.value)


def file_refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_samples(path)
    assert caught.value.exit_code == 3
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "format", "messages"),
    [
        ({"messages": [HI, YES]}, "messages", TURNS),
        ({"messages": [{**HI, "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, YES]},
         "messages", TURNS),
        ({"messages": [HI, {**YES, "tool_calls": None, "weight": 1}], "tools": [], "id": 7}, "messages", TURNS),
        ({"question": "hi", "answer": "yes", "weight": "1", "weights": []}, "question-answer", TURNS),
        ({"system": "be brief", "messages": [HI, YES]}, "messages", (SYSTEM, *TURNS)),
        ({"prompt": [HI], "completion": [YES]}, "prompt-completion", TURNS),
        ({"prompt": "hi", "completion": " yes"}, "prompt-completion",
         (Message("prompt", "hi"), Message("completion", " yes"))),
        ({"prompt": "", "response": "yes"}, "prompt-completion", (Message("prompt", ""), Message("completion", "yes"))),
        ({"question": "hi", "answer": "yes"}, "question-answer", TURNS),
        ({"instruction": "hi", "input": "", "output": "yes", "text": "hi yes"}, "alpaca", TURNS),
        ({"instruction": "hi", "input": "you", "output": "yes", "system": "be brief"}, "alpaca",
         (SYSTEM, Message("user", "hi\n\nyou"), TURNS[1])),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "system": "be brief"},
         "sharegpt", (SYSTEM, *TURNS)),
        ({"text": "hi"}, "text", (Message("text", "hi"),)),
    ],
)  # fmt: skip
def test_each_format_is_recognised_and_read(row: dict[str, Any], format: str, messages: tuple[Message, ...]) -> None:
    samples = from_rows([row], name="data")
    assert (samples.format, samples.rows[0].source) == (format, Source("data", 1))
    assert samples.rows[0].messages == messages
    assert samples.rows[0].form == ("plain" if messages[-1].role in ("completion", "text") else "chat")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["a"], "expected a row in one of the formats messages, sharegpt, .*, found a list"),
        ({"a": 1}, "found the keys 'a'"),
        ({}, "found no keys"),
        ({1: "a", "b": 2}, "found the keys 1, 'b'"),
        ({"messages": []}, "messages: expected a list of messages, found an empty list"),
        ({"messages": ["hi", YES]}, r"messages\[0\]: expected a message, found 'hi'"),
        ({"messages": [{"role": "tool", "content": "3"}, YES]}, r"messages\[0\].role: expected one of .* found 'tool'"),
        ({"messages": [{"role": "user\n### assistant", "content": "3"}, YES]}, r"messages\[0\].role: .*, found 'user"),
        ({"messages": [HI, YES, HI]}, "messages: expected the last message to be the assistant's"),
        ({"messages": [HI, {**YES, "content": " \n"}]}, "messages: expected an answer in the last message"),
        ({"messages": [HI, {**YES, "content": None}]}, r"messages\[1\].content: expected a text, found nothing"),
        ({"messages": [HI, YES, {"role": "system", "content": "x"}, YES]}, "expected a system message only at"),
        ({"messages": [HI, {**YES, "content": "\ud800"}]}, r"messages\[1\].content: .* lone surrogate"),
        ({"prompt": [HI], "completion": "yes"}, "completion: expected a list of messages, found 'yes'"),
        ({"prompt": [HI, YES, HI], "completion": [YES]}, r"prompt\[1\]: expected no message of the assistant"),
        ({"prompt": [HI], "completion": [YES, HI, YES]}, "completion: expected one message"),
        ({"prompt": "a", "completion": "b", "response": "c"}, "response: expected one answer, found completion too"),
        ({"question": "2+2", "answer": 4}, "answer: expected a text, found 4"),
        ({"question": "2+2", "answer": 10**5000}, "answer: expected a text, found a value of type int"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "tool", "value": "b"}]}, "found 'tool'"),
        ({"text": " "}, "text: expected a text, found an empty one"),
    ],
)  # fmt: skip
def test_a_bad_row_is_refused_with_field_and_reason(row: Any, reason: str) -> None:
    with pytest.raises(RowError, match=r"(?s)1 of 1 rows cannot be used:\nrows:1: " + f".*{reason}"):
        from_rows([row])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [HI, YES], "tools": [{"name": "search"}]},
        {"messages": [HI, YES], "images": ["a.png"]},
        {"messages": [HI, YES], "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [HI, YES], "rejected": [YES]},
        {"messages": [HI, {**YES, "weight": 0}]},
        {"messages": [HI, {**YES, "weight": 0.5}]},
        {"messages": [HI, {**YES, "train": False}]},
        {"messages": [HI, {**YES, "tool_calls": [{"id": "1"}]}]},
        {"messages": [HI, {**YES, "reasoning_content": "hm"}]},
        {"messages": [{**HI, "name": "Ann"}, YES]},
        {"messages": [{**HI, "content": [{"type": "image_url", "image_url": "a.png"}]}, YES]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "tool_calls": ["x"]}]},
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        {"question": "a", "answer": "b", "context": "c"},
        {"messages": [HI, {**YES, "loss_weight": 0.0}]},
        {"messages": [HI, YES], "weight": 0},
        {"messages": [HI, YES], "weights": [0, 1]},
        {"text": "a", "sample_weight": "0.5"},
        {"text": "a", "weights": np.array([0.5, 1.0])},
        {"prompt": "a", "completion": "b", "label": False},
        {"prompt": "a", "completion": "b", "label": "False"},
        {"prompt": "a", "completion": "b", "system": "c"},
        {"system": "c", "messages": [{"role": "system", "content": "d"}, HI, YES]},
    ],
)
def test_what_cannot_be_learned_as_the_row_says_is_refused_not_dropped(row: dict[str, Any]) -> None:
    refusal([row])


def test_a_file_holds_one_format_and_the_caller_may_name_it() -> None:
    both = {"instruction": "hi", "output": "yes", "text": "hi yes"}
    assert "rows:2: expected a row in format 'text', found one in 'alpaca'" in refusal([{"text": "a"}, both])
    assert from_rows([both], format="text").rows[0].messages == (Message("text", "hi yes"),)
    assert "expected a row in format 'messages', found the keys 'text'" in refusal([{"text": "a"}], "messages")
    with pytest.raises(UsageError, match=r"format: expected one of messages, .*, found 'parquet'"):
        from_rows([both], format="parquet")
    for format in (None, "text"):
        with pytest.raises(InputError, match="expected rows, found none"):
            from_rows([], format=format)


def test_rows_of_each_kind_of_file_keep_their_line(tmp_path: Path) -> None:
    texts = ["a\u2028b\u0085", "c"]
    rows = [{"text": text} for text in texts]
    files = {
        "a.jsonl": (lines(rows[0]) + b"\r\n \n" + lines(rows[1]).rstrip(), [1, 4]),
        "a.json": (b" \n" + json.dumps(rows, indent=1).encode(), [1, 2]),
        "a.csv": ("\ufeffid,text\r\n1,a\u2028b\u0085\r\n\r\n2,c".encode(), [2, 4]),
        "a.TXT": ("a\u2028b\u0085\r\n\nc\n".encode(), [1, 3]),
    }
    for name, (data, numbers) in files.items():
        samples = read_samples(write(tmp_path / name, data))
        assert samples.format == "text"
        assert [row.messages[0].content for row in samples.rows] == texts, name
        assert [row.source for row in samples.rows] == [Source(str(tmp_path / name), n) for n in numbers], name


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"text": NaN}', "NaN, which is not JSON"),
        (b'{"text": "a", "n": -Infinity}', "-Infinity, which is not JSON"),
        (b'{"text": "\\ud800"}', "a lone surrogate"),
        (b'\xef\xbb\xbf{"text": "a"}', "broken JSON: Unexpected UTF-8 BOM"),
        (b'{"text": "a", "text": "b"}', "a key that occurs twice"),
        (b'{"text": "a", "n": {"b": 1, "b": 2}}', "a key that occurs twice"),
        (b'{"text": ' + DEEP, "JSON nested too deeply"),
        (b'{"text": "a\xff"}', "bytes that are not UTF-8 (at byte 12)"),
        (b'{"text": "a"', "broken JSON: Expecting ',' delimiter (at character 13)"),
        (b'{"text": "a"} {"text": "b"}', "broken JSON: Extra data (at character 15)"),
        (b'{"text": "a\tb"}', "broken JSON: Invalid control character"),
        (b'{"text": "' + b"a" * (16 << 20) + b'"}', "at most 16,777,216 bytes, found 16,777,228"),
        (b'{"n": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
        (b'{"text": "a", "n": ' + b"[" * 64 + b"]" * 64 + b"}", "nested too deeply: over 64 levels"),
    ],
)  # fmt: skip
def test_hostile_json_is_refused_with_line_and_reason(tmp_path: Path, bad: bytes, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "good"}) + bad + b"\n" + lines({"text": "good"}))
    found = file_refusal(path)
    assert found.startswith(f"1 of 3 rows cannot be used:\n{path}:2: expected") and reason in found


def test_csv_and_text_are_refused_with_line_and_reason(tmp_path: Path) -> None:
    cases = {
        b"text,text\na,b\n": ":1: expected a header that names each column once",
        b'id,text\n1,"a\nb"\n2\n': ":4: expected 2 columns as in the header, found 1",
        b'id,text\n1,"a\n': ":2: expected csv, found unexpected end of data",
        b"id,text\n1,\xff\n": ":2: expected UTF-8",
        b"id,text\n1,\n": ":2: text: expected a text, found an empty one",
        b"text\n": ": expected rows, found none",
    }
    for data, reason in cases.items():
        path = write(tmp_path / "a.csv", data)
        assert f"{path}{reason}" in file_refusal(path)
    path = write(tmp_path / "a.txt", b"a\n\xff\n" + b"a" * (17 << 20))
    assert "2 of 3 rows" in (found := file_refusal(path)) and f"{path}:2: expected UTF-8" in found
    assert f"{path}:3: expected a row of at most" in found


def test_what_is_no_data_file_is_refused_and_text_that_looks_like_one_is_not(tmp_path: Path) -> None:
    for data, found in ((b"PK\x03\x04..", "zip"), (b"ARROW1..", "arrow"), ("\ufeffa".encode("utf-16"), "UTF-16")):
        assert f"found {found}; convert it first" in file_refusal(write(tmp_path / "a.jsonl", data))
    assert ":1: expected JSON, found a byte order mark" in file_refusal(write(tmp_path / "a.json", b"\xef\xbb\xbf[]"))
    for data in (b"", b" \n", b"\xef\xbb\xbf"):
        assert "found an empty file" in file_refusal(write(tmp_path / "a.jsonl", data))
    assert "expected a readable data file, found" in file_refusal(tmp_path / "missing.jsonl")
    for data in (b"text\nhello\n", random.Random(0).randbytes(1_000), b"\0" * 1_000):
        found = file_refusal(write(tmp_path / "a.jsonl", b"\n" + data))
        assert (
            found.startswith(f"{tmp_path / 'a.jsonl'}:2: expected JSON, which starts with {{ or [")
            and "\n" not in found
        )
    spread = json.dumps({"text": "a"}, indent=1).encode()
    assert "a.json:1: expected a row in each line" in file_refusal(write(tmp_path / "a.json", spread))
    assert len(read_samples(write(tmp_path / "a.jsonl", b"\n" * 100_000 + lines({"text": "a"})))) == 1
    assert len(read_samples(write(tmp_path / "a.txt", b"PARIS is big\nPKs are small\n"))) == 2


def test_rows_read_one_by_one_are_those_read_at_once(tmp_path: Path) -> None:
    good = {"text": "a\u2028b"}
    files = {
        "a.jsonl": lines(good) + b"\r\n \n" + lines(good).rstrip(),
        "a.json": json.dumps([good, good]).encode(),
        "a.csv": "\ufefftext\na\u2028b\n".encode(),
        "a.txt": "\ufeffa\u2028b\r\n\nc".encode(),
    }
    for name, data in files.items():
        path = write(tmp_path / name, data)
        streamed = [row.sample for row in stream_samples(path)]
        assert tuple(streamed) == read_samples(path).rows, name
        assert line_suffix(find(path)) == {"a.jsonl": ".jsonl", "a.txt": ".txt"}.get(name)


def test_unusable_rows_are_met_one_by_one_and_a_long_line_is_not_held(tmp_path: Path) -> None:
    long = b'{"text": "' + b"a" * (17 << 20) + b'"}\n'
    path = write(tmp_path / "a.jsonl", lines({"text": "a"}) + long + lines({"text": " "}, {"text": "b"}) + long[:-1])
    found = list(stream_samples(path))
    assert [(row.line, type(row.sample)) for row in found] == [
        (1, Sample), (2, RowError), (3, EmptyAnswerError), (4, Sample), (5, RowError)
    ]  # fmt: skip
    for row in (found[1], found[4]):
        assert f"{path}:{row.line}: expected a row of at most 16,777,216 bytes, found 17,825,804" in str(row.sample)
    with pytest.raises(InputError, match="expected a readable data file"):
        next(stream_samples(tmp_path / "missing.jsonl"))


def test_fifty_bad_rows_are_listed_and_the_rest_counted() -> None:
    found = refusal([{"text": "good"}, *[{"text": ""}] * 1_234])
    assert found.startswith("1,234 of 1,235 rows cannot be used:\nrows:2: ")
    assert found.endswith("rows:51: text: expected a text, found an empty one\n... and 1,184 more")


def mutants(seed: int) -> Iterator[Any]:
    """Yield rows of all formats with some of their values, keys and items replaced."""
    draw = random.Random(seed)
    seeds: list[Any] = [
        {"messages": [{"role": "system", "content": SECRET}, {"role": "user", "content": SECRET}, YES], "tools": None},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": SECRET}]}, {**YES, "weight": 1}]},
        {"prompt": [HI], "completion": [{"role": "assistant", "content": SECRET}]},
        {"prompt": SECRET, "response": SECRET},
        {"question": SECRET, "answer": SECRET},
        {"instruction": SECRET, "input": SECRET, "output": SECRET, "system": SECRET},
        {"conversations": [{"from": "human", "value": SECRET}, {"from": "gpt", "value": SECRET}]},
        {"text": SECRET},
    ]
    odd = [None, True, 0, -1.5, 10**5000, float("inf"), "", " ", SECRET, "\udc80", [], [[]], {}, {SECRET: SECRET}, HI]
    while True:
        row = copy.deepcopy(draw.choice(seeds))
        for _ in range(draw.randint(1, 3)):
            row = mutate(row, draw, lambda: copy.deepcopy(draw.choice(odd)))
        yield row


def mutate(value: Any, draw: random.Random, odd: Callable[[], Any]) -> Any:
    inside: list[Any] = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    if not inside or draw.random() < 0.1:
        return odd()
    key = draw.choice(inside)
    action = draw.random()
    if action < 0.7:
        value[key] = mutate(value[key], draw, odd)
    elif action < 0.85:
        del value[key]
    elif isinstance(value, dict):
        value[draw.choice([SECRET, 3, None, "weight", "tools", "system", "text", "messages"])] = odd()
    else:
        value.append(odd())
    return value


def malformed(seed: int, rows: int) -> Iterator[bytes]:
    """Yield lines of JSON, some of which say something wrong and some of which are broken, by a few bytes, as JSON."""
    draw = random.Random(seed)
    odd = [b'"', b"\\", b"{", b"]", b"\xff", b"\0", b",", b"\r", b"NaN", b"\\ud800", b"\xef\xbb\xbf", b"", b"1" * 5000]
    for row in itertools.islice(mutants(seed), rows):
        try:
            line = bytearray(json.dumps(row).encode())
        except ValueError:  # An integer that Python does not write.
            continue
        for _ in range(draw.randint(0, 2)):
            at = draw.randrange(len(line) + 1)
            line[at : at + draw.randint(0, 2)] = draw.choice(odd)
        yield bytes(line)


def shows_no_text(error: RowError | InputError) -> bool:
    return SECRET[:21] not in str(error) and len(str(error)) < 400


def test_100_000_malformed_rows_give_only_row_errors_that_never_show_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "first"}\n' + b"\n".join(malformed(0, 110_000)))
    counts = Counter[str]()
    for row in stream_samples(path):
        counts[type(row.sample).__name__] += 1
        if isinstance(row.sample, RowError):
            assert str(row.sample).startswith(f"{path}:{row.line}: ") and shows_no_text(row.sample)
    assert counts.keys() == {"Sample", "RowError", "EmptyAnswerError"}
    assert counts["RowError"] + counts["EmptyAnswerError"] > 100_000


def test_rows_in_memory_and_broken_files_give_only_input_errors_too(tmp_path: Path) -> None:
    for row in itertools.islice(mutants(1), 2_000):
        try:
            from_rows([row])
        except RowError as error:
            assert shows_no_text(error)
    draw = random.Random(1)
    for number in range(400):
        text = json.dumps([{"text": SECRET}, {"question": SECRET, "answer": SECRET}]).encode()
        if number % 2:
            text = lines({"text": SECRET}, {"text": SECRET}) + b"id,text\n1," + SECRET.encode() + b"\n"
        data = bytearray(text)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data))
            data[at : at + draw.randint(0, 2)] = draw.choice(
                [b'"', b"\\", b"{", b"]", b"\xff", b"\n", b"\0", b",", b"\r"]
            )
        path = write(tmp_path / draw.choice(["a.json", "a.jsonl", "a.csv", "a.txt"]), bytes(data))
        try:
            read_samples(path)
        except InputError as error:
            assert SECRET[:21] not in str(error)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data files in shared/, which is not here")
@pytest.mark.parametrize(
    ("file", "format", "count"),
    [
        ("gsm8k/test.jsonl", "question-answer", 1_319),
        ("t0_p3/quarel_choose_between.jsonl", "prompt-completion", 200),
        ("wikitext2/test.txt", "text", 2_891),
    ],
)
def test_real_files_are_read_whole(file: str, format: str, count: int) -> None:
    samples = read_samples(SHARED / "data" / file)
    assert (samples.format, len(samples)) == (format, count)
