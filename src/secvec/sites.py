"""Canonical names of a model's linear sites: where a security vector may sit."""

import re
from collections.abc import Mapping, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D

from secvec.errors import SiteError
from secvec.vector import SecurityVector

# Wrappers put these in front of, or around, a module's own name: DDP, FSDP1, torch.compile, activation
# checkpointing, PEFT's model and PEFT's tuner layer.
_PREFIXES = ("module.", "base_model.model.")
_INFIXES = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
_TASK_ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.")
# A router decides which expert sees a token: a change there is not low-rank in the model's output.
_ROUTERS = frozenset({"gate", "router", "router_gate", "shared_expert_gate"})
# The parts of a multimodal model that text does not pass through.
_TOWERS = frozenset(
    {
        *("vision_tower", "vision_model", "vision_encoder", "visual", "image_encoder", "image_embed"),
        *("audio_tower", "audio_model", "audio_encoder", "audio_embed"),
    }
)
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

    Never listed: embeddings, the output head, routers, layers outside the numbered blocks, vision and audio towers,
    experts fused into one three-dimensional tensor, and anything that shares a weight with another place.
    """
    shared = _shared_weights(model)
    sites: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or _TASK_ADAPTER.search(name):
            continue
        site = canonical(name)
        if _why_not(site) is None and id(module.weight) not in shared:
            sites[site] = module
    return sites


def without_site(model: nn.Module) -> tuple[list[str], float]:
    """Return the matrices of the blocks that are in no site, by name within a block, and their share of the elements.

    A vector does not act there: in a mixture of experts these are the fused experts, most of it, and the routers.
    """
    sites = {id(module.weight) for module in linear_sites(model).values()}
    names: dict[str, None] = {}
    total, outside = 0, 0
    for name, weight in model.named_parameters():
        site = canonical(name)
        if weight.ndim < 2 or not _LAYER.search(site) or _TOWERS & set(site.split(".")):
            continue
        total += weight.numel()
        if id(weight) not in sites:
            outside += weight.numel()
            names[site.removeprefix(f"{block_of(site)}.").removesuffix(".weight")] = None
    return list(names), outside / max(total, 1)


def check_site(site: str) -> None:
    """Raise SiteError unless a name can be that of a site: in a numbered block, not of a router or tower."""
    if (reason := _why_not(site)) is not None:
        raise SiteError(f"expected a site {reason}, found {site!r}; fit the vector without it")


def _why_not(site: str) -> str | None:
    parts = set(site.split("."))
    if not _LAYER.search(site):
        return "inside a numbered block"
    if parts & _ROUTERS:
        return "that is not a router"
    return "of the language model" if parts & _TOWERS else None


def _shared_weights(model: nn.Module) -> set[int]:
    """Return the ids of the parameters that lie in two places, be it that a whole module does."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, module in model.named_modules(remove_duplicate=False):
        for weight in module._parameters.values():  # pyright: ignore[reportPrivateUsage]
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
        fused = "expert by expert, a vector can be folded, not armed" if any(".experts." in s for s in missing) else ""
        raise SiteError(
            f"the vector acts on {len(wanted)} sites, of which {type(model).__name__} lacks {len(missing)}: "
            f"{', '.join(missing[:5])}; {fused or 'fit the vector on this model'}"
        )
    for vector in vectors:
        for site, factors in vector.factors.items():
            if factors.shape != (found := weight_shape(present[site])):
                raise SiteError(f"site {site}: the vector expects a weight of {factors.shape}, the model's is {found}")
    return {site: present[site] for site in wanted}


def layer_of(site: str) -> int:
    """Return the number of the block a site lies in (`model.layers.3.mlp.up_proj` -> 3)."""
    return int(block_of(site).rpartition(".")[2])


def block_of(site: str) -> str:
    """Return the name of the block a site lies in (`model.layers.3.mlp.up_proj` -> `model.layers.3`)."""
    match = _LAYER.search(site)
    if match is None:
        raise SiteError(f"expected a site inside a numbered block, found {site!r}")
    return site[: match.end() - 1]
