"""Every stage's step: one device against eight, and that it learns; the curriculum's tasks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from ml_collections import ConfigDict

from serkd_jax import losses
from serkd_jax.data.examples import Examples
from serkd_jax.distributed import parallel
from serkd_jax.encoders.wav2vec2 import Wav2Vec2Layers
from serkd_jax.models.policy import Policy
from serkd_jax.stages import curriculum
from serkd_jax.stages.augmentation import example_keys, spec_augment
from serkd_jax.stages.base import make_optimizer, make_schedule
from serkd_jax.stages.standardization import standardize
from tiny_stages import (
    CLASSIFIER,
    HUBERT,
    POLICY,
    POLICY_OPTIMIZER,
    RNG,
    STATISTICS,
    STUDENT,
    TEACHER,
    B,
    K,
    N,
    changed,
    curriculum_stage,
    distill_stage,
    make_batch,
    student_stage,
    teacher_stage,
    waveform_teacher_stage,
)

STAGES = {
    "teacher": teacher_stage,
    "waveform_teacher": waveform_teacher_stage,
    "student": student_stage,
    "distill": distill_stage,
    "distill_forward": partial(
        distill_stage,
        changed(meta={"order": "second_order_forward"}),
        STUDENT.clone(readout="tokens"),  # and so with an adapter
    ),
    "curriculum": curriculum_stage,
}


STEPS = 9  # the queue wraps around and two episodes of the policy end


def corpus(batch):
    """The batches of all steps as the columns of a corpus, and the rows of each step."""
    batches = [batch(seed) for seed in range(STEPS)]
    parts = ("train", "quiz") if "train" in batches[0] else ("",)
    found = [one[part] if part else one for part in parts for one in batches]
    columns = {name: np.concatenate([one[name] for one in found]) for name in found[0]}
    rows = np.arange(len(parts) * STEPS * B).reshape(len(parts), STEPS, B)
    return columns, dict(zip(parts, rows, strict=True)) if parts[0] else rows[0]


def run(name, num_devices, *, dispatches=(STEPS,), streamed=False):
    """The steps of a stage, so many in each dispatch; returns the state and each step's metrics."""
    make_step, init, batch = STAGES[name]()
    devices = jax.devices()[:num_devices]
    columns, rows = corpus(batch)
    options = {"shared_data": not streamed}
    if name == "curriculum":  # the tasks' batches hold the same examples in other orders
        tasks = [np.random.default_rng(task).permutation(B) for task in range(K)]
        rows["train"] = rows["train"][:, np.stack(tasks)]
        options["pick"] = curriculum.CurriculumStage.pick
    steps = parallel.compile_steps(make_step, devices, **options)
    if streamed:
        inputs = columns.pop("inputs")
        examples = Examples(columns, devices, lambda rows: inputs[rows])
    else:
        examples = Examples({}, devices).with_columns(**columns)
    # A copy: the steps donate their state.
    state, history, start = parallel.replicate(jax.tree.map(jnp.array, init()), devices), [], 0
    for count in dispatches:
        places = np.arange(start, start + STEPS) % STEPS  # what is after count is not used
        data, taken = examples.take(jax.tree.map(lambda x, places=places: x[places], rows))
        state, metrics = steps(state, data, taken, np.int32(count), RNG)
        history += [{k: float(v[i]) for k, v in metrics.items()} for i in range(count)]
        start += count
    assert start == STEPS
    return state, history


def as_arrays(state):
    """All leaves as float arrays; optimiser counters and queue positions included."""
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(state)]


@pytest.mark.parametrize("name", STAGES)
def test_eight_devices_take_the_same_steps_as_one(name):
    one, metrics_of_one = run(name, 1)
    eight, metrics_of_eight = run(name, 8)
    for a, b in zip(as_arrays(one), as_arrays(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    for a, b in zip(metrics_of_one, metrics_of_eight, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("name", ["student", "curriculum"])
def test_steps_do_not_depend_on_how_they_are_dispatched_or_where_the_examples_are(
    name, num_devices
):
    expected, metrics = run(name, num_devices)
    for options in ({"dispatches": (4, 1, 3, 1)}, {"streamed": True}):
        actual, others = run(name, num_devices, **options)
        assert metrics == others
        jax.tree.map(np.testing.assert_array_equal, expected, actual)


def test_dispatches_of_any_length_are_compiled_once(monkeypatch):
    make_step, init, batch = student_stage()
    traced = []

    def make_counted(axis):
        return lambda *args: traced.append(axis) or make_step(axis)(*args)

    monkeypatch.setitem(STAGES, "counted", lambda: (make_counted, init, batch))
    run("counted", 1, dispatches=(4, 1, 3, 1))
    assert len(traced) == 1


def test_a_loop_of_steps_takes_the_steps_one_by_one():
    make_step, init, batch = distill_stage()
    step, state = jax.jit(make_step()), init()
    for seed in range(STEPS):
        state, _ = step(state, batch(seed), RNG)
    for a, b in zip(as_arrays(run("distill", 1)[0]), as_arrays(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", STAGES)
def test_every_trained_parameter_moves_and_every_frozen_one_stays(name):
    make_step, init, batch = STAGES[name]()
    before = init()
    after, _ = jax.jit(make_step())(before, batch(0), RNG)
    for field in ("params", "meta_params", "momentum_params", "frozen"):
        if not hasattr(before, field):
            continue
        pairs = zip(*(jax.tree.leaves(getattr(s, field)) for s in (before, after)), strict=True)
        moved = [bool(np.any(a != b)) for a, b in pairs]
        if field == "frozen":
            assert moved
            assert not any(moved)
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


def test_an_episode_is_what_was_seen_done_and_earned_and_moves_the_policy_by_reinforce():
    """Two episodes watched from outside, then the updates written from Williams (1992).

    The first sets the baseline, against which the second is held.
    """
    make_step, init, batch = curriculum_stage()
    step, state = jax.jit(make_step()), init()
    seen, done, earned, policies = [], [], [], []
    accuracy, running_reward = np.zeros(K), np.zeros(K)
    for seed in range(8):
        if seed % 4 == 0:
            policies.append((state.policy_params, state.policy_opt_state))
        seen.append(np.asarray(state.observation))
        done.append(task := int(state.task))
        state, metrics = step(state, batch(seed), RNG)
        earned.append(float(metrics["reward"]))
        assert metrics["task"] == task
        accuracy[task] += 0.1 * (float(metrics["accuracy"]) - accuracy[task])
        running_reward[task] += 0.1 * (earned[-1] - running_reward[task])
        np.testing.assert_allclose(state.observation[N : N + K], accuracy, rtol=1e-5)
        np.testing.assert_allclose(state.observation[N + K : -1], running_reward, rtol=1e-5)
        assert state.observation[-1] == pytest.approx((seed + 1) / 50)
    policies.append((state.policy_params, state.policy_opt_state))
    first, second = (
        np.array(
            [sum(0.9 ** (u - t) * earned[u] for u in range(t, end)) for t in range(end - 4, end)]
        )
        for end in (4, 8)
    )
    np.testing.assert_allclose(state.baseline, 0.9 * first + 0.1 * second, rtol=1e-5)
    advantages = second - first

    def objective(params):
        logits = POLICY.apply({"params": params}, np.stack(seen[4:]))
        log_probability = jax.nn.log_softmax(logits)[np.arange(4), np.array(done[4:])]
        return -(log_probability * advantages).mean()

    for k, gradient in enumerate((lambda p: jax.tree.map(jnp.zeros_like, p), jax.grad(objective))):
        params, opt_state = policies[k]
        updates, _ = POLICY_OPTIMIZER.update(gradient(params), opt_state, params)
        expected = optax.apply_updates(params, updates)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), policies[k + 1][0], expected
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
        standardize(examples["inputs"], examples["length"], STATISTICS),
        examples["length"],
        3,
        3,
    )
    expected = STUDENT.apply({"params": other}, masked, examples["length"]).projection
    np.testing.assert_allclose(keys, expected, atol=1e-5)


def test_the_teacher_has_dropout_and_masks_of_each_steps_and_each_examples_own():
    quiet = {f"{name}_dropout": 0.0 for name in ("hidden", "attention", "activation")}
    without = TEACHER.clone(encoder=Wav2Vec2Layers(type(HUBERT)(**HUBERT.to_dict() | quiet)))
    for width, model in ((0, TEACHER), (12, without)):  # dropout alone, masks alone
        masks = {"max_frequency_mask": width, "max_time_mask": width}
        make_step, init, batch = teacher_stage(changed(teacher=masks), model)
        step, state, examples = jax.jit(make_step()), init(), batch(0)
        others = examples | {"index": examples["index"] + 1}
        changes = [(state.replace(step=state.step + 1), examples), (state, others)]
        first, again, *changed_losses = (
            step(*given, RNG)[1]["loss"] for given in [(state, examples)] * 2 + changes
        )
        assert first == again
        assert all(abs(loss - first) > 1e-4 for loss in changed_losses)


@pytest.mark.parametrize(
    ("make_stage", "own"),
    [
        (student_stage, []),
        (distill_stage, ["soft", "patient"]),
        (curriculum_stage, ["consistency"]),
    ],
    ids=["student", "distill", "curriculum"],
)
def test_the_query_has_dropout_and_its_key_masks_of_each_steps_and_each_examples_own(
    make_stage, own
):
    """Masks change the contrastive loss, through the keys, and no other part of the loss."""
    metrics = []
    for width in (0, 6):
        masks = {"max_frequency_mask": width, "max_time_mask": width}
        config = changed(contrastive=masks, meta={"order": "none"})
        make_step, init, batch = make_stage(config)
        step, state, examples = jax.jit(make_step()), init(), batch(0)
        after, first = step(state, examples, RNG)
        metrics.append(first)
        train = examples.get("train", examples)
        others = train | {"index": train["index"] + 1}
        others = examples | {"train": others} if "train" in examples else others
        for given in ((state.replace(step=state.step + 1), examples), (state, others)):
            other, changed_metrics = step(*given, RNG)
            assert abs(first["cross_entropy"] - changed_metrics["cross_entropy"]) > 1e-4
            assert (jnp.abs(other.queue.keys - after.queue.keys).max() > 1e-3) == (width > 0)
    clean, masked = metrics
    parts = ["cross_entropy", "accuracy", *own]
    np.testing.assert_allclose(
        [masked[part] for part in parts], [clean[part] for part in parts], rtol=1e-6
    )
    assert abs(clean["contrastive"] - masked["contrastive"]) > 1e-3


def test_the_policy_finds_the_task_that_pays_against_its_first_bias():
    """The student beats the teacher on the quiz after batches of the last task alone."""
    make_step, init, _ = curriculum_stage()
    step, state = jax.jit(make_step()), init()
    train, hidden = make_batch(0), 1000 * make_batch(0)["teacher_hidden"]  # T' is sure of a class
    logits = CLASSIFIER.apply({"params": state.frozen.meta_params}, hidden)
    quizzes = {
        pays: train | {"teacher_hidden": hidden, "label": np.asarray(label, np.int32)}
        for pays, label in ((True, logits.argmin(-1)), (False, logits.argmax(-1)))
    }
    tasks, rewards = [], []
    for _ in range(600):
        tasks.append(int(state.task))
        state, metrics = step(state, {"train": train, "quiz": quizzes[tasks[-1] == K - 1]}, RNG)
        rewards.append(float(metrics["reward"]))
    assert rewards == [float(task == K - 1) for task in tasks]
    assert np.mean(rewards[:40]) < 0.35
    assert np.mean(rewards[-100:]) > 0.9


def test_uniform_sampling_takes_any_task_and_changes_nothing_else():
    _, init, batch = curriculum_stage()
    start, rngs = init(), jax.random.split(RNG, 400)
    first_bias = np.exp(np.linspace(1, -1, K))
    expected = {"policy": first_bias / first_bias.sum(), "uniform": np.full(K, 1 / K)}
    after = {}
    for sampling, shares in expected.items():
        step = curriculum_stage(changed(curriculum={"sampling": sampling}))[0]()
        tasks = jax.jit(jax.vmap(lambda rng, step=step: step(start, batch(0), rng)[0].task))(rngs)
        np.testing.assert_allclose(np.bincount(tasks, minlength=K) / 400, shares, atol=0.07)
        compiled, states = jax.jit(step), [start]
        for seed in range(8):
            states.append(compiled(states[-1], batch(seed), RNG)[0])
        after[sampling] = states[1].replace(task=None)
        first, last = (as_arrays(states[i].policy_params) for i in (0, -1))
        assert all(map(np.array_equal, first, last)) == (sampling == "uniform")
    jax.tree.map(np.testing.assert_array_equal, after["policy"], after["uniform"])


@pytest.mark.parametrize(
    ("name", "decayed", "schedule", "clip_norm"),
    [
        ("adamw", "kernels", "cosine", 1.0),
        ("adamw", "all", "cosine", 1.0),
        ("adamw", "all", "constant", 0.0),
        ("adam", "kernels", "cosine", 1.0),
        ("sgd", "kernels", "constant", 1.0),
    ],
)
def test_the_optimizer_is_torchs_of_clipped_gradients_at_the_scheduled_rate(
    name, decayed, schedule, clip_norm
):
    """Every other gradient is above the limit, so that Adam's moments show if it is clipped."""
    settings = {"name": name, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1, "final": 0.0}
    settings |= {"decayed": decayed, "clip_norm": clip_norm, "schedule": schedule}
    config = ConfigDict(settings | {"warmup": 0.2, "first_cycle": 0.0})
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(8) / 8))
    rates = 0.05 * np.array([0, 0.5, *(cosine if schedule == "cosine" else np.ones(8))])

    rng = np.random.default_rng(0)
    params = {
        "embed": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)},
        "layer_norm": {"scale": rng.normal(size=3), "bias": rng.normal(size=3)},
        "variate_embedding": rng.normal(size=(4, 3)),
    }
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(params), strict=True)
    theirs = [torch.tensor(x) for x in leaves]
    decays = [0.1 if decayed == "all" or "kernel" in str(path) else 0.0 for path in paths]
    groups = [
        {"params": [x], "weight_decay": decay} for x, decay in zip(theirs, decays, strict=True)
    ]
    make = {
        "adamw": partial(torch.optim.AdamW, betas=(0.8, 0.95)),
        "adam": partial(torch.optim.Adam, betas=(0.8, 0.95)),
        "sgd": partial(torch.optim.SGD, momentum=0.8),
    }
    reference = make[name](groups)
    with jax.enable_x64(True):
        optimizer = make_optimizer(config, 0.05, len(rates))
        update, state = jax.jit(optimizer.update), optimizer.init(params)
        for step, rate in enumerate(rates):
            norm = (0.3, 5.0)[step % 2]
            gradients = [rng.normal(size=x.shape) for x in leaves]
            scale = norm / np.linalg.norm(np.concatenate([x.ravel() for x in gradients]))
            gradients = [scale * x for x in gradients]
            updates, state = update(
                jax.tree.unflatten(jax.tree.structure(params), gradients), state, params
            )
            params = optax.apply_updates(params, updates)
            for x, gradient in zip(theirs, gradients, strict=True):
                x.grad = torch.tensor(gradient)
            if clip_norm:
                torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
            for group in reference.param_groups:
                group["lr"] = rate
            reference.step()
            for path, ours, x in zip(paths, jax.tree.leaves(params), theirs, strict=True):
                np.testing.assert_allclose(ours, x, rtol=0, atol=1e-7, err_msg=f"{step} {path}")


def test_a_cosine_starts_again_after_twice_as_many_steps_each_time_as_torchs():
    config = ConfigDict({"schedule": "cosine", "warmup": 0.0, "first_cycle": 0.1, "final": 0.02})
    schedule = make_schedule(config, 0.5, 30)
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.5)
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts
    scheduler, rates = restarts(optimizer, 3, 2, eta_min=0.01), []
    for _ in range(30):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose([schedule(step) for step in range(30)], rates, rtol=1e-5)
    assert [step for step in range(30) if rates[step] == 0.5] == [0, 3, 9, 21]


DIFFICULTY = ConfigDict({"task_by": "difficulty", "num_tasks": 4})


def test_difficulty_tiers_are_equal_parts_of_every_class_from_easy_to_hard():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1], [103, 20]))
    margins = rng.normal(size=123) - np.where(labels == 0, 0, 5)
    tier = curriculum.assign_tasks(margins, labels, DIFFICULTY)
    for label, sizes in ((0, [26, 26, 26, 25]), (1, [5, 5, 5, 5])):
        assert np.bincount(tier[labels == label]).tolist() == sizes
        m, t = margins[labels == label], tier[labels == label]
        assert all(m[t == k].min() > m[t == k + 1].max() for k in range(3))


def test_difficulty_tiers_rank_examples_of_which_the_meta_teacher_is_certain():
    """Float32 says 1 of each; by probability, they would be dealt by their place in the corpus."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 3)).astype(np.float32)
    logits[:, 0] += rng.permutation(np.linspace(20, 60, 40, dtype=np.float32))
    labels = np.zeros(40, np.int32)
    assert (jax.nn.softmax(logits)[:, 0] == 1).all()
    margins = np.asarray(losses.true_class_margin(logits, labels))
    assert len(np.unique(margins)) == 40
    tier = curriculum.assign_tasks(margins, labels, DIFFICULTY)
    others = np.exp(logits[:, 1:].astype(np.float64) - logits[:, :1]).sum(1)  # odds against
    np.testing.assert_array_equal(tier[np.argsort(others)], np.repeat(np.arange(4), 10))


def test_tasks_by_class_start_with_the_class_that_the_teacher_knows_best():
    labels = np.array([0, 0, 1, 1, 2, 2])
    margins = np.array([0.0, 0.1, 2.0, 3.0, -2.0, -1.0])
    config = ConfigDict({"task_by": "class"})
    assert curriculum.assign_tasks(margins, labels, config).tolist() == [1, 1, 0, 0, 2, 2]


def test_the_policy_favours_easy_tasks_before_any_reward():
    observation = jnp.ones(5)
    policy = Policy(4, easy_bias=2.0)
    logits = policy.apply(policy.init(RNG, observation), observation)
    np.testing.assert_allclose(logits, np.linspace(1, -1, 4), atol=1e-6)
