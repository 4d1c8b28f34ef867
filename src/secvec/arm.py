"""Arm a model in memory: the only file with hooks.

An armed site computes W x + scale * B (A x). The factors are not parameters of the model, so they cannot be trained,
saved, pickled or merged by accident.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secvec.errors import ArmError
from secvec.sites import canonical, site_modules
from secvec.vector import Factors, SecurityVector


class _Arming:
    """Add `scale * (x A^T) B^T` to a linear layer's output; count how often that happened."""

    def __init__(self, site: str, terms: Sequence[tuple[Factors, float]]) -> None:
        self.site = site
        self.fired = 0
        self._terms = terms
        self._cast: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor, float]]] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        self.fired += 1
        x: Tensor = args[0]
        for a, b, scale in self._terms_for(x.device, x.dtype):
            output = output + (nn.functional.linear(nn.functional.linear(x, a), b) * scale).to(output.dtype)
        return output

    def _terms_for(self, device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, float]]:
        if any(factors.a.requires_grad for factors, _ in self._terms):
            # Fitting: the factors change every step, so a cast copy would go stale.
            return [(f.a.to(device, dtype), f.b.to(device, dtype), scale) for f, scale in self._terms]
        key = (device, dtype)
        if key not in self._cast:
            self._cast[key] = [(f.a.to(*key), f.b.to(*key), scale) for f, scale in self._terms]
        return self._cast[key]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ArmError(f"refusing to copy or pickle an armed model (site {self.site}): disarm it first")


@dataclass(frozen=True)
class Canary:
    """What a canary batch showed: each site and how often its vector acted in one forward pass."""

    fired: Mapping[str, int]
    largest_change: float
    """max |logits armed - logits unarmed|"""


def is_armed(model: nn.Module) -> bool:
    """Tell whether any vector is in effect in `model`, by looking at its modules."""
    return any(True for _ in _armings(model))


def arm(model: nn.Module, *vectors: SecurityVector) -> None:
    """Put vectors into effect in `model`, frozen, until `disarm`; prefer `with armed(...)`.

    Raises SiteError when a site is missing or misshapen, ArmError when the model is armed or compiled already. Either
    every site is armed or none is.
    """
    terms: dict[str, list[tuple[Factors, float]]] = {}
    for vector in vectors:
        for site, factors in vector.factors.items():
            terms.setdefault(site, []).append((factors, vector.scale))
    if not terms:
        raise ArmError("expected at least one security vector to arm, found none")
    _refuse_armed(model)
    _refuse_compiled(model)
    modules = site_modules(model, vectors)
    _attach(modules, terms)


def disarm(model: nn.Module) -> None:
    """Take every vector out of `model`, found by scanning its modules.

    Raises ArmError when the model is not armed: someone believed it was protected and it was not.
    """
    if not is_armed(model):
        raise ArmError(f"expected an armed model, found no armed site in {type(model).__name__}")
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):  # pyright: ignore[reportPrivateUsage]
            if isinstance(hook, _Arming):
                del module._forward_hooks[key]  # pyright: ignore[reportPrivateUsage]


@contextmanager
def armed(model: nn.Module, *vectors: SecurityVector) -> Generator[None]:
    """Keep vectors in effect in `model` inside the `with` block: `with armed(model, vector): trainer.train()`.

    On leaving, raises ArmError when a site lost its vector or never acted while others did: part of the run was then
    not protected.
    """
    arm(model, *vectors)
    sites = {site for vector in vectors for site in vector.factors}
    try:
        yield
        _check_whole(model, sites)
    finally:
        if is_armed(model):
            disarm(model)


@contextmanager
def live(modules: Mapping[str, nn.Module], factors: Mapping[str, Factors], scale: float) -> Generator[None]:
    """Arm `modules` with factors that may still be trained: the inner step of fitting."""
    handles = _attach(modules, {site: [(factors[site], scale)] for site in modules})
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def canary(model: nn.Module, batch: Mapping[str, Tensor]) -> Canary:
    """Run `batch` once armed and once with the hooks off, and show that every site's vector acted.

    `batch` holds a model's inputs (`input_ids` (B, T), `attention_mask` (B, T)). Raises ArmError when the model is not
    armed, when a site did not fire (a fused kernel bypassed the module), or when the logits did not change.
    """
    armings = {arming.site: arming for arming in _armings(model)}
    if not armings:
        raise ArmError(f"canary: expected an armed model, found no armed site in {type(model).__name__}")
    before = {site: arming.fired for site, arming in armings.items()}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            with_vector: Tensor = model(**batch).logits
            fired = {site: arming.fired - before[site] for site, arming in armings.items()}
            with _suspended(model):
                without_vector: Tensor = model(**batch).logits
    finally:
        model.train(was_training)
    silent = [site for site, count in fired.items() if count == 0]
    if silent:
        raise ArmError(
            f"canary: {len(silent)} of {len(fired)} sites did not run their vector, first {silent[0]}: something calls "
            "the weights without the module (a fused kernel?); switch fused LoRA kernels off, or train a folded model"
        )
    change = float((with_vector - without_vector).abs().max())
    if not change > 0.0:
        raise ArmError(f"canary: the vector acted at {len(fired)} sites but the logits did not change ({change!r})")
    return Canary(fired=fired, largest_change=change)


def _attach(
    modules: Mapping[str, nn.Module], terms: Mapping[str, Sequence[tuple[Factors, float]]]
) -> list[RemovableHandle]:
    # prepend: the vector's term belongs to the linear layer itself, so it comes before hooks that watch its output.
    return [module.register_forward_hook(_Arming(site, terms[site]), prepend=True) for site, module in modules.items()]


def _armings(model: nn.Module) -> Iterator[_Arming]:
    for module in model.modules():
        for hook in module._forward_hooks.values():  # pyright: ignore[reportPrivateUsage]
            if isinstance(hook, _Arming):
                yield hook


@contextmanager
def _suspended(model: nn.Module) -> Generator[None]:
    taken: list[tuple[nn.Module, dict[int, Any]]] = []
    for module in model.modules():
        hooks = module._forward_hooks  # pyright: ignore[reportPrivateUsage]
        if any(isinstance(hook, _Arming) for hook in hooks.values()):
            taken.append((module, dict(hooks)))
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Arming):
                    del hooks[key]
    try:
        yield
    finally:
        for module, kept in taken:
            hooks = module._forward_hooks  # pyright: ignore[reportPrivateUsage]
            hooks.clear()
            hooks.update(kept)


def _check_whole(model: nn.Module, sites: set[str]) -> None:
    left = {arming.site: arming.fired for arming in _armings(model)}
    lost = sorted(sites - set(left))
    if lost:
        raise ArmError(f"{len(lost)} of {len(sites)} sites lost their vector while armed, first {lost[0]}")
    silent = [site for site, fired in left.items() if fired == 0]
    if silent and len(silent) < len(left):
        raise ArmError(f"{len(silent)} of {len(left)} sites never ran their vector while armed, first {silent[0]}")


def _refuse_armed(model: nn.Module) -> None:
    sites = [arming.site for arming in _armings(model)]
    if sites:
        raise ArmError(
            f"expected an unarmed model, found {len(sites)} armed sites (first {sites[0]}): "
            "pass all vectors to one armed(model, v1, v2) instead"
        )


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:  # pyright: ignore
            where = canonical(name) or type(module).__name__
            raise ArmError(
                f"refusing to arm a compiled model ({where}): its graph was traced without the vector and would go on "
                "without it; arm first, then compile, or train a folded model"
            )
