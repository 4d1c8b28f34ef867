"""Canonical names of a model's linear sites: where a security vector may sit."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secvec.errors import SiteError
from secvec.vector import SecurityVector

# Wrappers put these in front of, or around, a module's own name: DDP, FSDP1, torch.compile, activation
# checkpointing, PEFT's model and PEFT's tuner layer.
_PREFIXES = ("module.", "base_model.model.")
_INFIXES = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
_TASK_ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.")
# A router decides which expert sees a token: a change there is not low-rank in the model's output.
_ROUTERS = ("gate", "router", "shared_expert_gate")
_LAYER = re.compile(r"\.\d+\.")


def canonical(name: str) -> str:
    """Return a module's name without the marks of the wrappers around it."""
    for infix in _INFIXES:
        name = name.replace(infix, "")
    stripped = True
    while stripped:
        stripped = False
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name.removesuffix(".base_layer")


def linear_sites(model: nn.Module) -> dict[str, nn.Module]:
    """List the linear layers of the attention and MLP blocks by canonical name, in the model's order.

    Never listed: embeddings, the output head, routers, layers outside the numbered blocks, experts fused into
    one three-dimensional tensor, and anything that shares its weight with another module.
    """
    shared = _shared_weights(model)
    sites: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or _TASK_ADAPTER.search(name):
            continue
        site = canonical(name)
        last = site.rsplit(".", 1)[-1]
        if _LAYER.search(site) and last not in _ROUTERS and id(module.weight) not in shared:
            sites[site] = module
    return sites


def _shared_weights(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        weight: Any = module._parameters.get("weight")  # pyright: ignore[reportPrivateUsage]
        if weight is not None:
            (shared if id(weight) in seen else seen).add(id(weight))
    return shared


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """Return (d_out, d_in) of a site, whichever way its class stores the weight and however it is quantised."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    raise SiteError(f"expected a linear layer as site, found {type(module).__name__}")


def site_modules(model: nn.Module, vectors: Sequence[SecurityVector]) -> Mapping[str, nn.Module]:
    """Return the modules the vectors act on, by site.

    Raises SiteError when a site is missing from the model or has another shape there: a vector that acts on part
    of its sites protects against nothing in particular.
    """
    present = linear_sites(model)
    wanted = {site: factors.shape for vector in vectors for site, factors in vector.factors.items()}
    missing = [site for site in wanted if site not in present]
    if missing:
        raise SiteError(
            f"the vector acts on {len(wanted)} sites, of which {type(model).__name__} lacks {len(missing)}: "
            f"{', '.join(missing[:5])}; fit the vector on this model"
        )
    for vector in vectors:
        for site, factors in vector.factors.items():
            if factors.shape != (found := weight_shape(present[site])):
                raise SiteError(f"site {site}: the vector expects a weight of {factors.shape}, the model's is {found}")
    return {site: present[site] for site in wanted}


def layer_of(site: str) -> int:
    """Return the number of the block a site lies in (`model.layers.3.mlp.up_proj` -> 3)."""
    match = _LAYER.search(site)
    if match is None:
        raise SiteError(f"expected a site inside a numbered block, found {site!r}")
    return int(match.group().strip("."))


def is_quantised(weight: Tensor) -> bool:
    """Tell whether a weight is stored in packed integers (bitsandbytes and the like)."""
    return not weight.dtype.is_floating_point
