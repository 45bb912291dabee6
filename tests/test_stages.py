"""Every stage's step: one device against eight, the meta-gradient, and that it learns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from ml_collections import ConfigDict
from transformers import HubertConfig

from serkd_jax import parallel
from serkd_jax.augmentation import example_keys, spec_augment
from serkd_jax.models.hubert import HubertEmbed, num_frames
from serkd_jax.models.policy import Policy
from serkd_jax.models.student import Adapter, Student
from serkd_jax.models.teacher import Classifier, Teacher
from serkd_jax.stages import curriculum, distill, student, teacher
from serkd_jax.stages.common import make_optimizer

B, T, N, D, H, C, P, K = 16, 12, 6, 8, 16, 3, 8, 3
CONFIG = ConfigDict(
    {
        "contrastive": {
            "weight": 0.3,
            "temperature": 0.1,
            "momentum": 0.9,
            "queue_size": 40,
            "max_frequency_mask": 3,
            "max_time_mask": 3,
        },
        "distill": {"alpha": 0.3, "beta": 10.0, "temperature": 2.0, "direction": "teacher_student"},
        "meta": {"order": "second_order", "pilot_learning_rate": 0.5},
        "curriculum": {"episode_steps": 4, "discount": 0.9, "running_rate": 0.1},
        "teacher": {"max_frequency_mask": 3, "max_time_mask": 3},
    }
)
HUBERT = HubertConfig(
    hidden_size=H,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    conv_dim=(8, 8),
    conv_kernel=(10, 5),
    conv_stride=(50, 5),
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    feat_extract_norm="layer",
    do_stable_layer_norm=True,
    hidden_dropout=0.1,
    attention_dropout=0.1,
    activation_dropout=0.1,
)
STUDENT = Student(
    C,
    width=D,
    mlp_dim=16,
    num_heads=2,
    num_layers=1,
    classifier_dim=8,
    projection_dim=P,
    dropout=0.1,
)
ADAPTER, CLASSIFIER, POLICY = Adapter(H), Classifier(C), Policy(K, width=8)
# Adam's usual epsilon would blow the rounding noise in a zero gradient up to a full step.
OPTIMIZER, META_OPTIMIZER, POLICY_OPTIMIZER = (
    optax.adamw(rate, eps=1e-3) for rate in (3e-3, 1e-2, 1e-2)
)
RNG = jax.random.key(7)


def make_batch(seed, inputs=None):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, C, B).astype(np.int32)
    length = rng.integers(T // 2, T + 1, B).astype(np.int32)
    if inputs is None:  # classes differ in their mean, so that a step can learn
        inputs = rng.normal(size=(B, T, N)) + label[:, None, None]
        inputs = (inputs * (np.arange(T) < length[:, None])[..., None]).astype(np.float16)
    hidden = rng.normal(size=(B, H)).astype(np.float32) + label[:, None]
    index = rng.permutation(1000)[:B].astype(np.int32)
    return {
        "inputs": inputs,
        "length": length,
        "label": label,
        "index": index,
        "teacher_hidden": hidden,
    }


def make_pair(seed):
    return {"train": make_batch(seed), "quiz": make_batch(seed + 100)}


def teacher_stage():
    model = Teacher(HUBERT, C, patch_frames=2)
    params = model.init(RNG, jnp.zeros((1, T, N)), jnp.ones((1, T), bool))["params"]
    make_step = partial(
        teacher.make_step, model, teacher.make_frames(None, False), OPTIMIZER, CONFIG.teacher
    )
    return make_step, lambda: teacher.init_state(params, OPTIMIZER), make_batch


def waveform_teacher_stage():
    model, embed = Teacher(HUBERT, C), HubertEmbed(HUBERT)
    samples = 3000
    frozen = embed.init(RNG, jnp.zeros((1, samples)))["params"]
    frames = num_frames(HUBERT, samples)
    params = model.init(RNG, jnp.zeros((1, frames, H)), jnp.ones((1, frames), bool))["params"]
    make_step = partial(
        teacher.make_step, model, teacher.make_frames(embed, True), OPTIMIZER, CONFIG.teacher
    )

    def batch(seed):
        rng = np.random.default_rng(seed)
        waveform = rng.integers(-9999, 9999, (B, samples)).astype(np.int16)
        return make_batch(seed, waveform) | {
            "length": rng.integers(1000, samples, B).astype(np.int32)
        }

    return make_step, lambda: teacher.init_state(params, OPTIMIZER, frozen), batch


def student_params():
    return STUDENT.init(RNG, jnp.zeros((1, T, N)), jnp.ones(1, jnp.int32))["params"]


def student_stage():
    make_step = partial(student.make_step, STUDENT, OPTIMIZER, CONFIG.contrastive)
    init = lambda: student.init_state(student_params(), OPTIMIZER, CONFIG.contrastive, P)  # noqa: E731
    return make_step, init, make_batch


def distill_init():
    params = {
        "student": student_params(),
        "adapter": ADAPTER.init(RNG, jnp.zeros((1, D)))["params"],
    }
    meta = CLASSIFIER.init(RNG, jnp.zeros((1, H)))["params"]
    return distill.init_state(params, meta, OPTIMIZER, META_OPTIMIZER, CONFIG.contrastive, P)


def distill_stage(order="second_order"):
    config = ConfigDict({**CONFIG, "meta": {**CONFIG.meta, "order": order}})
    make_step = partial(
        distill.make_step, STUDENT, ADAPTER, CLASSIFIER, OPTIMIZER, META_OPTIMIZER, config
    )
    return make_step, distill_init, make_pair


def curriculum_stage():
    make_step = partial(
        curriculum.make_step, STUDENT, ADAPTER, CLASSIFIER, POLICY, OPTIMIZER, POLICY_OPTIMIZER,
        CONFIG, 50,
    )  # fmt: skip

    def init():
        return curriculum.init_state(
            distill_init(), OPTIMIZER, POLICY, POLICY_OPTIMIZER, CONFIG.curriculum, D, RNG
        )

    return make_step, init, make_pair


STAGES = {
    "teacher": teacher_stage,
    "waveform_teacher": waveform_teacher_stage,
    "student": student_stage,
    "distill": distill_stage,
    "first_order_distill": partial(distill_stage, "first_order"),
    "curriculum": curriculum_stage,
}


def run(stage, num_devices, num_steps=5):
    """Five steps: the queue wraps around and one episode of the policy ends."""
    make_step, init, batch = stage
    step = parallel.compile_step(make_step, jax.devices()[:num_devices])
    state, history = jax.tree.map(jnp.array, init()), []  # the step donates its state
    for seed in range(num_steps):
        state, metrics = step(state, batch(seed), RNG)
        history.append({k: float(v) for k, v in metrics.items()})
    return state, history


def as_arrays(state):
    """All leaves as float arrays; optimiser counters and queue positions included."""
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(state)]


@pytest.mark.parametrize(
    "name", ["teacher", "waveform_teacher", "student", "distill", "curriculum"]
)
def test_eight_devices_take_the_same_steps_as_one(name):
    stage = STAGES[name]()
    one, metrics_of_one = run(stage, 1)
    eight, metrics_of_eight = run(stage, 8)
    for a, b in zip(as_arrays(one), as_arrays(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    for a, b in zip(metrics_of_one, metrics_of_eight, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", STAGES)
def test_every_trained_parameter_moves_and_every_frozen_one_stays(name):
    make_step, init, batch = STAGES[name]()
    before = init()
    after, _ = jax.jit(make_step())(before, batch(0), RNG)
    frozen = {"frozen", "adapter_params", "meta_params"} if name != "first_order_distill" else set()
    frozen -= {"meta_params"} if "distill" in name else set()
    for field in ("params", "meta_params", "momentum_params", "frozen", "adapter_params"):
        if not hasattr(before, field):
            continue
        pairs = zip(*(jax.tree.leaves(getattr(s, field)) for s in (before, after)), strict=True)
        moved = [bool(np.any(a != b)) for a, b in pairs]
        if field in frozen:
            assert not any(moved), field
        else:
            # A softmax is blind to the attention's key bias: its gradient is rounding noise.
            assert np.mean(moved) > 0.9, field


@pytest.mark.parametrize("name", ["teacher", "student", "distill"])
def test_the_loss_falls_on_learnable_data(name):
    make_step, init, batch = STAGES[name]()
    step, state, history = jax.jit(make_step()), init(), []
    for seed in range(150):
        state, metrics = step(state, batch(seed % 4), RNG)
        history.append(float(metrics["accuracy"]))
    assert np.mean(history[-8:]) > np.mean(history[:8]) + 0.2


@pytest.fixture(scope="module")
def meta_gradient():
    """(order, pilot rate, T' as a vector or None) -> (gradient of Eq. 9, its value), in float64.

    T' takes a step of plain unit-rate descent; how far it moves is its gradient.
    """
    plain, steps = optax.sgd(1.0), {}

    def to_float64(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    with jax.enable_x64(True):
        state = jax.tree.map(to_float64, distill_init()).replace(meta_opt_state=plain.init({}))
        start, unflatten = ravel_pytree(state.meta_params)
        start = np.asarray(start)

    def run(order, rate, meta_vector=start):
        if (order, rate) not in steps:
            meta = {"order": order, "pilot_learning_rate": rate}
            config = ConfigDict({**CONFIG, "meta": meta})
            step = distill.make_step(STUDENT, ADAPTER, CLASSIFIER, OPTIMIZER, plain, config)
            steps[order, rate] = jax.jit(step)
        with jax.enable_x64(True):
            before = state.replace(meta_params=unflatten(jnp.asarray(meta_vector)))
            after, metrics = steps[order, rate](before, make_pair(0), RNG)
            moved = np.asarray(ravel_pytree(after.meta_params)[0])
            return meta_vector - moved, float(metrics["meta_loss"])

    return start, run


def test_the_meta_gradient_is_the_slope_of_equation_9_through_the_pilot_step(meta_gradient):
    start, run = meta_gradient
    second, first = (run(order, 0.5)[0] for order in ("second_order", "first_order"))
    direction = second / np.linalg.norm(second)
    epsilon = 1e-5
    plus, minus = (
        run("second_order", 0.5, start + sign * epsilon * direction)[1] for sign in (1, -1)
    )
    slope = (plus - minus) / (2 * epsilon)
    assert second @ direction == pytest.approx(slope, rel=1e-4)
    assert abs(first @ direction - slope) > 0.01 * slope  # the part through the pilot step


def test_at_pilot_rate_zero_first_and_second_order_agree(meta_gradient):
    _, run = meta_gradient
    np.testing.assert_allclose(run("second_order", 0.0)[0], run("first_order", 0.0)[0], atol=1e-9)


def test_an_episode_is_what_was_seen_done_and_earned_and_moves_the_policy_by_reinforce():
    """Four steps watched from outside, then the update written from Williams (1992)."""
    make_step, init, batch = curriculum_stage()
    step, state = jax.jit(make_step()), init()
    policy_params, policy_opt_state = state.policy_params, state.policy_opt_state
    seen, done, earned = [], [], []
    accuracy, running_reward = np.zeros(K), np.zeros(K)
    for seed in range(4):
        seen.append(np.asarray(state.observation))
        done.append(task := int(state.task))
        state, metrics = step(state, batch(seed), RNG)
        earned.append(float(metrics["reward"]))
        assert metrics["task"] == task
        accuracy[task] += 0.1 * (float(metrics["accuracy"]) - accuracy[task])
        running_reward[task] += 0.1 * (earned[-1] - running_reward[task])
        np.testing.assert_allclose(state.observation[D : D + K], accuracy, rtol=1e-5)
        np.testing.assert_allclose(state.observation[D + K : -1], running_reward, rtol=1e-5)
        assert state.observation[-1] == pytest.approx((seed + 1) / 50)
    returns = [sum(0.9 ** (u - t) * earned[u] for u in range(t, 4)) for t in range(4)]
    advantage = np.array(returns) - np.mean(returns)

    def objective(params):
        logits = POLICY.apply({"params": params}, np.stack(seen))
        log_probability = jax.nn.log_softmax(logits)[np.arange(4), np.array(done)]
        return -(log_probability * advantage).mean()

    grads = jax.grad(objective)(policy_params)
    updates, _ = POLICY_OPTIMIZER.update(grads, policy_opt_state, policy_params)
    expected = optax.apply_updates(policy_params, updates)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), state.policy_params, expected
    )


def test_keys_come_from_the_momentum_encoder_and_enter_the_queue_after_the_step():
    make_step, init, batch = student_stage()
    before, examples = init(), batch(0)
    other = jax.tree.map(lambda x: x + 0.1, before.momentum_params)
    before = before.replace(momentum_params=other)
    after, _ = jax.jit(make_step())(before, examples, RNG)
    keys = np.asarray(after.queue.keys[:B])
    np.testing.assert_array_equal(after.queue.labels[:B], examples["label"])
    assert (after.queue.labels[B:] == -1).all()
    mask_rng = jax.random.split(jax.random.fold_in(RNG, 0))[1]
    masked = spec_augment(
        example_keys(mask_rng, examples["index"]),
        examples["inputs"].astype(np.float32),
        examples["length"],
        3,
        3,
    )
    expected = STUDENT.apply({"params": other}, masked, examples["length"]).projection
    np.testing.assert_allclose(keys, expected, atol=1e-5)


def test_the_optimizer_warms_up_then_follows_the_cosine_and_clips():
    config = ConfigDict(
        {"weight_decay": 0.0, "clip_norm": 1.0, "schedule": "cosine", "warmup": 0.2}
    )
    optimizer = make_optimizer(config, 1.0, 10)
    params, state, rates = jnp.zeros(1), optimizer.init(jnp.zeros(1)), []
    for _ in range(10):
        update, state = optimizer.update(jnp.ones(1), state, params)
        rates.append(-float(update[0]))  # Adam's step on a constant gradient is the rate
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(8) / 8))
    np.testing.assert_allclose(rates, [0, 0.5, *cosine], atol=1e-4)


def test_difficulty_tiers_are_equal_parts_of_every_class_from_easy_to_hard():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1], [103, 20]))
    probability = rng.random(123) * np.where(labels == 0, 1.0, 0.1)
    config = ConfigDict({"task_by": "difficulty", "num_tasks": 4})
    tier = curriculum.assign_tasks(probability, labels, config)
    for label, sizes in ((0, [26, 26, 26, 25]), (1, [5, 5, 5, 5])):
        assert np.bincount(tier[labels == label]).tolist() == sizes
        p, t = probability[labels == label], tier[labels == label]
        assert all(p[t == k].min() > p[t == k + 1].max() for k in range(3))


def test_tasks_by_class_start_with_the_class_that_the_teacher_knows_best():
    labels = np.array([0, 0, 1, 1, 2, 2])
    probability = np.array([0.5, 0.5, 0.9, 0.9, 0.1, 0.1])
    config = ConfigDict({"task_by": "class"})
    assert curriculum.assign_tasks(probability, labels, config).tolist() == [1, 1, 0, 0, 2, 2]


def test_the_policy_favours_easy_tasks_before_any_reward():
    observation = jnp.ones(5)
    policy = Policy(4, easy_bias=2.0)
    logits = policy.apply(policy.init(RNG, observation), observation)
    np.testing.assert_allclose(logits, np.linspace(1, -1, 4), atol=1e-6)
