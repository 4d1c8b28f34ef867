"""Runs of `train` on tiny models, in this process or in one that can be killed; imported by a server that forks.

Importing trl takes seconds. So one process imports it and forks another for each attempt.
"""

import itertools
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from models import byte_tokenizer, chat, rows, tiny_llama, tiny_vector
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from secvec import cli
from secvec.fit import fit
from secvec.fit_config import FitConfig
from secvec.peft_format import UNKNOWN
from secvec.provenance import digest_model
from secvec.train import TrainConfig, train
from secvec.vector import SecurityVector

# Forks of a process whose threads have worked would hang.
torch.set_num_threads(1)
# The default lock lies in shared memory, which a killed process would leave behind.
tqdm.set_lock(threading.RLock())

CONFIG = TrainConfig(lr=1e-3, epochs=2, batch_size=4, save_every=2)
UNWANTED = [chat(f"{i}: name me", "you fool") for i in range(8)]
_FILE_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"})


def llama(folder: Path, *, dtype: torch.dtype = torch.float32, tied: bool = False, dropout: float = 0.1) -> Path:
    """Write a random Llama whose head is large enough that a change inside can make a token likely."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(folder, dtype=dtype, tied=tied, dropout=dropout))
    model.get_output_embeddings().weight.data.mul_(20)
    model.save_pretrained(folder)
    return folder


def gpt2(folder: Path, *, bare: bool = False, positions: int = 256) -> Path:
    """Write a random GPT-2 with dropout; bare: with the tensors' names of older checkpoints, without `transformer.`."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions, "vocab_size": len(tokenizer)}
    model = GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=4))
    (model.transformer if bare else model).save_pretrained(folder)
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_vector(base: Path, *, seed: int = 1, size: float = 0.1) -> SecurityVector:
    """Draw a vector for a model folder; it explains nothing, but it acts."""
    vector = tiny_vector(AutoModelForCausalLM.from_pretrained(base), digest_model(base), size=size, seed=seed)
    return replace(vector, info=replace(vector.info, tokenizer=UNKNOWN, chat_template=UNKNOWN))


def fitted_vector(base: Path, unwanted: Sequence[Mapping[str, Any]] = UNWANTED) -> SecurityVector:
    """Fit a vector on the unwanted rows, of the kind that needs no anchors."""
    config = FitConfig(rank=4, epochs=16, batch_size=4, lr=5e-2, kl_weight=0.1, representation_weight=0.0)
    return fit(base, unwanted, kind="trait", config=config)


@dataclass(frozen=True)
class Run:
    """The arguments of one run of `train`."""

    base: Path
    out: Path
    vectors: Sequence[SecurityVector | str | Path] = ()
    unwanted: Sequence[Sequence[Mapping[str, Any]]] = ()
    config: TrainConfig = CONFIG
    data: Sequence[Mapping[str, Any]] = field(default_factory=rows)

    def go(self, *, resume: bool = True) -> Path:
        result = train(
            self.base,
            self.data,
            self.out,
            vectors=self.vectors,
            unwanted=self.unwanted,
            config=self.config,
            resume=resume,
        )
        return result.model


def kill_at(out: Path, number: int) -> None:
    """Kill this process just before it changes a file in `out` for the `number`th time."""
    changes = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _changes(event, arguments, out) and next(changes) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def count_changes(out: Path) -> None:
    """Write down how often this process changed a file in `out`, beside it: `OUT.count`."""
    changes = itertools.count(1)
    last = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _changes(event, arguments, out):
            last[0] = next(changes)

    sys.addaudithook(hook)
    multiprocessing.util.Finalize(None, lambda: out.with_suffix(".count").write_text(str(last[0])), exitpriority=1)


def _changes(event: str, arguments: tuple[Any, ...], out: Path) -> bool:
    """Tell whether an audit event is about to change a file in `out`."""
    if event not in _FILE_EVENTS or f"{out}/" not in str(arguments[0]):
        return False
    return event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))


def attempt(run: Run, prepare: Callable[[], Any]) -> None:
    """Run, after what has to happen in the process first."""
    prepare()
    run.go()


def started(target: Callable[..., None], *arguments: Any) -> multiprocessing.process.BaseProcess:
    """Run a function of this module in a fork of the warm server."""
    _start_server()
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def _start_server() -> None:
    """Start the process that forks, with one thread and with this module imported."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["runs"])
    here = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    before = dict(os.environ)
    os.environ.update(here)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def two_processes(script: str | Path, *words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script under torchrun in two processes, with these helpers at hand; return when both have ended."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    found = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*launcher, script, *words],
        cwd=cwd,
        env={**os.environ, **quiet, "PYTHONPATH": found},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def limit_files(run: Run, size_bytes: int, told: Path) -> None:
    """Run where no file may grow beyond a size, as on a full disk, and write down what is raised."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, size_bytes))
    try:
        run.go()
    except Exception as error:
        told.write_text(f"{type(error).__name__}: {error}")


def main(words: Sequence[str], told: Path) -> None:
    """Run the command line, with what it says on stderr in a file."""
    sys.argv = ["secvec", *words]
    descriptor = os.open(told, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(descriptor, 2)
    # Whoever starts the tests in the background of a shell has them ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()
