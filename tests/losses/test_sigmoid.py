"""SigLIP's loss against float64 NumPy with labels and Hugging Face. Its distributed forms: test_negatives.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmv_jax.losses.sigmoid import sigmoid_loss

B, E = 7, 5


def unit(seed):
    x = np.random.default_rng(seed).normal(size=(B, E))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def loss_f64(image, text, log_scale, bias, concept=None):
    total = 0.0
    for i in range(B):
        for j in range(B):
            if concept is not None and i != j and concept[i] == concept[j]:
                continue
            y = 1.0 if i == j else -1.0
            total += np.log1p(np.exp(-y * (np.exp(log_scale) * image[i] @ text[j] + bias)))
    return total / B


@pytest.mark.parametrize("concept", [None, [0, 1, 2, 0, 4, 5, 1]])
def test_value_and_gradient(concept):
    args = (unit(0), unit(1), np.log(10.0), -2.0)
    concept_B = None if concept is None else np.array(concept)
    f = lambda *a: sigmoid_loss(*a, concept_B=concept_B)[0]  # noqa: E731
    jax_args = [jnp.asarray(a, jnp.float32) for a in args]
    value, grads = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))(*jax_args)
    assert float(value) == pytest.approx(loss_f64(*args, concept), rel=1e-6)
    grads = jax.device_get(grads)
    for n, grad in enumerate(grads):
        for index in [(), ()] if np.ndim(args[n]) == 0 else [(0, 0), (3, 2), (6, 4)]:
            moved = []
            for h in (1e-5, -1e-5):
                shifted = [np.array(a, np.float64) for a in args]
                shifted[n][index] += h
                moved.append(loss_f64(*shifted, concept))
            assert float(grad[index]) == pytest.approx((moved[0] - moved[1]) / 2e-5, rel=1e-3, abs=1e-6)


def test_equals_the_hugging_face_loss():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.SiglipConfig(
        text_config=dict(vocab_size=50, max_position_embeddings=8, projection_size=16, **small),
        vision_config=dict(image_size=8, patch_size=4, **small),
    )
    torch.manual_seed(0)
    model = transformers.SiglipModel(config).eval()
    model.logit_scale.data.fill_(float(np.log(10.0)))
    model.logit_bias.data.fill_(-10.0)
    with torch.no_grad():
        out = model(torch.randint(3, 50, (B, 8)), torch.randn(B, 3, 8, 8), return_loss=True)
    loss, metrics = jax.jit(sigmoid_loss)(
        jnp.asarray(out.image_embeds.numpy()), jnp.asarray(out.text_embeds.numpy()), jnp.log(10.0), jnp.float32(-10.0)
    )
    assert float(loss) == pytest.approx(float(out.loss), rel=1e-5)
    assert float(metrics["positive"]) == pytest.approx(float(out.logits_per_text.diagonal().mean()), rel=1e-5)


def test_metrics_of_a_perfect_and_of_a_shuffled_batch():
    z, zero = np.eye(B, 8, dtype=np.float32), np.float32(0.0)
    loss = jax.jit(sigmoid_loss)
    perfect = loss(z, z, np.float32(np.log(20.0)), np.float32(-10.0))[1]
    assert float(perfect["r1"]) == 1.0
    assert float(perfect["positive"]) == pytest.approx(10.0) and float(perfect["negative"]) == pytest.approx(-10.0)
    shuffled = np.roll(z, 1, axis=0)
    assert float(loss(z, shuffled, zero, zero)[1]["r1"]) == 0.0
    alike = loss(z, shuffled, zero, zero, concept_B=np.zeros(B, int))[1]
    assert float(alike["r1"]) == 1.0
