import math
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import llama, random_ids

from secvec.losses import kl_nats, mean_nats, representation_distance, token_nats

ROWS, TOKENS, WORDS, HIDDEN = 3, 7, 50, 16


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def array(tensor: torch.Tensor) -> Any:
    return tensor.detach().double().numpy()


def log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_token_nats_are_float64_mathematics(dtype: torch.dtype) -> None:
    logits, ids = draw(ROWS, TOKENS, WORDS, seed=0, dtype=dtype), random_ids(rows=ROWS, length=TOKENS) % WORDS
    log_p = log_softmax(array(logits))
    expected = [[-log_p[row, t - 1, ids[row, t]] for t in range(1, TOKENS)] for row in range(ROWS)]
    found = token_nats(logits, ids)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(array(found), expected, rtol=1e-5)
    mask = torch.tensor([[True, False, True, True, False, False, True]]).repeat(ROWS, 1)
    np.testing.assert_allclose(
        float(mean_nats(logits, ids, mask)), np.array(expected)[array(mask[:, 1:]) > 0].mean(), rtol=1e-5
    )


def test_the_first_token_never_counts() -> None:
    logits, ids = draw(1, TOKENS, WORDS, seed=1), random_ids(rows=1, length=TOKENS) % WORDS
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    expected = mean_nats(logits, ids, mask)
    mask[0, 0] = False
    assert torch.equal(mean_nats(logits, ids, mask), expected)


def test_a_row_of_one_token_has_no_losses() -> None:
    assert token_nats(draw(2, 1, WORDS, seed=1), torch.zeros(2, 1, dtype=torch.long)).shape == (2, 0)


def test_mean_nats_is_the_loss_of_transformers() -> None:
    model, ids = llama(), random_ids(rows=ROWS)
    mask = torch.rand(ids.shape, generator=torch.Generator().manual_seed(4)) < 0.6
    labels = ids.masked_fill(~mask, -100)
    ours = mean_nats(model(input_ids=ids).logits, ids, mask)
    theirs = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(ours, model.lm_head.weight)
    (expected,) = torch.autograd.grad(theirs, model.lm_head.weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_nats_is_float64_mathematics(dtype: torch.dtype) -> None:
    base, armed = (draw(TOKENS, WORDS, seed=seed, dtype=dtype) for seed in (2, 3))
    log_base, log_armed = log_softmax(array(base)), log_softmax(array(armed))
    expected = (np.exp(log_base) * (log_base - log_armed)).sum(-1).mean()
    np.testing.assert_allclose(float(kl_nats(base, armed)), expected, rtol=1e-5)
    assert abs(float(kl_nats(base, armed)) - float(kl_nats(armed, base))) > 0.1


def test_kl_nats_of_equal_and_of_no_tokens_is_zero() -> None:
    base = draw(TOKENS, WORDS, seed=2)
    assert float(kl_nats(base, base + 5)) == pytest.approx(0, abs=1e-6)
    assert float(kl_nats(base[:0], base[:0])) == 0.0


def test_kl_nats_in_words_that_one_side_excludes() -> None:
    base = torch.tensor([[0.0, 0.0, -math.inf]])
    assert float(kl_nats(base, torch.zeros(1, 3))) == pytest.approx(math.log(1.5))
    armed = torch.tensor([[1.0, 0.0, -math.inf]], requires_grad=True)
    kl = kl_nats(base, armed)
    assert float(kl.detach()) == pytest.approx(math.log((1 + math.e) / 2) - 0.5)
    kl.backward()
    assert armed.grad is not None and bool(torch.isfinite(armed.grad).all())
    assert float(kl_nats(torch.zeros(1, 3), base)) == math.inf


def test_representation_distance_is_float64_mathematics() -> None:
    base, armed = ([draw(ROWS, TOKENS, HIDDEN, seed=seed + i) for i in range(3)] for seed in (10, 20))
    base[0][:, 0] *= 1000  # an attention sink
    mask = torch.rand(ROWS, TOKENS, generator=torch.Generator().manual_seed(5)) < 0.5
    chosen = mask.numpy()
    per_layer = [
        (((array(a) - array(b))[chosen] ** 2).sum(-1) / (array(b)[chosen] ** 2).sum(-1)).mean()
        for b, a in zip(base, armed, strict=True)
    ]
    np.testing.assert_allclose(float(representation_distance(base, armed, mask)), np.mean(per_layer), rtol=1e-5)


def test_representation_distance_in_known_cases() -> None:
    base, mask = [draw(ROWS, TOKENS, HIDDEN, seed=6)], torch.ones(ROWS, TOKENS, dtype=torch.bool)
    for factor, expected in ((1.0, 0.0), (1.5, 0.25), (0.0, 1.0), (-1.0, 4.0)):
        assert float(representation_distance(base, [base[0] * factor], mask)) == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(float(representation_distance([base[0] * 0], base, mask)))
    with pytest.raises(ValueError, match="zip"):
        representation_distance(base, [], mask)
