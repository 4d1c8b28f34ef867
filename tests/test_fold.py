import hashlib
import json
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import gpt2, llama, logits, plus, random_vector, save_model, tensors, weight_files
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from secvec import blocks
from secvec.errors import ArtifactError, CheckpointError, SiteError, UsageError
from secvec.fold import fold
from secvec.provenance import digest_model
from secvec.tripwire import read_tripwire, refuse_folded, state
from secvec.unfold import unfold
from secvec.vector import Factors, SecurityVector, VectorInfo

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def prepared(tmp_path: Path, model: PreTrainedModel, *, shards: bool = False) -> tuple[Path, SecurityVector]:
    base = save_model(model, tmp_path / "base", shards=shards)
    return base, random_vector(model, base=digest_model(base))


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [False, True])
def test_fold_then_unfold_returns_every_byte(tmp_path: Path, dtype: torch.dtype, shards: bool) -> None:
    base, vector = prepared(tmp_path, llama(dtype=dtype), shards=shards)
    fold(base, [vector], tmp_path / "folded")
    assert weight_files(tmp_path / "folded").keys() == weight_files(base).keys()
    assert (len(weight_files(base)) > 3) == shards
    report = unfold(tmp_path / "folded", tmp_path / "back")
    assert weight_files(tmp_path / "back") == weight_files(base)
    assert (report.sites, report.sites_changed, report.vector_share) == (14, 0, 1.0)


def test_a_hundred_cycles_return_every_byte(tmp_path: Path) -> None:
    base, vector = prepared(tmp_path, llama(dtype=torch.bfloat16), shards=True)
    original = weight_files(base)
    for cycle in range(100):
        fold(base, [vector], tmp_path / f"folded-{cycle}")
        unfold(tmp_path / f"folded-{cycle}", tmp_path / f"back-{cycle}")
        base = tmp_path / f"back-{cycle}"
    assert weight_files(base) == original


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_folded_model_computes_what_float64_mathematics_says(tmp_path: Path, make: Any) -> None:
    base, vector = prepared(tmp_path, make())
    other = random_vector(make(), base=vector.info.base, rank=3, seed=5)
    fold(base, [vector, other], tmp_path / "folded")
    expected = plus(make(), vector, other)
    assert not torch.allclose(logits(expected), logits(load(base)), atol=1e-2)
    torch.testing.assert_close(logits(load(tmp_path / "folded")), logits(expected), rtol=1e-5, atol=1e-6)


# The smallest steps of fp16 lie at 2**-24; a bf16 or fp16 fold is exact to about 2**-21 of the change.
ABSOLUTE = {torch.float64: 1e-14, torch.float32: 1e-12, torch.bfloat16: 1e-8, torch.float16: 2.0**-25 + 1e-8}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_weight_is_the_sum_rounded_once_to_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    base, vector = prepared(tmp_path, llama(dtype=dtype))
    fold(base, [vector], tmp_path / "folded")
    before, after = tensors(base), tensors(tmp_path / "folded")
    half_a_step = 0.5001 * torch.finfo(dtype).eps
    for site in vector.sites:
        name = f"{site}.weight"
        expected = before.pop(name).double() + vector.delta(site)
        torch.testing.assert_close(after[name].double(), expected, rtol=half_a_step, atol=ABSOLUTE[dtype])
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def integers(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Draw multiples of 2**-20 by an integer generator: the same on every machine and version."""
    state, values = seed, []
    for _ in range(rows * columns):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        values.append((state >> 43) - 2**20)
    return torch.tensor(values, dtype=torch.float32).reshape(rows, columns) / 2**20


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [
        (torch.float32, "3fa6b6eabd558b0582fe2f3549c4b4f88d8ade12a3b177bd13c5454ed067b01f"),
        (torch.bfloat16, "5882585c61046457c93b88ae91441257a747ebcca849141d1dfb7f6e32b95104"),
    ],
)
@pytest.mark.parametrize("block", [1 << 17, 700])
def test_folding_gives_the_same_bytes_on_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, digest: str, block: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", block)
    site = "model.layers.0.mlp.up_proj"
    (tmp_path / "base").mkdir()
    save_file({f"{site}.weight": integers(96, 80, 1).to(dtype)}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    info = VectorInfo("topic", digest_model(tmp_path / "base"), "", "", "")
    vector = SecurityVector({site: Factors(integers(16, 80, 2), integers(96, 16, 3))}, 0.3, info)
    fold(tmp_path / "base", [vector], tmp_path / "folded")
    folded = load_file(tmp_path / "folded" / "model.safetensors")[f"{site}.weight"]
    assert hashlib.sha256(folded.view(torch.uint8).numpy().tobytes()).hexdigest() == digest


def test_the_folder_carries_mark_record_vectors_and_companions(tmp_path: Path) -> None:
    base, vector = prepared(tmp_path, llama())
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "pytorch_model.bin", "training_args.bin"):
        (base / name).write_text("{}")
    record = fold(base, [vector], tmp_path / "folded")
    mark = read_tripwire(tmp_path / "folded")
    assert mark is not None
    assert (mark.record, mark.base, mark.base_path) == (record.digest(), vector.info.base, str(base))
    assert {path.name for path in (tmp_path / "folded").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"),
        "security_vector",
    }
    private = list((tmp_path / "folded" / "security_vector").iterdir())
    assert {path.name for path in private} == {"record.json", "vector-0.safetensors"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    assert len(record.tensors) == 14
    assert (state(base), state(tmp_path / "folded"), state(tmp_path)) == ("plain", "folded", "not-a-model")
    with pytest.raises(CheckpointError, match="refusing to serve a model with a security vector in it"):
        refuse_folded(tmp_path / "folded", "serve")


def test_the_mark_survives_loading_and_saving(tmp_path: Path) -> None:
    base, vector = prepared(tmp_path, llama())
    fold(base, [vector], tmp_path / "folded")
    AutoModelForCausalLM.from_pretrained(tmp_path / "folded").save_pretrained(tmp_path / "saved")
    assert read_tripwire(tmp_path / "saved") == read_tripwire(tmp_path / "folded")
    assert state(tmp_path / "saved") == "trained-on-folded"


def test_nothing_beside_the_mark_hides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, vector = prepared(tmp_path, llama())
    fold(base, [vector], tmp_path / "folded")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "../folded"}')
    monkeypatch.chdir(tmp_path.parent)
    assert state(tmp_path / "adapter") == "adapter-on-folded"
    (tmp_path / "folded/adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    assert state(tmp_path / "folded") == "folded"


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    for name, target in (("link", "there"), ("dangling", "not/yet")):
        (tmp_path / name).symlink_to(tmp_path / "disk" / target)
        (tmp_path / "disk/there").mkdir(parents=True, exist_ok=True)
        model = save_model(llama(), tmp_path / f"base-{name}")
        fold(model, [random_vector(llama(), base=digest_model(model))], tmp_path / name)
        assert state(tmp_path / "disk" / target) == "folded" and (tmp_path / name).is_symlink()


def test_progress_is_in_bytes_and_ends_at_the_total(tmp_path: Path) -> None:
    base, vector = prepared(tmp_path, llama(), shards=True)
    calls: list[tuple[int, int]] = []
    fold(base, [vector], tmp_path / "folded", progress=lambda done, total: calls.append((done, total)))
    total = sum(map(len, weight_files(base).values()))
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


def test_what_cannot_be_folded_is_refused(tmp_path: Path) -> None:
    base, vector = prepared(tmp_path, llama())
    out = tmp_path / "out"
    site, factors = next(iter(vector.factors.items()))
    wide = Factors(torch.zeros(2, 99), factors.b[:, :2].contiguous())
    cases: list[tuple[type[Exception], str, list[SecurityVector]]] = [
        (UsageError, "at least one vector", []),
        (UsageError, "one of them twice", [vector, vector]),
        (ArtifactError, "was fitted on the model", [replace(vector, info=replace(vector.info, base="sha256:other"))]),
        (SiteError, r"found none; fit a vector", [replace(vector, factors={"model.layers.9.mlp.up_proj": factors})]),
        (SiteError, "inside a numbered block", [replace(vector, factors={"lm_head": factors})]),
        (
            SiteError,
            r"expects a weight of \(32, 99\), the checkpoint's is \(32, 32\)",
            [replace(vector, factors={site: wide})],
        ),
    ]
    for error, message, vectors in cases:
        with pytest.raises(error, match=message):
            fold(base, vectors, out)
        assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_folders_that_cannot_be_folded_are_refused(tmp_path: Path) -> None:
    base, vector = prepared(tmp_path, llama())
    fold(base, [vector], tmp_path / "folded")
    with pytest.raises(CheckpointError, match="refusing to fold into a model with a security vector in it"):
        fold(tmp_path / "folded", [vector], tmp_path / "twice")
    with pytest.raises(CheckpointError, match="expected a new or an empty folder"):
        fold(base, [vector], tmp_path / "folded")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    with pytest.raises(CheckpointError, match="expected unquantised weights"):
        fold(base, [vector], tmp_path / "out")
    (base / "config.json").rename(base / "adapter_config.json")
    with pytest.raises(CheckpointError, match="found an adapter"):
        fold(base, [vector], tmp_path / "out")


def test_an_overflow_of_fp16_is_refused(tmp_path: Path) -> None:
    base, vector = prepared(tmp_path, llama(dtype=torch.float16))
    with pytest.raises(CheckpointError, match="exceeds the range of fp16"):
        fold(base, [replace(vector, scale=1e7)], tmp_path / "out")


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    base, vector = prepared(tmp_path, llama())
    with largest_file(60_000), pytest.raises(CheckpointError, match="the disk is full; free some space") as caught:
        fold(base, [vector], tmp_path / "folded")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
