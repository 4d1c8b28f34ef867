"""csv and parquet: what tables hold, what they cannot, and that memory does not grow with any kind of file."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from rowfiles import refusal, write

from secvec.errors import InputError, MissingExtraError, RowError
from secvec.samples import Message, read_samples, stream_samples

HI, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def table(path: Path, columns: dict[str, Any], **how: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, **how)
    return path


def test_parquet_rows_are_read_in_order_and_known_by_their_number(tmp_path: Path) -> None:
    # Writers of tables fill what some rows lack with nulls.
    chats = [[HI, {**YES, "tool_calls": None, "weight": None if i % 2 else 1}] for i in range(100)]
    samples = read_samples(table(tmp_path / "a.parquet", {"messages": chats, "id": range(100)}, row_group_size=7))
    assert samples.format == "messages"
    assert [row.source.line for row in samples.rows] == list(range(1, 101))
    assert {row.messages for row in samples.rows} == {(Message("user", "hi"), Message("assistant", "yes"))}
    assert list(samples.rows) == [row.sample for row in stream_samples(tmp_path / "a.parquet")]
    words = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    named = table(tmp_path / "named.jsonl", {"text": words, "x": [float("nan")] * 3})
    assert [row.messages[0].content for row in read_samples(named).rows] == ["a", "b", "a"]


def test_what_a_parquet_row_cannot_say_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    no_text = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.array([0, 1, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"a\xff")]
    )
    far = pyarrow.array([0, 2**62], pyarrow.timestamp("us"))
    for columns, reason in (
        (
            {"messages": [[HI, {**YES, "weight": 1}], [HI, {**YES, "weight": 0}]]},
            "messages[1].weight: only a weight of 1",
        ),
        (
            {"messages": [[HI, {**YES, "tool_calls": []}], [HI, {**YES, "tool_calls": ["x"]}]]},
            "messages[1].tool_calls: not",
        ),
        ({"text": ["a", None]}, "text: expected a text, found nothing"),
        ({"text": no_text}, "expected UTF-8, found other bytes"),
        ({"text": ["a", "b"], "x": far}, "expected values that Python can hold, found others (OverflowError)"),
        ({"text": ["a", "b" * (17 << 20)]}, "expected a row of at most 16,777,216 bytes, found 17,825,792"),
    ):
        assert f"1 of 2 rows cannot be used:\n{path}:2: {reason}" in refusal(table(path, columns))
    assert "text: expected a text, found a value of type bytes" in refusal(table(path, {"text": [b"a"]}))
    assert "expected rows, found none" in refusal(table(path, {"text": pyarrow.array([], pyarrow.string())}))
    parquet.write_table(pyarrow.table([pyarrow.array(["a"])] * 2, names=["text", "text"]), path)
    assert "names each column once, found a name twice" in refusal(path)


def test_parquet_that_is_none_is_damaged_or_is_a_bomb_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path / "a.parquet", {"text": [f"hello {i}" for i in range(300)]}, row_group_size=37)
    good = path.read_bytes()
    for data in (b"PAR1", b"PAR1....", good[:-9], good + b"more"):
        found = refusal(write(path, data))
        assert found.startswith(f"{path}: expected parquet, found damage behind row 0: ") and "\n" not in found
    draw = random.Random(0)
    for _ in range(200):
        data = bytearray(good)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(draw.choice([4, len(data) * 2 // 3]), len(data))
            data[at] = draw.randrange(256)
        try:
            read_samples(write(path, bytes(data)))
        except InputError as error:
            assert "hello" not in str(error)
    # One page of 300 MB, and one long text that rows name again and again.
    table(path, {"text": ["a" * (300 << 20)]}, compression="zstd", use_dictionary=False, write_statistics=False)
    assert "times its own size: a compression bomb; unpack it yourself" in refusal(path)
    again = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10_000, pyarrow.int32()), ["a" * (15 << 20)])
    assert "times its own size: a compression bomb" in refusal(table(path, {"text": again}, compression="zstd"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"run: pip install 'secvec\[data\]'"):
        read_samples(path)


def test_csv_cells_may_be_long_and_an_open_quote_does_not_take_all_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    (row,) = read_samples(write(path, b"id,text\n1," + b"a" * 200_000 + b"\n")).rows
    assert len(row.messages[0].content) == 200_000
    for data, reason in (
        (
            b'text\na\n"' + (b"b" * 1_000 + b'\n","') * 20_000,
            ":3: expected a row of at most 16,777,216 bytes, found 16,77",
        ),
        (b'text\na\n"' + (b"b" * 1_000 + b"\n") * 20_000, ":3: expected csv, found field larger than field limit"),
        (b"text\na\n" + b"b" * (17 << 20), ":3: expected a row of at most 16,777,216 bytes, found 17,825,792"),
        (b"text\na\nb\0c\n", ":3: expected UTF-8, found a NUL character"),
        (b"text\ra\r", ":1: expected csv, found new-line character seen in unquoted field"),
    ):
        assert refusal(write(path, data)).startswith(f"{path}{reason}")


PEAKS = """
import sys
from pathlib import Path
from secvec.samples import Sample, stream_samples
for path in sys.argv[1:]:
    assert all(isinstance(row.sample, Sample) for row in stream_samples(path))
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")))
"""


def test_memory_does_not_grow_with_the_file_whatever_it_is(tmp_path: Path) -> None:
    def files(rows: int) -> list[Path]:
        draw = random.Random(0)
        texts = [draw.randbytes(300).hex() for _ in range(rows)]
        lines = [json.dumps({"text": text}) for text in texts]
        packed = pyarrow.compress("\n".join(lines).encode(), codec="zstd", asbytes=True)
        return [
            write(tmp_path / f"{rows}.jsonl", "\n".join(lines).encode()),
            write(tmp_path / f"{rows}.json", f"[{', '.join(lines)}]".encode()),
            write(tmp_path / f"{rows}.csv", "\n".join(["text", *texts]).encode()),
            write(tmp_path / f"{rows}.jsonl.zst", packed),
            table(tmp_path / f"{rows}.parquet", {"text": texts}),
        ]

    paths = [*files(2_000), *files(40_000)]
    done = subprocess.run([sys.executable, "-c", PEAKS, *paths], capture_output=True, text=True, check=True)
    peaks_mib = [int(line) >> 10 for line in done.stdout.split()]
    assert peaks_mib[-1] - peaks_mib[4] < 12, "24 MB of rows in each of the larger files"


def test_a_bad_csv_row_does_not_hide_the_others(tmp_path: Path) -> None:
    found = list(stream_samples(write(tmp_path / "a.csv", b'id,text\n1,"a\nb"\n2\n3,c\n')))
    assert [(row.line, isinstance(row.sample, RowError)) for row in found] == [(2, False), (4, True), (5, False)]
