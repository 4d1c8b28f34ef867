"""Several processes at one fit or training: who works where, what all of them must agree on.

accelerate connects them, as torchrun or `accelerate launch` started them. The factors are whole in every process;
the model is too, or with ACCELERATE_USE_FSDP=true, as `accelerate launch --use_fsdp` sets it, sharded over them.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from blake3 import blake3
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from secvec.errors import InputError, SecvecError, UsageError
from secvec.launch import is_main, process_count
from secvec.sites import block_of, linear_sites

SHARD = "ACCELERATE_USE_FSDP"
_PATIENCE = timedelta(days=30)
"""Of processes that wait for the main one. Where it ends, so does the connection, and their waiting."""
_T = TypeVar("_T")


def connected() -> Accelerator:
    """Connect the processes that a launcher started. Raises UsageError where they would each work alone.

    Without a GPU accelerate lets them do so, in silence, unless it is told to use the CPU.
    """
    on_cpu = process_count() > 1 and not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=True) if on_cpu else Accelerator()
    if accelerator.num_processes < process_count():
        raise UsageError(
            f"expected {process_count()} processes that work together (WORLD_SIZE), found each alone on "
            f"{accelerator.device}: set ACCELERATE_USE_CPU=true, or start without a launcher"
        )
    return accelerator


def placed(model: PreTrainedModel) -> PreTrainedModel:
    """Put a model on this process's device, or shard it over all processes by FSDP2, block by block.

    Raises UsageError on a model that cannot be sharded.
    """
    accelerator = connected()
    if accelerator.num_processes == 1 or os.environ.get(SHARD, "false").lower() != "true":
        return model.to(accelerator.device)  # pyright: ignore[reportArgumentType]
    if whole := [name for name, parameter in model.named_parameters() if not parameter.is_floating_point()]:
        raise UsageError(f"{SHARD}: expected weights that can be sharded, found a quantised one, {whole[0]}; unset it")
    for block in _blocks(model):
        fully_shard(block)
    # By default the outermost part would stay gathered, and its parameters whole, after the first batch.
    fully_shard(model, reshard_after_forward=True)
    # What cannot be sharded would lie whole in every process, in silence.
    if whole := [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]:
        raise UsageError(
            f"{SHARD}: expected every weight sharded, found {len(whole)} whole, first {whole[0]}; unset it"
        )
    return model


def _blocks(model: PreTrainedModel) -> Iterator[nn.Module]:
    for name in dict.fromkeys(block_of(site) for site in linear_sites(model)):
        yield model.get_submodule(name)


def alone(work: Callable[[], _T]) -> _T:
    """Once all processes are here, do some work in the main one; return what it returns, or raise its error, in all.

    The others wait for as long as it takes. The work must not need the others: no `alone` is inside another.
    """
    if process_count() == 1:
        return work()
    waiting, outcome = _waiting_room(), list[Any]([None, None])
    dist.barrier(group=waiting)
    if not is_main():
        dist.broadcast_object_list(outcome, src=0, group=waiting)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]
    try:
        outcome[0] = work()
    except Exception as error:
        dist.broadcast_object_list([None, _as_told(error)], src=0, group=waiting)
        raise
    dist.broadcast_object_list(outcome, src=0, group=waiting)
    return outcome[0]


@functools.cache
def _waiting_room() -> Any:
    """Connect the processes a second time, on the CPU: a GPU's connection gives up after minutes."""
    connected()
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def _as_told(error: Exception) -> SecvecError:
    """Return an error as the other processes raise it, with the same exit code."""
    if isinstance(error, SecvecError):
        return error
    kind = InputError if isinstance(error, OSError) else SecvecError
    return kind(f"the main process failed: {error!r}")


def of_main(value: _T) -> _T:
    """Return the main process's value in every process: a last bit that differs would part them for good."""
    return broadcast_object_list([value])[0]


def differ(value: str) -> bool:
    """Tell whether processes hold different values."""
    return len(set(gather_object([value]))) > 1


def digest_here(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Digest named tensors, of sharded ones the parts that this process holds."""
    digest = blake3()
    for name, tensor in tensors:
        part = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        digest.update(name.encode())
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sum_gradients(parameters: Sequence[Tensor], accelerator: Accelerator) -> None:
    """Add up gradients over the processes. One that is missing, as an expert's that no token chose, is zero."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat: Tensor = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")  # pyright: ignore
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
