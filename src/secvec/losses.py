"""Pure functions of logits and hidden states: nats per token, KL divergence, representation distance."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def token_nats(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the cross-entropy of every token given those before it, in nats: (B, T - 1).

    logits: (B, T, V) of any float dtype, ids: (B, T). Entry [b, t] belongs to token t + 1.
    """
    flat = logits[:, :-1].flatten(0, 1).float()  # (B * (T - 1), V)
    return F.cross_entropy(flat, ids[:, 1:].flatten(), reduction="none").view(ids[:, 1:].shape)


def mean_nats(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per token over the tokens where `mask` (B, T) is true."""
    chosen = mask[:, 1:]
    return token_nats(logits, ids)[chosen].mean()


def kl_nats(base: Tensor, armed: Tensor) -> Tensor:
    """Return KL(p_base || p_armed) in nats, averaged over tokens; both (tokens, V) logits.

    The direction makes the armed model cover everything that the unarmed one would say. (The paper, arXiv 2311.02105,
    states a KL constraint and publishes neither its direction nor its data.)
    """
    log_base, log_armed = F.log_softmax(base.float(), -1), F.log_softmax(armed.float(), -1)
    terms = F.kl_div(log_armed, log_base, log_target=True, reduction="none")
    # A word of probability zero (logit -inf) adds nothing; 0 * (-inf) would be nan.
    return terms.masked_fill(log_base.isneginf(), 0.0).sum() / max(len(base), 1)


def representation_distance(base: Sequence[Tensor], armed: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Return the mean over layers and tokens of ||h_armed - h_base||^2 / ||h_base||^2.

    base, armed: one (B, T, H) tensor a layer; mask: (B, T), the tokens that count. Per-token ratios keep the few
    tokens of huge norm (attention sinks) from hiding the others.
    """
    ratios = [_relative_square(b[mask].float(), a[mask].float()) for b, a in zip(base, armed, strict=True)]
    return torch.stack(ratios).mean()


def _relative_square(base: Tensor, armed: Tensor) -> Tensor:
    return ((armed - base).square().sum(-1) / base.square().sum(-1).clamp_min(1e-12)).mean()
