"""Fine-tuning with constrained first tokens (arXiv 2406.05946)."""

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.methods.loop import Loss, epochs, fine_tune, finish, on_device, trainee
from benchmarks.methods.method import Dial
from benchmarks.methods.runs import encoded
from benchmarks.methods.setting import Setting
from secvec.losses import token_nats
from secvec.tokens import Batch

LENGTH = Dial("constrained tokens", 5, (5, 20))
_FIRST, _EARLY, _LATE = 0.5, 2.0, 0.1
_LEAST_WEIGHT = 1e-3


def constrained_sft(setting: Setting) -> Path:
    """Weight each answer token by 2 * (1 - sigmoid(beta_t * (log p - log p_aligned))): early ones may move little.

    Qi et al., "Safety Alignment Should Be Made More Than Just a Few Tokens Deep", section 4; the authors' code
    (Unispac/shallow-vs-deep-alignment) was read. Reproduced: the weights with their floor, beta 0.5 for the first
    token, 2 for those up to the fifth, 0.1 after, the mean over tokens. Differs: no warm-up. Five tokens are some
    twenty letters there and five here, where a token is a byte: so the number is the dial.
    """
    model = trainee(setting)
    reference = on_device(setting.model).requires_grad_(False)
    loss = _constrained(model, reference, int(LENGTH.at(setting)))
    fine_tune(model, epochs(encoded(setting, setting.training), setting.config), setting.config, loss)
    return finish(model, setting)


def _constrained(model: nn.Module, reference: nn.Module, length: int) -> Loss:
    def loss(batch: Batch) -> Tensor:
        inputs = {**batch.inputs(), "use_cache": False}
        nats = token_nats(model(**inputs).logits, batch.ids)  # (B, T - 1)
        with torch.no_grad():
            gained = token_nats(reference(**inputs).logits, batch.ids) - nats  # log p - log p_aligned
            weights = 2 * (1 - torch.sigmoid(betas(batch.mask[:, 1:], length) * gained))
        return (weights.clamp_min(_LEAST_WEIGHT) * nats)[batch.mask[:, 1:]].mean()

    return loss


def betas(mask: Tensor, length: int) -> Tensor:
    """Return each answer token's beta by its place in the row's answers; mask: (B, T)."""
    place = mask.cumsum(1)  # 1 for the first answer token
    late = torch.full(place.shape, _LATE, device=mask.device)
    return late.masked_fill(place <= length, _EARLY).masked_fill(place <= 1, _FIRST)
