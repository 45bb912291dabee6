"""The paper's losses and the curriculum's objective, as pure functions of arrays.

Symbols: B anchors or examples, C classes, D embedding width, M contrastive candidates. Every
loss is a mean over its batch, so that its weight does not depend on the batch size.
"""

import jax
import jax.numpy as jnp

from serkd_jax.errors import UserError


def cross_entropy(
    logits: jax.Array, labels: jax.Array, smoothing: float = 0.0, focus: float = 0.0
) -> jax.Array:
    """Returns the mean cross-entropy: Eq. 1, and the second term of Eqs. 2 and 11.

    Args:
        logits: (B, C) float.
        labels: (B,) int.
        smoothing: share of the target that all classes get alike.
        focus: γ of the focal loss (Lin et al. 2017): an example with the probability p of its class
            has the weight (1 - p)^γ, which is not differentiated.
    """
    true = true_class_log_probability(logits, labels)
    if focus:
        true *= jax.lax.stop_gradient((1 - jnp.exp(true)) ** focus)
    if not smoothing:
        return -true.mean()
    return -(1 - smoothing) * true.mean() - smoothing * jax.nn.log_softmax(logits).mean()


def true_class_log_probability(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the log of the true class's softmax probability, (B,); the ȳ of Eq. 9."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]


def true_class_margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the true class's log-odds, (B,): they rank like probabilities but do not saturate."""
    chosen = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jnp.where(chosen, -jnp.inf, logits)
    return jnp.where(chosen, logits, 0).sum(-1) - jax.nn.logsumexp(others, axis=-1)


def supervised_contrastive(
    anchors: jax.Array,
    anchor_labels: jax.Array,
    candidates: jax.Array,
    candidate_labels: jax.Array,
    temperature: float,
) -> jax.Array:
    """Returns the supervised contrastive loss, Eq. 3, over the candidates of a MoCo dictionary.

    The loss of anchor k, with the candidates of its label as its positives P(k), is
    -1/|P(k)| * sum_p log( exp(z_k.z_p/τ1) / sum_a exp(z_k.z_a/τ1) ). An anchor without positives
    contributes 0.

    Args:
        anchors: (B, D) L2-normalised queries.
        anchor_labels: (B,) int.
        candidates: (M, D) L2-normalised keys; no anchor is among them.
        candidate_labels: (M,) int; a negative label marks an empty slot, which is ignored.
        temperature: τ1 of Eq. 3.
    """
    filled = candidate_labels >= 0
    precise = jnp.promote_types(anchors.dtype, jnp.float32)
    similarity = anchors.astype(precise) @ candidates.astype(precise).T / temperature
    similarity = jnp.where(filled, similarity, -jnp.inf)
    log_probability = jax.nn.log_softmax(similarity, axis=-1)
    positive = (anchor_labels[:, None] == candidate_labels[None, :]) & filled
    total = jnp.where(positive, log_probability, 0.0).sum(-1)
    return -(total / jnp.maximum(positive.sum(-1), 1)).mean()


def student_loss(cross_entropy: jax.Array, contrastive: jax.Array, weight: float) -> jax.Array:
    """Returns λ L^sup + (1-λ) CE: Eq. 2 for the student, Eq. 11 for the updated student."""
    return weight * contrastive + (1.0 - weight) * cross_entropy


def soft_label_divergence(
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    temperature: float,
    direction: str = "teacher_student",
) -> jax.Array:
    """Returns L^soft, Eqs. 5-7: τ2² times the Kullback-Leibler divergence of soft predictions.

    Args:
        student_logits: (B, C).
        teacher_logits: (B, C).
        temperature: τ2.
        direction: `teacher_student` for KL(p_t || p_s), which results from Eqs. 6 and 7 as
            arguments of PyTorch's `kl_div`; `student_teacher` for Eq. 5 as printed, KL(p_s || p_t).
    """
    log_s = jax.nn.log_softmax(student_logits / temperature)
    log_t = jax.nn.log_softmax(teacher_logits / temperature)
    if direction == "teacher_student":
        divergence = (jnp.exp(log_t) * (log_t - log_s)).sum(-1)
    elif direction == "student_teacher":
        divergence = (jnp.exp(log_s) * (log_s - log_t)).sum(-1)
    else:
        raise UserError(f"direction must be teacher_student or student_teacher, not {direction!r}")
    return temperature**2 * divergence.mean()


def patient_distillation(teacher_hidden: jax.Array, student_hidden: jax.Array) -> jax.Array:
    """Returns L^PKD, Eq. 8: mean squared error of the L2-normalised (B, D) hidden vectors."""
    difference = l2_normalize(teacher_hidden) - l2_normalize(student_hidden)
    return jnp.square(difference).mean()


def distillation_loss(
    student: jax.Array, soft: jax.Array, patient: jax.Array, alpha: float, beta: float
) -> jax.Array:
    """Returns L^{student KD} = α L^student + (1-α) L^soft + β L^PKD, Eq. 4."""
    return alpha * student + (1.0 - alpha) * soft + beta * patient


def collaborative_loss(
    logits_of_teacher_hidden: jax.Array, logits_of_student_hidden: jax.Array, labels: jax.Array
) -> jax.Array:
    """Returns L^{meta col}, Eq. 9: the meta-teacher's loss on both models' hidden vectors.

    Args:
        logits_of_teacher_hidden: (B, C), T'(h(i, T)).
        logits_of_student_hidden: (B, C), T'(h(i, S)).
        labels: (B,) int.
    """
    return 0.5 * (
        cross_entropy(logits_of_teacher_hidden, labels)
        + cross_entropy(logits_of_student_hidden, labels)
    )


def mean_consistency(
    teacher_logits: jax.Array, student_logits: jax.Array, labels: jax.Array
) -> jax.Array:
    """Returns L^mean, Eq. 12: the signed mean of p_T'(y | F(S')) - p_S'(y) for the true class y."""
    teacher = jnp.exp(true_class_log_probability(teacher_logits, labels))
    student = jnp.exp(true_class_log_probability(student_logits, labels))
    return (teacher - student).mean()


def updated_student_loss(student: jax.Array, consistency: jax.Array) -> jax.Array:
    """Returns L^{updated student} = L^student' + L^mean, Eq. 10."""
    return student + consistency


def reward(student_logits: jax.Array, teacher_logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns Eq. 13 as a share: how often the student beats the teacher on the true class."""
    better = true_class_log_probability(student_logits, labels) > true_class_log_probability(
        teacher_logits, labels
    )
    return better.astype(jnp.float32).mean()


def discounted_returns(rewards: jax.Array, discount: float) -> jax.Array:
    """Returns G_t = r_t + discount * G_{t+1} over an episode's (E,) rewards."""

    def accumulate(later: jax.Array, now: jax.Array) -> tuple[jax.Array, jax.Array]:
        total = now + discount * later
        return total, total

    return jax.lax.scan(accumulate, jnp.zeros((), rewards.dtype), rewards, reverse=True)[1]


def reinforce(policy_logits: jax.Array, actions: jax.Array, advantages: jax.Array) -> jax.Array:
    """Returns the REINFORCE objective (Williams 1992) of one episode, a mean over its steps.

    Args:
        policy_logits: (E, K) the policy's logits at each step.
        actions: (E,) int, the tasks that were sampled.
        advantages: (E,) discounted returns minus a baseline, taken as constants. On average the
            gradient is -1/E times the policy gradient, as long as the baseline does not depend on
            the actions of this episode (as the episode's own mean return would).
    """
    advantages = jax.lax.stop_gradient(advantages)
    return -(true_class_log_probability(policy_logits, actions) * advantages).mean()


def l2_normalize(x: jax.Array) -> jax.Array:
    """Divides x by its norm along the last axis; zero stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)
