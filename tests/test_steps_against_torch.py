"""Whole training steps in float64 against torch: Eqs. 1-13, and the meta-gradient.

Every optimiser is plain descent at rate 1, so that how far a parameter moves is its gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_oracle as oracle
from serkd_jax.contrastive import Queue
from serkd_jax.encoders.wav2vec2 import Wav2Vec2Layers
from serkd_jax.stages import teacher as teacher_stages
from tiny_stages import (
    HUBERT,
    RNG,
    STUDENT,
    TEACHER,
    B,
    C,
    D,
    H,
    T,
    changed,
    curriculum_stage,
    distill_stage,
    student_stage,
    teacher_stage,
    to_float64,
)

PLAIN = optax.sgd(1.0)
NO_MASKS = {"max_frequency_mask": 0, "max_time_mask": 0}
MODEL = STUDENT.clone(dropout=0.0)


def started(state):
    """The state in float64 as if in mid-training: T', momentum encoder and queue differ."""
    rng = np.random.default_rng(5)
    keys = rng.normal(size=state.queue.keys.shape)
    queue = Queue(
        keys=jnp.asarray(keys / np.linalg.norm(keys, axis=1, keepdims=True)),
        labels=jnp.asarray(rng.integers(-1, C, len(keys)), jnp.int32),  # -1 is unfilled
        position=jnp.int32(3),
    )
    momentum = jax.tree.map(
        lambda x: x + 0.05 * rng.normal(size=x.shape), to_float64(state.momentum_params)
    )
    return to_float64(state).replace(queue=queue, momentum_params=momentum)


def take_step(stage):
    """One step from a started state; returns both states, the metrics and the batch."""
    make_step, init, make_batch = stage
    with jax.enable_x64(True):
        before, batch = started(init()), make_batch(0)
        after, metrics = jax.jit(make_step())(before, batch, RNG)
        return jax.device_get((before, after, metrics, batch))


def moved(before, after):
    """{torch's name: minus what the parameter moved by}."""
    return oracle.torch_names(jax.tree.map(np.subtract, before, after))


def assert_same_gradient(ours, theirs):
    assert ours.keys() == theirs.keys()
    size = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, gradient in theirs.items():
        np.testing.assert_allclose(
            ours[name], gradient.detach(), rtol=1e-7, atol=1e-7 * size, err_msg=name
        )


def as_torch(batch):
    return {
        "inputs": torch.tensor(batch["inputs"], dtype=torch.float64),
        "label": torch.tensor(batch["label"], dtype=torch.int64),
        "teacher_hidden": torch.tensor(batch["teacher_hidden"], dtype=torch.float64),
    }


@pytest.fixture(scope="module", autouse=True)
def differentiable_twice():
    """Torch's fused attention has no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(scope="module")
def nets():
    return oracle.Nets(
        oracle.InvertedTransformer(MODEL, T, C), oracle.Adapter(D, H), oracle.MetaTeacher(H, C)
    )


def dictionary(nets, before, train):
    """Keys of the momentum encoder for the batch, and the queue's, less the empty slots."""
    momentum = oracle.tensors(before.momentum_params)
    keys = functional_call(nets.student, momentum, train["inputs"])[2].detach()
    labels = torch.cat([train["label"], torch.tensor(np.array(before.queue.labels))])
    keys = torch.cat([keys, torch.tensor(np.array(before.queue.keys))])
    return keys[labels >= 0], labels[labels >= 0]


def assert_moco_follows(nets, config, before, after, student_params, train):
    """The momentum encoder follows the *new* student; the queue takes the keys of the old one."""
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-12),
        after.momentum_params,
        jax.tree.map(
            lambda q, k: torch.lerp(torch.tensor(q), torch.tensor(k), config.contrastive.momentum),
            student_params,
            before.momentum_params,
        ),
    )
    keys, slots = dictionary(nets, before, train)[0][:B], 3 + np.arange(B)
    np.testing.assert_allclose(after.queue.keys[slots], keys, rtol=1e-6)
    np.testing.assert_array_equal(after.queue.labels[slots], train["label"])


def test_the_teacher_takes_a_step_on_equation_1():
    """Of its classifier; tests of HuBERT hold the layers below against torch."""
    quiet = {f"{name}_dropout": 0.0 for name in ("hidden", "attention", "activation")}
    model = TEACHER.clone(encoder=Wav2Vec2Layers(type(HUBERT)(**HUBERT.to_dict() | quiet)))
    config = changed(teacher=NO_MASKS)
    make_step, init, make_batch = teacher_stage(config, model, PLAIN)
    with jax.enable_x64(True):
        before, batch = to_float64(init()), make_batch(0)
        after, metrics = jax.jit(make_step())(before, batch, RNG)
        predict = teacher_stages.make_predict(model, teacher_stages.make_frames(None, False))
        hidden = torch.tensor(np.array(predict(before, batch).hidden))
    params = oracle.tensors(before.params["classifier"])
    logits = functional_call(oracle.MetaTeacher(H, C), params, hidden)
    loss = F.cross_entropy(logits, torch.tensor(batch["label"], dtype=torch.int64))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)
    ours = moved(before.params["classifier"], after.params["classifier"])
    assert_same_gradient(ours, oracle.gradient(loss, params))


@pytest.mark.parametrize("weight", [0.3, 0.0], ids=["with_sup", "cross_entropy_alone"])
def test_the_student_takes_a_step_on_equation_2(nets, weight):
    config = changed(contrastive=NO_MASKS | {"weight": weight})
    before, after, metrics, batch = take_step(student_stage(config, MODEL, PLAIN))
    train, params = as_torch(batch), oracle.tensors(before.params)
    keys = dictionary(nets, before, train)
    _, loss = oracle.student_objective(nets.student, params, train, keys, config.contrastive)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert_same_gradient(moved(before.params, after.params), oracle.gradient(loss, params))
    assert_moco_follows(nets, config, before, after, after.params, train)


def distillation_parameters(before):
    return {part: oracle.tensors(before.params[part]) for part in ("student", "adapter")}


def meta_gradient(nets, config, before, batch):
    """Eq. 9's gradient in T' by torch, with ``create_graph`` through the pilot step."""
    train, quiz = as_torch(batch["train"]), as_torch(batch["quiz"])
    params, meta = distillation_parameters(before), oracle.tensors(before.meta_params)
    keys = dictionary(nets, before, train)
    loss = oracle.distillation_objective(nets, params, meta, train, keys, config)
    second_order = config.meta.order.startswith("second_order")
    pilot = {}
    for part, values in params.items():
        grads = oracle.gradient(loss, values, create_graph=second_order, retain_graph=True)
        rate = config.meta.pilot_learning_rate
        pilot[part] = {name: value - rate * grads[name] for name, value in values.items()}
    return oracle.gradient(oracle.collaborative_objective(nets, pilot, meta, quiz), meta)


def assert_steps_on_equations_9_and_4(nets, config, before, after, metrics, batch):
    """T' first, then the student against the new T'."""
    if config.meta.order == "none":
        jax.tree.map(np.testing.assert_array_equal, after.meta_params, before.meta_params)
    else:
        theirs = meta_gradient(nets, config, before, batch)
        assert_same_gradient(moved(before.meta_params, after.meta_params), theirs)
    train, params = as_torch(batch["train"]), distillation_parameters(before)
    keys, meta = dictionary(nets, before, train), oracle.tensors(after.meta_params)
    loss = oracle.distillation_objective(nets, params, meta, train, keys, config)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)
    for part, values in params.items():
        theirs = oracle.gradient(loss, values, retain_graph=True)
        assert_same_gradient(moved(before.params[part], after.params[part]), theirs)
    assert_moco_follows(nets, config, before, after, after.params["student"], train)


def distill(**settings):
    config = changed(contrastive=NO_MASKS)
    config.update(settings)
    return config, take_step(distill_stage(config, MODEL, PLAIN, PLAIN))


@pytest.fixture(scope="module")
def as_in_the_paper():
    """The step of the default config, before and after."""
    return distill()


def test_distillation_takes_its_steps_on_equations_9_and_4(nets, as_in_the_paper):
    """The meta-gradient is torch's with ``create_graph=True``."""
    config, step = as_in_the_paper
    assert_steps_on_equations_9_and_4(nets, config, *step)


@pytest.mark.parametrize(
    "switch",
    [
        {"distill": {"direction": "student_teacher"}},
        {"distill": {"soft": False}},
        {"distill": {"beta": 0.0}},
        {"contrastive": {"weight": 0.0}},
        {"meta": {"order": "first_order"}},
        {"meta": {"order": "none"}},
    ],
    ids=["literal_kl", "no_soft", "no_pkd", "cross_entropy_alone", "first_order", "no_meta"],
)
def test_an_ablation_changes_what_it_says_and_nothing_else(nets, switch, as_in_the_paper):
    """Each switch has its own place in the oracle's equations."""
    config, (before, after, metrics, batch) = distill(**switch)
    assert_steps_on_equations_9_and_4(nets, config, before, after, metrics, batch)
    _, (_, usual, _, _) = as_in_the_paper
    change = jax.tree.map(lambda a, b: np.abs(a - b).max(), after.params, usual.params)
    assert max(jax.tree.leaves(change)) > 1e-5


def test_the_meta_gradient_by_forward_mode_equals_the_nested_one(as_in_the_paper):
    """To the last digits of float64: both are exact."""
    _, (before, nested, _, _) = as_in_the_paper
    _, (_, forward, _, _) = distill(meta={"order": "second_order_forward"})
    ours, theirs = (moved(before.meta_params, s.meta_params) for s in (forward, nested))
    size = max(np.abs(g).max() for g in theirs.values())
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-12 * size)


def test_the_updated_student_takes_a_step_on_equation_10_and_earns_equation_13(nets):
    config = changed(contrastive=NO_MASKS)
    before, after, metrics, batch = take_step(curriculum_stage(config, MODEL, PLAIN))
    train, quiz = as_torch(batch["train"]), as_torch(batch["quiz"])
    params, adapter = oracle.tensors(before.params), oracle.tensors(before.adapter_params)
    meta, keys = oracle.tensors(before.meta_params), dictionary(nets, before, train)
    output, loss = oracle.student_objective(nets.student, params, train, keys, config.contrastive)
    adapted = functional_call(nets.adapter, adapter, output[0])
    teacher_logits = functional_call(nets.meta, meta, adapted)
    loss = loss + oracle.equation_12(teacher_logits, output[1], train["label"])
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)
    assert_same_gradient(moved(before.params, after.params), oracle.gradient(loss, params))
    assert_moco_follows(nets, config, before, after, after.params, train)
    rows = torch.arange(B)
    _, logits, _ = functional_call(nets.student, oracle.tensors(after.params), quiz["inputs"])
    student = logits.softmax(1)[rows, quiz["label"]]
    logits = functional_call(nets.meta, meta, quiz["teacher_hidden"])
    teacher = logits.softmax(1)[rows, quiz["label"]]
    reward = (student > teacher).double().mean().item()
    assert 0 < reward < 1
    assert metrics["reward"] == pytest.approx(reward)
