"""Every loss against torch in float64, or against the paper's equation written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from serkd_jax import losses

B, C, D = 6, 4, 8
LN2 = np.log(2)


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


def assert_equals_torch(ours, oracle, *inputs, gradient_rtol=1e-5):
    """The value, and the gradient of every input, against autograd in float64."""
    value, gradients = jax.jit(jax.value_and_grad(ours, range(len(inputs))))(*inputs)
    tensors = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in inputs]
    expected = oracle(*tensors)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        scale = tensor.grad.abs().max().item()
        np.testing.assert_allclose(
            gradient.astype(float), tensor.grad, gradient_rtol, gradient_rtol * scale
        )


@pytest.mark.parametrize("scale", [1, 10])
def test_the_true_class_margin_is_the_log_odds_of_its_probability(arrays, scale):
    logits, rows = scale * arrays["a"], np.arange(B)
    p = torch.softmax(torch.tensor(logits, dtype=torch.float64), -1)[rows, arrays["labels"]]
    margin = losses.true_class_margin(jnp.asarray(logits), arrays["labels"])
    np.testing.assert_allclose(margin, torch.log(p / (1 - p)), rtol=1e-5)


def test_the_true_class_margin_ranks_what_is_certain_and_what_is_hopeless():
    """Probabilities that float32 rounds to 1, and to 0."""
    tops = np.linspace(20, 300, 15, dtype=np.float32)
    logits = np.stack([tops, np.zeros(15), np.ones(15)], 1)
    of_first, of_second = (
        np.asarray(losses.true_class_margin(logits, np.full(15, label))) for label in (0, 1)
    )
    assert (np.exp(losses.true_class_log_probability(logits, np.zeros(15, int))) == 1).all()
    np.testing.assert_allclose(of_first, tops - np.logaddexp(0, 1), rtol=1e-6)
    np.testing.assert_allclose(of_second, -np.logaddexp(tops, 1), rtol=1e-6)
    assert (np.diff(of_first) > 0).all()
    assert (np.diff(of_second) < 0).all()


@pytest.mark.parametrize(("scale", "smoothing"), [(1, 0.0), (100, 0.0), (1, 0.2), (100, 0.2)])
def test_cross_entropy_of_equation_1_equals_torch_for_mild_and_for_extreme_logits(
    arrays, scale, smoothing
):
    labels = torch.tensor(arrays["labels"])
    assert_equals_torch(
        lambda x: losses.cross_entropy(x, arrays["labels"], smoothing),
        lambda x: F.cross_entropy(x, labels, label_smoothing=smoothing),
        scale * arrays["a"],
    )


def test_a_focal_loss_weighs_examples_by_what_they_lack_and_does_not_differentiate_it(arrays):
    labels = torch.tensor(arrays["labels"])

    def focal(logits):
        true = torch.log_softmax(logits, 1)[torch.arange(len(labels)), labels]
        return -((1 - true.exp().detach()) ** 0.5 * true).mean()

    assert_equals_torch(
        lambda x: losses.cross_entropy(x, arrays["labels"], focus=0.5), focal, arrays["a"]
    )


def equation_3(anchors, labels, candidates, candidate_labels, tau):
    """The paper's sums, divided by the number of anchors; float64 holds every exponential."""
    total = 0.0
    for z_k, label in zip(anchors, labels, strict=True):
        usable = [a for a in range(len(candidates)) if candidate_labels[a] >= 0]
        positives = [a for a in usable if candidate_labels[a] == label]
        denominator = sum(torch.exp(z_k @ candidates[a] / tau) for a in usable)
        for p in positives:
            likelihood = torch.exp(z_k @ candidates[p] / tau) / denominator
            total = total - torch.log(likelihood) / len(positives)
    return total / len(anchors)


def test_supervised_contrastive_equals_a_loop_over_equation_3():
    rng = np.random.default_rng(1)
    labels = np.array([0, 1, 2, 0, 3, -1])
    candidate_labels = np.array([0, 1, 2, 0, 1, 1, -1, -1, 0, 2, -1, 0])  # no 3; three empty
    assert_equals_torch(
        lambda x, y: losses.supervised_contrastive(x, labels, y, candidate_labels, 0.07),
        lambda x, y: equation_3(x, labels, y, candidate_labels, 0.07),
        unit_vectors(rng, B, D),
        unit_vectors(rng, 12, D),
    )


@pytest.mark.parametrize("tau", [0.07, 0.01])
def test_supervised_contrastive_equals_equation_3_at_the_extremes_of_bfloat16(tau):
    """The anchors and their opposites as keys.

    Of its own key and its opposite, an anchor has one, the other (which costs 2 / tau), both or
    neither as its positives.
    """
    rng = np.random.default_rng(2)
    anchors, others = unit_vectors(rng, 4, D), unit_vectors(rng, 3, D)
    labels = np.array([0, 1, 2, 3])
    candidate_labels = np.array([0, 4, 2, 4, 4, 1, 2, 4, 4, 4, -1])
    assert_equals_torch(
        lambda x, y: losses.supervised_contrastive(x, labels, y, candidate_labels, tau),
        lambda x, y: equation_3(x, labels, y, candidate_labels, tau),
        jnp.asarray(anchors, jnp.bfloat16),
        jnp.asarray(np.concatenate([anchors, -anchors, others]), jnp.bfloat16),
        gradient_rtol=5e-3,  # the gradients are rounded to bfloat16
    )


def test_supervised_contrastive_is_zero_with_finite_gradient_when_nothing_is_filled():
    anchors = unit_vectors(np.random.default_rng(2), B, D)

    @jax.jit
    @jax.value_and_grad
    def loss(x):
        empty = jnp.full(5, -1)
        return losses.supervised_contrastive(x, jnp.zeros(B, int), jnp.zeros((5, D)), empty, 0.07)

    value, gradient = loss(anchors)
    assert value == 0
    assert not gradient.any()


def test_soft_label_divergence_equals_torch_with_the_activations_of_equations_6_and_7(arrays):
    tau = 5.0
    assert_equals_torch(
        lambda s, t: losses.soft_label_divergence(s, t, tau),
        lambda s, t: (
            tau**2
            * F.kl_div(F.log_softmax(s / tau, -1), F.softmax(t / tau, -1), reduction="batchmean")
        ),
        arrays["a"],
        arrays["b"],
    )


def test_soft_label_divergence_of_student_teacher_is_equation_5_as_printed(arrays):
    tau = 5.0

    def equation_5(student, teacher):
        p_s, p_t = F.softmax(student / tau, -1), F.softmax(teacher / tau, -1)
        return tau**2 * (p_s * torch.log(p_s / p_t)).sum() / B

    assert_equals_torch(
        lambda s, t: losses.soft_label_divergence(s, t, tau, "student_teacher"),
        equation_5,
        arrays["a"],
        arrays["b"],
    )


def test_soft_label_gradient_is_tau_times_the_difference_of_probabilities(arrays):
    tau = 5.0
    p_s, p_t = (torch.softmax(torch.tensor(arrays[k]) / tau, -1).numpy() for k in ("a", "b"))
    gradient = jax.grad(losses.soft_label_divergence)(arrays["a"], arrays["b"], tau)
    np.testing.assert_allclose(gradient, tau * (p_s - p_t) / B, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "default", "as_printed"),
    [
        ([40.0, 0.0], [0.0, 0.0], 4 * (10 - LN2), 4 * LN2),  # leaves out one of T's classes
        ([0.0, 0.0], [40.0, 0.0], 4 * LN2, 4 * (10 - LN2)),  # has one that T leaves out
    ],
)
def test_each_direction_of_equation_5_punishes_what_the_other_forgives(
    student, teacher, default, as_printed
):
    logits = jnp.array([student]), jnp.array([teacher])
    assert losses.soft_label_divergence(*logits, 2.0) == pytest.approx(default, rel=1e-5)
    printed = losses.soft_label_divergence(*logits, 2.0, "student_teacher")
    assert printed == pytest.approx(as_printed, rel=1e-5)


def test_soft_label_divergence_refuses_an_unknown_direction(arrays):
    with pytest.raises(ValueError, match="direction"):
        losses.soft_label_divergence(arrays["a"], arrays["b"], 1.0, "both")


def test_patient_distillation_of_equation_8_equals_torch_mse_of_normalised_vectors(arrays):
    assert_equals_torch(
        losses.patient_distillation,
        lambda t, s: F.mse_loss(F.normalize(t), F.normalize(s)),
        arrays["a"],
        arrays["b"],
    )


def test_l2_normalize_makes_small_vectors_unit_and_leaves_zero_with_a_finite_gradient():
    small = jnp.array([[3e-4, 0.0, -4e-4], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(losses.l2_normalize(small), [[0.6, 0, -0.8], [0, 0, 0]], rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: losses.l2_normalize(x).sum())(small)).all()


def test_collaborative_loss_equals_equation_9(arrays):
    labels = arrays["labels"]

    def equation_9(teacher, student):
        y_t, y_s = F.softmax(teacher, -1), F.softmax(student, -1)
        return -sum(
            torch.log(y_t[i, labels[i]]) + torch.log(y_s[i, labels[i]]) for i in range(B)
        ) / (2 * B)

    assert_equals_torch(
        lambda t, s: losses.collaborative_loss(t, s, labels), equation_9, arrays["a"], arrays["b"]
    )


def test_mean_consistency_equals_equation_12(arrays):
    rows, labels = np.arange(B), arrays["labels"]
    assert_equals_torch(
        lambda t, s: losses.mean_consistency(t, s, labels),
        lambda t, s: (F.softmax(t, -1)[rows, labels] - F.softmax(s, -1)[rows, labels]).mean(),
        arrays["a"],
        arrays["b"],
    )


def test_a_student_surer_than_the_meta_teacher_has_a_negative_equation_12():
    student, teacher = jnp.log(jnp.array([[3.0, 1.0]])), jnp.zeros((1, 2))
    consistency = losses.mean_consistency(teacher, student, jnp.array([0]))
    assert consistency == pytest.approx(0.5 - 0.75)


def test_reward_is_the_share_of_equation_13_and_ties_earn_nothing(arrays):
    teacher, student, labels = arrays["a"].copy(), arrays["b"], arrays["labels"]
    teacher[0] = student[0]
    p_t, p_s = (F.softmax(torch.tensor(x), -1)[np.arange(B), labels] for x in (teacher, student))
    share = (p_s > p_t).float().mean().item()
    assert losses.reward(student, teacher, labels) == pytest.approx(share)


def test_losses_combine_as_equations_2_4_10_and_11_say():
    assert losses.student_loss(2.0, 10.0, 0.05) == pytest.approx(0.05 * 10 + 0.95 * 2)
    assert losses.distillation_loss(2.0, 3.0, 0.01, 0.1, 100) == pytest.approx(0.2 + 2.7 + 1.0)
    assert losses.updated_student_loss(2.0, -0.5) == 1.5


def test_discounted_returns_equal_the_sum_over_later_rewards():
    rewards = np.random.default_rng(3).normal(size=9)
    expected = [sum(0.9 ** (k - t) * rewards[k] for k in range(t, 9)) for t in range(9)]
    np.testing.assert_allclose(
        losses.discounted_returns(jnp.asarray(rewards), 0.9), expected, rtol=1e-5
    )


@pytest.mark.parametrize("baseline", [(0.0, 0.0), (0.7, -1.3)])
@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_reinforce_is_on_average_the_exact_policy_gradient(discount, baseline):
    """Enumerated: the first action earns r_0(a) and decides the second's odds and r_1(a, b).

    The policy gradient credits action t with discount**(k - t) of each later reward r_k; without
    discount it is the gradient of the expected sum. No baseline of earlier episodes changes it.
    """
    first, second = jnp.array([0.3, -0.2]), jnp.array([[0.1, 0.4], [-0.5, 0.2]])
    r_0, r_1 = jnp.array([1.0, 0.5]), jnp.array([[0.2, 2.0], [3.0, -1.0]])
    episodes = jnp.array(list(itertools.product(range(2), repeat=2)))

    @jax.jit
    @jax.vmap
    def episode_gradient(actions):
        a, b = actions

        def objective(first, second):
            returns = losses.discounted_returns(jnp.stack([r_0[a], r_1[a, b]]), discount)
            logits = jnp.stack([first, second[a]])
            return losses.reinforce(logits, actions, returns - jnp.array(baseline))

        return jax.grad(objective, (0, 1))(first, second)

    def expected_reward(first, second, reward):
        return jax.nn.softmax(first) @ (jax.nn.softmax(second) * reward).sum(-1)

    of_r_0, of_r_1 = (
        jax.grad(expected_reward, (0, 1))(first, second, reward) for reward in (r_0[:, None], r_1)
    )
    p = (jax.nn.softmax(first)[:, None] * jax.nn.softmax(second)).ravel()
    for_first, for_second = (jnp.tensordot(p, g, 1) for g in episode_gradient(episodes))
    np.testing.assert_allclose(-2 * for_first, of_r_0[0] + discount * of_r_1[0], atol=1e-6)
    np.testing.assert_allclose(-2 * for_second, of_r_1[1], atol=1e-6)


def test_reinforce_takes_the_advantages_as_constants(arrays):
    gradient = jax.grad(losses.reinforce, 2)(arrays["a"], arrays["labels"], jnp.arange(float(B)))
    assert not gradient.any()
