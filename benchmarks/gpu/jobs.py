"""What is measured on a model, each job on the same one, in an order in which none spoils the next."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from benchmarks.gpu.measure import Measured, flops_per_token, timed
from benchmarks.gpu.shapes import Load
from benchmarks.speed.checkpoint import RANK
from secvec.arm import armed
from secvec.exact import ExactProduct, exact_product
from secvec.factors import fit_factors
from secvec.fit_config import FitConfig
from secvec.sites import linear_sites
from secvec.tokens import Encoded
from secvec.vector import SecurityVector

Job = Callable[["Subject"], Iterator[Measured]]


@dataclass(frozen=True)
class Subject:
    """What is measured: a model, a vector for it, the load, and how often."""

    name: str
    model: Any
    vector: SecurityVector
    load: Load
    steps: int

    def ids(self, rows: int, tokens: int, seed: int = 0) -> Tensor:
        """Draw random token ids: (rows, tokens)."""
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.model.config.vocab_size
        return torch.randint(vocabulary, (rows, tokens), generator=generator).to(self.model.device)

    def hooked(self) -> AbstractContextManager[None]:
        return armed(self.model, self.vector)


def generation(subject: Subject) -> Iterator[Measured]:
    """Greedy answers of a fixed length, with hooks and without."""
    load = subject.load
    ids = subject.ids(load.prompts, load.prompt_tokens)
    row = Measured(subject.name, "generate", "plain", tokens=load.prompts * load.new_tokens)

    def work() -> None:
        limits = {"max_new_tokens": load.new_tokens, "min_new_tokens": load.new_tokens, "do_sample": False}
        subject.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **limits)

    with torch.no_grad():
        yield from _ways(row, work, {"plain": nullcontext, "hooked": subject.hooked}, steps=2)


def fit(subject: Subject) -> Iterator[Measured]:
    """A fit with all that belongs to it: anchors, held-out losses, digests of the backbone."""
    load = subject.load
    unwanted, anchors = _rows(subject, load.row_tokens // 2, seed=1), _rows(subject, 1, seed=2)
    config = FitConfig(rank=RANK, epochs=load.epochs, patience=load.epochs, batch_size=min(load.rows, 16))
    tokens = load.epochs * 2 * load.rows * load.row_tokens  # unwanted and anchors
    row = Measured(subject.name, f"fit, {load.rows} rows x {load.epochs} epochs", "", tokens=tokens)
    work = lambda: fit_factors(subject.model, unwanted, anchors, config)  # noqa: E731
    yield timed(row, work, warm_up=0, repeats=1)


def fold(subject: Subject) -> Iterator[Measured]:
    """W + D at every site by the exact product of `secvec fold`, weights on the device, or from host memory and back.

    The bits are compared with those of a processor at one site. Reading and writing files is not part of it.
    """
    weights = {site: module.weight.data for site, module in linear_sites(subject.model).items()}
    site, weight = next(iter(weights.items()))
    product = _product(subject.vector, site)
    equal = torch.equal(_folded(weight, product).cpu(), _folded(weight.cpu(), product))
    note = f"bits {'as' if equal else 'NOT as'} on a processor"
    host = {site: weight.cpu() for site, weight in weights.items()}
    device = weight.device

    def in_place() -> None:
        for site, weight in weights.items():
            weight.copy_(_folded(weight, _product(subject.vector, site)))

    def there_and_back() -> None:
        for site, weight in host.items():
            _folded(weight.to(device), _product(subject.vector, site)).cpu()

    row = Measured(subject.name, "fold", "there and back", note=note)
    yield timed(row, there_and_back, warm_up=0, repeats=1)
    yield timed(replace(row, way="on the device"), in_place, warm_up=0, repeats=1)


def lora(subject: Subject) -> Iterator[Measured]:
    """Steps of a LoRA on every site of the frozen backbone."""
    sites = sorted(linear_sites(subject.model))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=sites, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = get_peft_model(subject.model, config)
    try:
        yield from _training(subject, adapted, "LoRA", whole=False)
    finally:
        adapted.unload()


def full(subject: Subject) -> Iterator[Measured]:
    """Steps on all weights, in bf16 with AdamW's state in bf16: blocks are computed anew in the backward pass."""
    subject.model.requires_grad_(True)
    with _recomputing(subject.model):
        yield from _training(subject, subject.model, "full fine-tuning", whole=True)


JOBS: Mapping[str, Job] = {job.__name__: job for job in (generation, fit, lora, full, fold)}


def _training(subject: Subject, model: Any, what: str, *, whole: bool) -> Iterator[Measured]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=0.0, fused=subject.model.device.type == "cuda")
    model.train()
    try:
        for context in subject.load.contexts:
            ids = subject.ids(1, context)

            def step(ids: Tensor = ids) -> None:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            row = Measured(subject.name, what, "plain", context, tokens=context)
            flops = context * flops_per_token(subject.model, context, whole=whole)
            ways = {"plain": nullcontext, "hooked": subject.hooked, "folded": lambda: _with_fold(subject)}
            yield from _ways(row, step, ways | {"plain, again": nullcontext}, steps=subject.steps, flops=flops)
    finally:
        model.eval()


def _ways(
    row: Measured,
    work: Callable[[], None],
    ways: Mapping[str, Callable[[], AbstractContextManager[None]]],
    *,
    steps: int,
    flops: float = 0.0,
) -> Iterator[Measured]:
    """Measure the same work in several ways, the plain one first."""
    plain_s: float | None = None
    for way, context in ways.items():
        with context():
            found = timed(replace(row, way=way), work, warm_up=1, repeats=steps, flops=flops)
        plain_s = plain_s or found.seconds
        yield replace(found, against_plain=found.seconds / plain_s if found.seconds and plain_s else None)


@contextmanager
def _with_fold(subject: Subject) -> Iterator[None]:
    """Put the vector into the weights, and take it out again, to a rounding step."""
    _add(subject, 1.0)
    try:
        yield
    finally:
        _add(subject, -1.0)


@torch.no_grad()
def _add(subject: Subject, sign: float) -> None:
    for site, module in linear_sites(subject.model).items():
        factors, weight = subject.vector.factors[site], module.weight
        change = factors.b.to(weight) @ factors.a.to(weight)
        weight.add_(change, alpha=sign * subject.vector.scale)


@contextmanager
def _recomputing(model: Any) -> Iterator[None]:
    with warnings.catch_warnings():
        # transformers is about to rename them.
        warnings.filterwarnings("ignore", "`gradient_checkpointing_", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()
            model.zero_grad()


def _product(vector: SecurityVector, site: str) -> ExactProduct:
    factors = vector.factors[site]
    b, a = (tensor.double().numpy() for tensor in (factors.b * vector.scale, factors.a))
    return exact_product(b, a, parts=1)


def _folded(weight: Tensor, product: ExactProduct) -> Tensor:
    ((left, right),) = product.terms
    return (weight.double() + left.to(weight.device) @ right.to(weight.device)).to(weight.dtype)


def _rows(subject: Subject, learned_from: int, seed: int) -> list[Encoded]:
    """Draw rows whose tokens from `learned_from` on are marked."""
    load = subject.load
    mask = tuple(place >= learned_from for place in range(load.row_tokens))
    return [Encoded(tuple(ids), mask) for ids in subject.ids(load.rows, load.row_tokens, seed).tolist()]
