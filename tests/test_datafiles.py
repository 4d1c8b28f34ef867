"""Which files are meant: folders, formats behind a colon, data sets of a hub on loopback, and what is no file."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from secvec.datafiles import find
from secvec.errors import InputError, RowError, UsageError
from secvec.samples import read_samples

ROW = b'{"text": "a"}\n'


def write(path: Path, data: bytes = ROW) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def refusal(data: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        read_samples(data)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    return str(caught.value)


def test_the_format_may_stand_behind_a_colon_unless_that_is_a_files_name(tmp_path: Path) -> None:
    both = write(tmp_path / "a.jsonl", json.dumps({"instruction": "hi", "output": "yes", "text": "b"}).encode())
    assert read_samples(both).format == "alpaca"
    assert read_samples(f"{both}:text").format == read_samples(Path(f"{both}:text")).format == "text"
    with pytest.raises(UsageError, match=r"expected one of the formats messages, .* behind the colon, found 'json'"):
        read_samples(f"{both}:json")
    assert read_samples(write(tmp_path / "a.jsonl:text", both.read_bytes())).format == "alpaca"
    assert f"{tmp_path}/no: expected a readable data file, found: No such" in refusal(f"{tmp_path}/no:text")


def test_a_folder_stands_for_its_data_files_in_order_and_nothing_in_it_is_lost_in_silence(tmp_path: Path) -> None:
    files = [
        write(tmp_path / "a.csv", b"text\na\n"),
        write(tmp_path / "b" / "c.jsonl"),
        write(tmp_path / "licenses.jsonl"),
    ]
    for beside in ("README.md", "LICENSE", ".git/config", "dataset_infos.json", "load.py"):
        write(tmp_path / beside)
    samples = read_samples(tmp_path)
    assert find(tmp_path).files == tuple(files)
    assert [row.source.file for row in samples.rows] == [str(file) for file in files]
    odd = write(tmp_path / "z.jsonl", b'{"question": "a", "answer": "b"}\n')
    with pytest.raises(RowError, match=f"1 of 4 rows.*\n{odd}:1: expected a row in format 'text', found one in 'quest"):
        read_samples(tmp_path)
    write(odd, b" \n")
    assert refusal(tmp_path) == f"{odd}: expected rows, found an empty file"
    odd.unlink()
    for name in ("rows.xlsx", "a.parquet.gz", "rows"):
        assert f"{tmp_path / name}: expected data files in the folder" in refusal(write(tmp_path / name).parent)
        (tmp_path / name).unlink()
    odd.symlink_to(tmp_path, target_is_directory=True)
    assert f"{odd}: expected files and folders, found a link to a folder" in refusal(tmp_path)
    assert "expected data files in the folder, found none" in refusal(write(tmp_path / "e" / "README.md").parent)


def test_files_of_several_splits_are_not_read_as_one(tmp_path: Path) -> None:
    for name in ("data/train-0.jsonl", "data/train-1.jsonl", "data/latest.jsonl", "data/train_eval.jsonl"):
        write(tmp_path / name)
    assert len(read_samples(tmp_path)) == 4
    write(tmp_path / "data" / "test-0.jsonl")
    assert "expected the files of one split, found those of test and train; name a file" in refusal(tmp_path)


@pytest.mark.timeout(20)
def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "folder" / "pipe.jsonl"
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = {
        pipe: "found a pipe; save it as a file",
        pipe.parent: f"{pipe}: expected a file, which can be read more than once, found a pipe",
        Path("/dev/zero"): "found a device or socket",
        tmp_path / "loop": "expected a readable data file, found: Too many levels of symbolic links",
        tmp_path / ("a" * 300): "expected a readable data file, found: File name too long",
        Path("a\0b.jsonl"): "expected a readable data file, found: embedded null byte",
    }
    if Path("/proc/self/mem").exists():
        cases[Path("/proc/self/mem")] = "expected a readable data file, found: Input/output error"
    for path, reason in cases.items():
        assert reason in refusal(path)


HUB = {
    "data/train-0.jsonl": b'{"text": "a"}\n',
    "data/train-1.jsonl": b'{"text": "b"}\n',
    "data/test.jsonl": b'{"text": "c"}\n',
    "README.md": b"no data",
}
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP API as a download needs, for one data set, owner/name."""

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/datasets/owner/name/resolve/{COMMIT}/"):
            body = HUB[path.partition(f"{COMMIT}/")[2]]
        elif path == "/api/datasets/owner/name/revision/main":
            names = [{"rfilename": name} for name in HUB]
            body = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": names}).encode()
        elif path == f"/api/datasets/owner/name/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in HUB.items()
            ]
            body = json.dumps(tree).encode()
        else:
            return self.send_error(404)
        self.send_response(200)
        headers = {"X-Repo-Commit": COMMIT, "ETag": hashlib.sha1(body).hexdigest(), "Content-Length": len(body)}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        return self.wfile.write(body) if with_body else None


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


READ = """
import sys
from secvec.errors import InputError
from secvec.samples import read_samples
for data in sys.argv[1:]:
    try:
        print([row.messages[0].content for row in read_samples(data).rows])
    except InputError as error:
        print(error)
"""


def read_elsewhere(folder: Path, endpoint: str, *data: str) -> list[str]:
    """Read data sets in a process of its own: the hub's address is fixed when its library is loaded."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", READ, *data], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_a_data_set_of_the_hub_is_read_by_its_id(tmp_path: Path, hub: str) -> None:
    write(tmp_path / "here" / "b.jsonl")
    several, train, test, none, missing, local, mistyped = read_elsewhere(
        tmp_path,
        hub,
        "owner/name",
        "owner/name/data/train-*",
        "owner/name/data/test.jsonl:text",
        "owner/name/absent",
        "owner/missing",
        "here/rows",
        "rows/a.jsonl",
    )
    assert several.startswith("owner/name: expected the files of one split, found those of test and train; name a file")
    assert several.endswith("such as owner/name/data/test.jsonl")
    assert (train, test) == ("['a', 'b']", "['c']")
    assert none == "owner/name/absent: expected data files in this data set of the hub, found none at this path"
    assert missing.startswith("'owner/missing' is neither a file or folder here nor a data set of the hub")
    # What looks like a path of this machine is not sent away.
    assert local == "here/rows: expected a readable data file, found: No such file or directory; check the path"
    assert mistyped.startswith("rows/a.jsonl: expected a readable data file")


def test_without_a_hub_one_line_says_so(tmp_path: Path) -> None:
    (said,) = read_elsewhere(tmp_path, "http://127.0.0.1:9", "owner/name")
    assert "'owner/name' is neither a file or folder here nor a data set of the hub that can be reached" in said
