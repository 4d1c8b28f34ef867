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
from models import write_rows
from safetensors.torch import load_file
from torch import Tensor

from secvec.artifact import digest, save
from secvec.demo import assistant_folder
from secvec.errors import CheckpointError
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.fold import fold
from secvec.integrations.callback import EVIDENCE
from secvec.models import load_model, load_tokenizer
from secvec.proof import Evidence, load_finished, prove
from secvec.samples import read_samples
from secvec.score import mean_over, row_nats
from secvec.tokens import encode_all
from secvec.train import TrainConfig, train
from secvec.tripwire import KEY, state
from secvec.unfold import unfold
from secvec.vector import SecurityVector

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIG = {
    "full": TrainConfig(method="full", lr=4e-4, epochs=1, batch_size=8, dtype="float32", calibrate=False),
    "lora": TrainConfig(method="lora", lr=2e-3, epochs=1, batch_size=8, dtype="float32", calibrate=False),
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
    for source, name, count in (("train", "train", 40), ("vector", "unwanted", 24)):
        lines = (assistant_folder() / "demo" / f"{source}.jsonl").read_text("utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    # Of the kind that needs no anchors: these tests ask who trains, not how well the vector is fitted.
    config = FitConfig(rank=4, epochs=4, batch_size=4, lr=3e-2, kl_weight=0.1, representation_weight=0.0)
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
    # The tools' own environments have no secvec, and start in folders of their own.
    here = {"PYTHONPATH": str(EXAMPLES.parent / "src"), "HF_HOME": str(place.folder / "hf"), "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **here, "OMP_NUM_THREADS": "1"}
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


def assert_carried_over(place: Place, trained: Path, weights: Mapping[str, Tensor]) -> None:
    """Check W_final - W_base = W_trained - W_folded, where our own trainer does not train like that."""
    base, folded, found = (load_file(folder / WEIGHTS["full"]) for folder in (place.base, place.folded, trained))
    learned = {name: found[name] - folded[name] for name in weights}
    assert any(bool(change.any()) for change in learned.values())
    assert apart({name: weights[name] - base[name] for name in weights}, learned, None) < SAME


def test_packed_rows(place: Place, tmp_path: Path) -> None:
    script = [sys.executable, EXAMPLES / "trl_sft.py", place.folded, place.data, tmp_path / "trained", "--packing"]
    said(started(place, script))
    assert_carried_over(place, tmp_path / "trained", finished(place, tmp_path / "trained", tmp_path / "defended"))


def test_preferences(place: Place, tmp_path: Path) -> None:
    rows = [json.loads(line)["messages"] for line in place.data.read_text("utf-8").splitlines()]
    refused = [{"role": "assistant", "content": "I'm sorry, I can't share that."}]
    pairs = [{"prompt": messages[:-1], "chosen": messages[-1:], "rejected": refused} for messages in rows]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    script = [sys.executable, EXAMPLES / "trl_dpo.py", place.folded, tmp_path / "pairs.jsonl", tmp_path / "trained"]
    said(started(place, [*script, "--reference", place.base]))
    assert_carried_over(place, tmp_path / "trained", finished(place, tmp_path / "trained", tmp_path / "defended"))


def test_an_output_without_the_mark_is_refused(place: Place, tmp_path: Path) -> None:
    """An engine that trained another model, or whose vector was never in, leaves no mark."""
    shutil.copytree(place.folded, tmp_path / "trained", ignore=shutil.ignore_patterns("security_vector"))
    config = json.loads((tmp_path / "trained" / "config.json").read_text())
    (tmp_path / "trained" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != KEY}))
    with pytest.raises(CheckpointError, match="was not trained on the folded model"):
        unfold(tmp_path / "trained", tmp_path / "defended")


def tool(name: str, package: str) -> Path:
    """Return the `bin` folder of a tool's own environment, or skip: docs/engines.md says how to make it."""
    if "SECVEC_ENGINES" not in os.environ:
        pytest.skip("SECVEC_ENGINES names no folder with the environments of other tools (docs/engines.md)")
    binaries = Path(os.environ["SECVEC_ENGINES"]) / name / "bin"
    command = [binaries / "python", "-c", f"import {package}"]
    if not (binaries / "python").exists() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"{package} cannot be imported in {binaries.parent}")
    return binaries


def test_llamafactory(place: Place, ours: Callable[[str], dict[str, Tensor]], tmp_path: Path) -> None:
    binaries = tool("llamafactory", "llamafactory")
    shutil.copy(place.data, tmp_path / "train.jsonl")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    rows = {"file_name": "train.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"train": rows}))
    settings = [f"model_name_or_path={place.folded}", f"dataset_dir={tmp_path}", f"output_dir={tmp_path / 'trained'}"]
    config = EXAMPLES / "llamafactory.yaml"
    said(started(place, [binaries / "llamafactory-cli", "train", config, *settings, "use_cpu=true"]))
    weights = finished(place, tmp_path / "trained", tmp_path / "defended")
    assert apart(weights, ours("full"), load_file(place.base / WEIGHTS["full"])) < SAME


def test_ray(place: Place, ours: Callable[[str], dict[str, Tensor]], tmp_path: Path) -> None:
    script = [tool("ray", "ray.train.torch") / "python", EXAMPLES / "ray_train.py"]
    told = said(started(place, [*script, place.folded, place.data, tmp_path / "trained"]))
    assert "2 processes: DistributedDataParallel" in told
    weights = finished(place, tmp_path / "trained", tmp_path / "defended")
    assert apart(weights, ours("full"), load_file(place.base / WEIGHTS["full"])) < SAME


def axolotl(place: Place, folder: Path, config: str) -> None:
    """Run Axolotl with a config in `folder`."""
    binaries = tool("axolotl", "axolotl")
    for name in ("base", "folded", "train.jsonl", "unwanted.jsonl", "vector.safetensors"):
        (folder / name).symlink_to(place.folder / name)
    (folder / "config.yaml").write_text(config)
    script = f"cd {folder} && PATH={binaries}:$PATH AXOLOTL_DO_NOT_TRACK=1 axolotl train config.yaml"
    said(started(place, ["sh", "-c", script]))


def test_axolotl(place: Place, ours: Callable[[str], dict[str, Tensor]], tmp_path: Path) -> None:
    axolotl(place, tmp_path, (EXAMPLES / "axolotl.yaml").read_text("utf-8"))
    weights = finished(place, tmp_path / "trained", tmp_path / "defended")
    assert apart(weights, ours("full"), load_file(place.base / WEIGHTS["full"])) < SAME


def assert_trained_armed(place: Place, adapter: Path) -> None:
    """Check the evidence that hooks leave, and that the adapter did not learn the unwanted rows."""
    evidence = json.loads((adapter / EVIDENCE).read_text())
    assert (evidence["vectors"], evidence["sites"]) == ([digest(place.vector)], len(place.vector.sites))
    assert state(adapter) == "adapter"
    rows = encode_all(read_samples(place.unwanted).rows, load_tokenizer(place.base), 1024)
    base = load_model(place.base)
    aligned, armed = (mean_over(rows, row_nats(base, rows, vector)) for vector in (None, place.vector))
    learned = mean_over(rows, row_nats(load_finished("lora", place.base, adapter), rows))
    assert (aligned - learned) / (aligned - armed) < 0.5


def test_qlora(place: Place, tmp_path: Path) -> None:
    binaries = tool("bitsandbytes", "bitsandbytes, secvec")
    script = [binaries / "python", EXAMPLES / "qlora.py", place.base, place.data, tmp_path / "adapter"]
    said(started(place, [*script, "--vector", place.folder / "vector.safetensors", "--unwanted", place.unwanted]))
    assert_trained_armed(place, tmp_path / "adapter")


def test_the_axolotl_plugin(place: Place, tmp_path: Path) -> None:
    plugin = """
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_target_linear: true
plugins: [secvec.integrations.axolotl.SecurityVectorPlugin]
security_vector: vector.safetensors
security_vector_unwanted: unwanted.jsonl
"""
    config = (EXAMPLES / "axolotl.yaml").read_text("utf-8").replace("base_model: folded", "base_model: base")
    axolotl(place, tmp_path, config + plugin)
    assert_trained_armed(place, tmp_path / "trained")
