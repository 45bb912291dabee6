"""Every loss against torch, or a loop written from the paper's equation."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from serkd_jax import losses

B, C, D = 6, 4, 8


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(B, C)).astype(np.float32) * 3,
        "b": rng.normal(size=(B, C)).astype(np.float32) * 3,
        "labels": rng.integers(0, C, B),
    }


def unit_vectors(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_cross_entropy_equals_torch(arrays):
    expected = F.cross_entropy(torch.tensor(arrays["a"]), torch.tensor(arrays["labels"]))
    assert losses.cross_entropy(arrays["a"], arrays["labels"]) == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_supervised_contrastive_equals_a_loop_over_equation_3():
    rng = np.random.default_rng(1)
    anchors, candidates = unit_vectors(rng, B, D), unit_vectors(rng, 12, D)
    labels = np.array([0, 1, 2, 0, 3, 3])
    candidate_labels = np.array([0, 1, 2, 0, 1, 1, -1, -1, 0, 2, -1, 0])  # no 3; three empty
    tau, total = 0.07, 0.0
    for z_k, label in zip(anchors.astype(float), labels, strict=True):
        usable = [a for a in range(12) if candidate_labels[a] >= 0]
        positives = [a for a in usable if candidate_labels[a] == label]
        denominator = sum(np.exp(z_k @ candidates[a].astype(float) / tau) for a in usable)
        for p in positives:
            likelihood = np.exp(z_k @ candidates[p].astype(float) / tau) / denominator
            total -= np.log(likelihood) / len(positives)
    actual = losses.supervised_contrastive(anchors, labels, candidates, candidate_labels, tau)
    assert actual == pytest.approx(total / B, rel=1e-5)


def test_supervised_contrastive_is_zero_with_finite_gradient_when_nothing_is_filled():
    anchors = unit_vectors(np.random.default_rng(2), B, D)

    def loss(x):
        empty = jnp.full(5, -1)
        return losses.supervised_contrastive(x, jnp.zeros(B, int), jnp.zeros((5, D)), empty, 0.07)

    value, gradient = jax.value_and_grad(loss)(anchors)
    assert value == 0
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("direction", ["teacher_student", "student_teacher"])
def test_soft_label_divergence_equals_torch_kl_div(arrays, direction):
    tau = 5.0
    log_s, log_t = (torch.log_softmax(torch.tensor(arrays[k]) / tau, -1) for k in ("a", "b"))
    inputs = (log_s, log_t) if direction == "teacher_student" else (log_t, log_s)
    expected = tau**2 * F.kl_div(*inputs, reduction="batchmean", log_target=True)
    actual = losses.soft_label_divergence(arrays["a"], arrays["b"], tau, direction)
    assert actual == pytest.approx(expected.item(), rel=1e-4)


def test_soft_label_divergence_refuses_an_unknown_direction(arrays):
    with pytest.raises(ValueError, match="direction"):
        losses.soft_label_divergence(arrays["a"], arrays["b"], 1.0, "both")


def test_patient_distillation_equals_torch_mse_of_normalised_vectors(arrays):
    a, b = torch.tensor(arrays["a"]), torch.tensor(arrays["b"])
    expected = F.mse_loss(F.normalize(a), F.normalize(b))
    actual = losses.patient_distillation(arrays["a"], arrays["b"])
    assert actual == pytest.approx(expected.item(), rel=1e-5)


def test_collaborative_loss_equals_equation_9(arrays):
    teacher, student = (torch.softmax(torch.tensor(arrays[k]), -1) for k in ("a", "b"))
    expected = 0.0
    for i, c in enumerate(arrays["labels"]):
        expected -= (torch.log(teacher[i, c]) + torch.log(student[i, c])).item() / (2 * B)
    actual = losses.collaborative_loss(arrays["a"], arrays["b"], arrays["labels"])
    assert actual == pytest.approx(expected, rel=1e-5)


def test_mean_consistency_and_reward_equal_equations_12_and_13(arrays):
    teacher, student = (torch.softmax(torch.tensor(arrays[k]), -1).numpy() for k in ("a", "b"))
    rows = np.arange(B)
    p_t, p_s = teacher[rows, arrays["labels"]], student[rows, arrays["labels"]]
    consistency = losses.mean_consistency(arrays["a"], arrays["b"], arrays["labels"])
    assert consistency == pytest.approx((p_t - p_s).mean(), rel=1e-4)
    reward = losses.reward(arrays["b"], arrays["a"], arrays["labels"])
    assert reward == pytest.approx((p_s > p_t).mean())


def test_losses_combine_as_equations_2_4_and_10_say():
    assert losses.student_loss(2.0, 10.0, 0.05) == pytest.approx(0.05 * 10 + 0.95 * 2)
    assert losses.distillation_loss(2.0, 3.0, 0.01, 0.1, 100) == pytest.approx(0.2 + 2.7 + 1.0)
    assert losses.updated_student_loss(2.0, -0.5) == 1.5


def test_discounted_returns_equal_the_recursion():
    returns = losses.discounted_returns(jnp.array([1.0, 0.0, 2.0]), 0.5)
    np.testing.assert_allclose(returns, [1 + 0.5 * (0 + 0.5 * 2), 0.5 * 2, 2])


def test_reinforce_gradient_is_on_average_the_exact_policy_gradient():
    """Over all two-step episodes of a bandit, weighted by their probability."""
    theta, payoff = jnp.array([0.3, -0.2, 0.1]), jnp.array([1.0, 0.0, 3.0])

    def expected_mean_reward(theta):
        return jax.nn.softmax(theta) @ payoff

    def episode_gradient(actions):
        logits = lambda t: jnp.broadcast_to(t, (2, 3))  # noqa: E731
        # No discount: each step's return is its own reward, as in a bandit.
        return jax.grad(lambda t: losses.reinforce(logits(t), actions, payoff[actions]))(theta)

    p = jax.nn.softmax(theta)
    average = sum(
        p[a] * p[b] * episode_gradient(jnp.array([a, b]))
        for a, b in itertools.product(range(3), repeat=2)
    )
    # The mean baseline of an E-step episode scales the gradient by (E - 1) / E.
    np.testing.assert_allclose(-2 * average, jax.grad(expected_mean_reward)(theta), atol=1e-6)
