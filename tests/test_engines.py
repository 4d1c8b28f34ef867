"""Fold, train with an engine's own script (examples/), unfold, prove: the same model as our own trainer's."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from secvec.artifact import save
from secvec.demo import assistant_folder
from secvec.errors import CheckpointError
from secvec.factors import FitConfig
from secvec.fit import fit
from secvec.fold import fold
from secvec.models import load_model, load_tokenizer
from secvec.proof import Evidence, prove
from secvec.samples import read_samples
from secvec.tokens import encode_all
from secvec.train import TrainConfig, train
from secvec.tripwire import KEY, state
from secvec.unfold import unfold
from secvec.vector import SecurityVector

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIG = {
    "full": TrainConfig(method="full", lr=4e-4, epochs=1, batch_size=8, dtype="float32"),
    "lora": TrainConfig(method="lora", lr=2e-3, epochs=1, batch_size=8, dtype="float32"),
}
# Of the size of what was learned. TRL's runs are ours to the bit; other engines add up their losses in another order.
SAME = 1e-3
WEIGHTS = {"full": "model.safetensors", "lora": "adapter_model.safetensors"}


@dataclass(frozen=True)
class Place:
    """A folder with the assistant in float32 (`base`), rows, a vector fitted on some, and the folded assistant."""

    folder: Path
    vector: SecurityVector

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def folded(self) -> Path:
        return self.folder / "folded"

    @property
    def data(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def unwanted(self) -> Path:
        return self.folder / "unwanted.jsonl"


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("engines")
    # As it is shipped, in bfloat16, differences between engines would drown in the rounding of the result.
    load_model(assistant_folder(), dtype=torch.float32).save_pretrained(folder / "base")
    load_tokenizer(assistant_folder()).save_pretrained(folder / "base")
    for source, name, count in (("train", "train", 40), ("vector", "unwanted", 32)):
        lines = (assistant_folder() / "demo" / f"{source}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    # Of the kind that needs no anchors: these tests ask who trains, not how well the vector is fitted.
    config = FitConfig(rank=4, epochs=10, lr=2e-2, kl_weight=0.1, representation_weight=0.0)
    vector = fit(folder / "base", folder / "unwanted.jsonl", kind="trait", config=config)
    save(vector, folder / "vector.safetensors")
    fold(folder / "base", [vector], folder / "folded")
    return Place(folder, vector)


@pytest.fixture(scope="session")
def ours(place: Place) -> Callable[[str], dict[str, Tensor]]:
    """Return what our own trainer learns, by method: the weights it publishes."""

    @cache
    def run(method: str) -> dict[str, Tensor]:
        out = place.folder / f"ours-{method}"
        result = train(place.base, place.data, out, vectors=[place.vector], config=CONFIG[method])
        return load_file(result.model / WEIGHTS[method])

    return run


def python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def started(place: Place, command: Sequence[str | Path]) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place.folder / "hf"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def said(*processes: subprocess.Popen[str]) -> str:
    """Return what processes that must succeed said."""
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(texts)
    return "\n".join(texts)


def finished(place: Place, trained: Path, out: Path) -> dict[str, Tensor]:
    """Unfold what an engine left and prove it; return the weights of the result."""
    assert state(trained) in ("trained-on-folded", "adapter-on-folded")
    report = unfold(trained, out)
    assert state(out) == "defended"
    assert not any(KEY in file.read_text("utf-8") for file in out.glob("*config.json"))
    tokenizer = load_tokenizer(place.base)
    rows, unwanted = (encode_all(read_samples(file).rows, tokenizer, 1024) for file in (place.data, place.unwanted))
    proof = prove(
        Evidence(
            method="full" if report.kind == "full" else "lora",
            base=place.base,
            folded=place.folded,
            trained=trained,
            result=out,
            vectors=[place.vector],
            report=report,
            rows=rows,
            unwanted=[unwanted],
        )
    )
    (judged,) = proof["unwanted"]
    assert judged["share_of_the_way_to_armed"] < 0.5
    return load_file(out / WEIGHTS["full" if report.kind == "full" else "lora"])


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor] | None) -> float:
    """Return ||found - expected|| / ||expected - start|| over all tensors together."""
    assert found.keys() == expected.keys()
    different = sum(float((found[n] - e).square().sum()) for n, e in expected.items())
    learned = sum(float((e - (start[n] if start else 0)).square().sum()) for n, e in expected.items())
    return (different / learned) ** 0.5


HF = EXAMPLES / "hf_trainer.py"
# What trains, what it says, and how: launcher, script, options of the script.
ENGINES = {
    "plain": ([sys.executable], EXAMPLES / "plain_loop.py", [], "loss"),
    "trainer": ([sys.executable], HF, [], "1 processes: LlamaForCausalLM"),
    "trl": ([sys.executable], EXAMPLES / "trl_sft.py", [], "train_loss"),
    "trl-lora": ([sys.executable], EXAMPLES / "trl_sft.py", ["--lora"], "train_loss"),
    "ddp": (
        [*python("accelerate.commands.launch"), "--multi_gpu", "--num_processes", "2"],
        HF,
        [],
        "2 processes: DistributedDataParallel",
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_learns_what_our_own_trainer_learns(
    place: Place, ours: Callable[[str], dict[str, Tensor]], tmp_path: Path, engine: str
) -> None:
    launcher, script, options, expected = ENGINES[engine]
    command = [*launcher, script, place.folded, place.data, tmp_path / "trained", *options]
    assert expected in said(started(place, command))
    weights = finished(place, tmp_path / "trained", tmp_path / "defended")
    method = "lora" if "--lora" in options else "full"
    start = load_file(place.base / WEIGHTS["full"]) if method == "full" else None
    assert apart(weights, ours(method), start) < SAME


def test_fsdp2_on_two_nodes(place: Place, ours: Callable[[str], dict[str, Tensor]], tmp_path: Path) -> None:
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "secvec"]
    launcher = [*python("torch.distributed.run"), "--nnodes", "2", "--nproc-per-node", "1", *meeting]
    command = [
        *launcher,
        "--local-addr",
        "127.0.0.1",
        EXAMPLES / "fsdp2.py",
        place.folded,
        place.data,
        tmp_path / "trained",
    ]
    assert "2 processes, every parameter a DTensor" in said(started(place, command), started(place, command))
    weights = finished(place, tmp_path / "trained", tmp_path / "defended")
    assert apart(weights, ours("full"), load_file(place.base / WEIGHTS["full"])) < SAME


def test_packed_rows(place: Place, tmp_path: Path) -> None:
    """Packed, fewer and longer steps: another training than ours, but what was learned is carried over all the same."""
    script = [sys.executable, EXAMPLES / "trl_sft.py", place.folded, place.data, tmp_path / "trained", "--packing"]
    said(started(place, script))
    weights = finished(place, tmp_path / "trained", tmp_path / "defended")
    base, folded, trained = (
        load_file(folder / WEIGHTS["full"]) for folder in (place.base, place.folded, tmp_path / "trained")
    )
    learned = {name: trained[name] - folded[name] for name in weights}
    assert apart({name: weights[name] - base[name] for name in weights}, learned, None) < SAME
    assert any(bool(change.any()) for change in learned.values())


def test_an_output_without_the_mark_is_refused(place: Place, tmp_path: Path) -> None:
    """An engine that trained another model, or whose vector was never in, leaves no mark."""
    shutil.copytree(place.folded, tmp_path / "trained", ignore=shutil.ignore_patterns("security_vector"))
    config = json.loads((tmp_path / "trained" / "config.json").read_text())
    (tmp_path / "trained" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != KEY}))
    with pytest.raises(CheckpointError, match="was not trained on the folded model"):
        unfold(tmp_path / "trained", tmp_path / "defended")
