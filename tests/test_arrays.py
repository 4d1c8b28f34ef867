"""JSON arrays: read piece by piece, each element strictly; where the array itself is broken, the place is named."""

import json
import random
from pathlib import Path

from rowfiles import refusal, write

from secvec.samples import Sample, read_samples, stream_samples

DEEP = b"[" * 100_000


def test_an_array_is_read_piece_by_piece_and_its_elements_are_known_by_their_number(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "a.json"
    rows = [{"text": "\u00e9\U0001f600a" * draw.randrange(1, 60_000)} for _ in range(40)]
    text = json.dumps(rows, ensure_ascii=False, indent=1)
    assert [row.messages[0].content for row in read_samples(write(path, text.encode())).rows] == [
        row["text"] for row in rows
    ]
    long = text.replace("[", '[{"text": "' + "a" * (17 << 20) + '"}, ', 1)
    first, *others = stream_samples(write(path, long.encode()))
    assert "expected a row of at most 16,777,216 bytes, found 17,825,804" in str(first.sample)
    assert [row.line for row in others if isinstance(row.sample, Sample)] == list(range(2, 42))
    for broken, reason in (
        (text[:-2], ":40: expected a comma, or ] and nothing more, after this row"),
        (text + "]", ":40: expected a comma, or ] and nothing more, after this row"),
        (text.replace("},", "}", 1), ":1: expected a comma, or ] and nothing more, after this row"),
        (text.replace("}", "", 1), ":1: expected a JSON object, found broken JSON: Expecting"),
        ('[{"text": "' + "a" * (40 << 20), ":1: expected a JSON object of at most 16,777,216 bytes, found broken JSON"),
    ):
        assert refusal(write(path, broken.encode())).startswith(f"{path}{reason}")


def test_a_bad_element_of_an_array_is_named_beside_the_good_ones(tmp_path: Path) -> None:
    good = '{"text": "a"}'
    path = tmp_path / "a.json"
    for bad in ('{"text": NaN}', '{"text": "\\ud800"}', '{"text": "a", "text": "b"}', "3"):
        assert f"1 of 3 rows cannot be used:\n{path}:2: " in refusal(write(path, f"[{good}, {bad},\n{good}]".encode()))
    for broken in (f"[{good}, {good}", f"[{good}, {good} {good}]", f"[{good}, {good}] []", f"[{good}, {{]"):
        assert f"{path}:2: expected" in refusal(write(path, broken.encode()))
    assert "nested too deeply" in refusal(write(path, DEEP))
    assert f"{path}:2: expected UTF-8" in refusal(write(path, b'[{"text": "a"}, {"text": "\xff"}]'))
    assert "expected rows, found none" in refusal(write(path, b" [ ]\n"))
