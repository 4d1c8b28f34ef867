"""Arm a model in memory: the only file with hooks.

An armed site computes W x + scale * B (A x). The factors are not parameters of the model, so they cannot be trained,
saved, pickled or merged by accident.

A graph of torch.compile is the model as it was when traced, with the vector or without. So arming and disarming drop
all compiled graphs of the process; whatever is compiled is traced again at its next call.
"""

from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secvec import artifact
from secvec.errors import ArmError
from secvec.sites import canonical, site_modules
from secvec.vector import Factors, SecurityVector


class _Arming:
    """Add `scale * (x A^T) B^T` to a linear layer's output; count how often that happened."""

    def __init__(self, site: str, terms: Sequence[tuple[Factors, float]]) -> None:
        self.site = site
        self.fired = 0  # calls since arming; 1 for any number of calls in a compiled graph
        self.terms = terms
        self._cast: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor, float]]] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        _refuse_capture(self.site)
        # To count its calls, a compiled graph would have to be traced anew at each.
        self.fired = 1 if torch.compiler.is_compiling() else self.fired + 1
        x: Tensor = args[0]
        for a, b, scale in self._terms_for(x.device, x.dtype):
            # Scaled where it is narrow: a pass over the wide output would cost as much as the addition itself.
            output = output + nn.functional.linear(nn.functional.linear(x, a) * scale, b).to(output)
        return output

    def _terms_for(self, device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, float]]:
        # While fitting, the factors change every step, so a kept copy would go stale; a graph keeps its own.
        if torch.compiler.is_compiling() or any(factors.a.requires_grad for factors, _ in self.terms):
            return [(f.a.to(device, dtype), f.b.to(device, dtype), scale) for f, scale in self.terms]
        key = (device, dtype)
        if key not in self._cast:
            # Tensors born in inference mode could not be used in training afterwards.
            with torch.inference_mode(False):
                self._cast[key] = [(f.a.to(*key), f.b.to(*key), scale) for f, scale in self.terms]
        return self._cast[key]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ArmError(f"refusing to copy or pickle an armed model (site {self.site}): disarm it first")


class _Runs:
    """Count how often the model itself was run while armed."""

    def __init__(self) -> None:
        self.fired = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        _refuse_capture(type(module).__name__)
        self.fired = 1 if torch.compiler.is_compiling() else self.fired + 1

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ArmError("refusing to copy or pickle an armed model: disarm it first")


@dataclass(frozen=True)
class Canary:
    """What a canary batch showed: each site and how often its vector acted in one forward pass."""

    fired: Mapping[str, int]
    """1 for any number of times in a compiled model"""
    largest_change: float
    """max |logits armed - logits unarmed|"""


def is_armed(model: nn.Module) -> bool:
    """Tell whether any vector is in effect in `model`, by looking at its modules."""
    return any(True for _ in _armings(model))


def arm(model: nn.Module, *vectors: SecurityVector) -> None:
    """Put vectors into effect in `model`, frozen, until `disarm`; prefer `with armed(...)`.

    Raises SiteError when a site is missing or misshapen, ArmError when the model is armed or compiled already, or when
    two of the vectors are the same. Either every site is armed or none is.
    """
    _refuse_twice(vectors)
    _refuse_armed(model)
    _refuse_compiled(model)
    _attach(site_modules(model, vectors), _terms(vectors))
    torch.compiler.reset()


def check_armed(model: nn.Module, *vectors: SecurityVector) -> None:
    """Raise ArmError unless `vectors`, and no others, are in effect in `model`, at every site and with every value."""
    found = {arming.site: arming.terms for arming in _armings(model)}
    if not found:
        raise ArmError(f"expected an armed model, found no armed site in {type(model).__name__}")
    expected = _terms(vectors)
    wrong = sorted(s for s in found | expected if not _same_terms(found.get(s, ()), expected.get(s, ())))
    if wrong:
        raise ArmError(
            f"expected other vectors in effect, found another change at {len(wrong)} sites, first {wrong[0]}: "
            "give the vectors that the model is armed with, in the same order"
        )


def fired(model: nn.Module) -> dict[str, int]:
    """Return how often each armed site ran its vector since it was armed; 1 for any number in a compiled model."""
    return {arming.site: arming.fired for arming in _armings(model)}


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
    torch.compiler.reset()


@contextmanager
def armed(model: nn.Module, *vectors: SecurityVector) -> Generator[None]:
    """Keep vectors in effect in `model` inside the `with` block: `with armed(model, vector): trainer.train()`.

    On leaving, raises ArmError when a site lost its vector, or when the model was run and a site never ran it: (part
    of) the run was then not protected.
    """
    arm(model, *vectors)
    sites = {site for vector in vectors for site in vector.factors}
    runs = _Runs()
    handle = model.register_forward_pre_hook(runs)
    try:
        yield
        _check_whole(model, sites, runs)
    finally:
        handle.remove()
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
    with _evaluating(model), torch.no_grad(), _counting([*armings.values(), *_runs(model)]):
        with_vector: Tensor = model(**batch).logits
        fired = {site: arming.fired for site, arming in armings.items()}
        with _suspended(model):
            without_vector: Tensor = model(**batch).logits
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


def _terms(vectors: Sequence[SecurityVector]) -> dict[str, list[tuple[Factors, float]]]:
    terms: dict[str, list[tuple[Factors, float]]] = {}
    for vector in vectors:
        for site, factors in vector.factors.items():
            terms.setdefault(site, []).append((Factors(factors.a.detach(), factors.b.detach()), vector.scale))
    return terms


def _same_terms(found: Sequence[tuple[Factors, float]], expected: Sequence[tuple[Factors, float]]) -> bool:
    return len(found) == len(expected) and all(
        scale == other_scale and torch.equal(f.a, other.a) and torch.equal(f.b, other.b)
        for (f, scale), (other, other_scale) in zip(found, expected, strict=True)
    )


def _attach(
    modules: Mapping[str, nn.Module], terms: Mapping[str, Sequence[tuple[Factors, float]]]
) -> list[RemovableHandle]:
    handles: list[RemovableHandle] = []
    try:
        for site, module in modules.items():
            # prepend: the vector's term belongs to the layer itself, before hooks that watch the layer's output.
            handles.append(module.register_forward_hook(_Arming(site, terms[site]), prepend=True))
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    return handles


def _armings(model: nn.Module) -> Iterator[_Arming]:
    for module in model.modules():
        for hook in module._forward_hooks.values():  # pyright: ignore[reportPrivateUsage]
            if isinstance(hook, _Arming):
                yield hook


def _runs(model: nn.Module) -> list[_Runs]:
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]  # pyright: ignore
    return [hook for hook in hooks if isinstance(hook, _Runs)]


@contextmanager
def _suspended(model: nn.Module) -> Generator[None]:
    hooks = [module._forward_hooks for module in model.modules()]  # pyright: ignore[reportPrivateUsage]
    taken = [(h, dict(h)) for h in hooks if any(isinstance(hook, _Arming) for hook in h.values())]
    disarm(model)
    try:
        yield
    finally:
        for mine, kept in taken:
            mine.clear()
            mine.update(kept)
        torch.compiler.reset()


@contextmanager
def _counting(armings: Collection[_Arming | _Runs]) -> Generator[None]:
    """Count from zero inside, and forget it after: a canary says nothing about whether training runs the vector."""
    before = [arming.fired for arming in armings]
    for arming in armings:
        arming.fired = 0
    try:
        yield
    finally:
        for arming, fired in zip(armings, before, strict=True):
            arming.fired = fired


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Put every module into evaluation mode, and each back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_whole(model: nn.Module, sites: set[str], runs: _Runs) -> None:
    left = {arming.site: arming.fired for arming in _armings(model)}
    lost = sorted(sites - set(left))
    if lost:
        raise ArmError(f"{len(lost)} of {len(sites)} sites lost their vector while armed, first {lost[0]}")
    silent = [site for site, fired in left.items() if fired == 0]
    if silent and (runs.fired or len(silent) < len(left)):
        raise ArmError(
            f"{len(silent)} of {len(left)} sites never ran their vector while armed, first {silent[0]}: something "
            "calls the weights without the modules (a fused kernel?); what ran was not protected"
        )


def _refuse_twice(vectors: Sequence[SecurityVector]) -> None:
    if not vectors:
        raise ArmError("expected at least one security vector to arm, found none")
    digests = [artifact.digest(vector) for vector in vectors] if len(vectors) > 1 else []
    if len(set(digests)) < len(digests):
        raise ArmError(f"expected different vectors, found one of them twice: {', '.join(digests)}")


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
                f"refusing to arm a compiled model ({where}): its graph was traced without the vector and may go on "
                "without it; arm first, then compile, or train a folded model"
            )


def _refuse_capture(site: str) -> None:
    # In some versions is_exporting() is also true inside torch.compile, which may have the vector: it is dropped again.
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    if exporting or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise ArmError(f"refusing to export an armed model (site {site}): the vector would be in it; disarm it first")
