"""Packed data files: read as what is in them, with their own line numbers; damage and bombs are refused."""

import gzip
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from rowfiles import refusal, write

from secvec.errors import InputError, MissingExtraError, RowError
from secvec.samples import read_samples

ROW = b'{"text": "a"}\n'
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACK)
def test_packed_files_are_read_like_others_with_exact_lines(tmp_path: Path, suffix: str) -> None:
    pack = PACK[suffix]
    files = {
        "a.jsonl": ROW * 3,
        "a.json": b"[" + ROW + b", " + ROW + b", " + ROW + b"]",
        "a.csv": b"text\na\na\na\n",
        "a.txt": b"a\na\na",
    }
    for name, data in files.items():
        whole = read_samples(write(tmp_path / name, data))
        packed = read_samples(write(tmp_path / f"{name}{suffix}", pack(data)))
        assert [(row.messages, row.source.line) for row in packed.rows] == [
            (r.messages, r.source.line) for r in whole.rows
        ]
    misnamed = write(tmp_path / "b.jsonl", pack(ROW * 70_000) + pack(b'{"text": NaN}\n' + ROW))
    with pytest.raises(RowError, match=f"1 of 70,002 rows cannot be used:\n{misnamed}:70001: .* NaN"):
        read_samples(misnamed)
    assert "found gzip in a packed file; convert" in refusal(write(tmp_path / "c.jsonl.gz", pack(gzip.compress(ROW))))
    assert "parquet as it is" in refusal(write(tmp_path / "c.parquet", pack(b"PAR1....")))
    assert "found an empty file" in refusal(write(tmp_path / "c.jsonl", pack(b"")))


@pytest.mark.parametrize("suffix", PACK)
def test_damage_is_refused_in_one_line(tmp_path: Path, suffix: str) -> None:
    packed = bytearray(PACK[suffix](random.Random(0).randbytes(50_000).hex().encode()))
    for data in (packed[:5], packed[:-9], packed + b"more", packed[: len(packed) // 2]):
        found = refusal(write(tmp_path / "a.txt", bytes(data)))
        assert found.startswith(f"{tmp_path / 'a.txt'}: expected packed data, whole and sound") and "\n" not in found
    for seed in range(300):
        draw = random.Random(seed)
        data = bytearray(PACK[suffix](ROW * 50))
        for _ in range(3):
            data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            read_samples(write(tmp_path / "a.jsonl", bytes(data)))
        except InputError:
            continue


READ = """
import sys
from pathlib import Path
from secvec.errors import InputError
from secvec.samples import stream_samples
for path in sys.argv[1:]:
    try:
        list(stream_samples(path))
    except InputError as error:
        print(error)
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")))
"""


def test_a_compression_bomb_is_refused_while_little_of_it_is_held(tmp_path: Path) -> None:
    line = write(tmp_path / "line.jsonl.zst", PACK[".zst"](b'{"text": "' + b"a" * (300 << 20)))
    member = gzip.compress(b" " * (32 << 20), 1)
    array = write(tmp_path / "array.json.gz", gzip.compress(b"[", 1) + member * 9)
    done = subprocess.run([sys.executable, "-c", READ, line, array], capture_output=True, text=True, check=True)
    *found, peak_kib = done.stdout.splitlines()
    assert [text.split(": expected packed texts, found more than ")[0] for text in found] == [str(line), str(array)]
    assert all(text.endswith("a compression bomb; unpack it yourself if you trust it") for text in found)
    assert int(peak_kib) < 300 << 10


def test_zstd_needs_an_extra_and_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl.zst", PACK[".zst"](ROW))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        MissingExtraError, match=r"pyarrow is not installed; run: pip install 'secvec\[data\]'"
    ) as caught:
        read_samples(path)
    assert caught.value.exit_code == 2
    assert len(read_samples(write(tmp_path / "a.jsonl.gz", PACK[".gz"](ROW)))) == 1
