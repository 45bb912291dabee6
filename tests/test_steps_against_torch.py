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
from serkd_jax.encoders.wav2vec2 import Wav2Vec2Layers
from serkd_jax.stages.contrastive import Queue
from tiny_stages import (
    CLASSIFIER,
    HUBERT,
    RNG,
    STATISTICS,
    STUDENT,
    TEACHER,
    B,
    C,
    H,
    N,
    T,
    changed,
    curriculum_stage,
    distill_stage,
    make_adapter,
    student_stage,
    teacher_stage,
    to_float64,
)

PLAIN = optax.sgd(1.0)
NO_MASKS = {"max_frequency_mask": 0, "max_time_mask": 0}
MODEL = STUDENT.clone(dropout=0.0)
MODELS = {
    "variates": MODEL,  # without an adapter, as in the paper
    "tokens": MODEL.clone(readout="tokens", norm="post"),
    "flatten": MODEL.clone(readout="flatten"),
}
EACH_MODEL = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


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
    size = max((gradient.abs().max().item() for gradient in theirs.values()), default=0)
    for name, gradient in theirs.items():
        np.testing.assert_allclose(
            ours[name], gradient.detach(), rtol=1e-7, atol=1e-7 * size, err_msg=name
        )


def as_torch(batch):
    return {
        "features": oracle.standardized(batch["inputs"], batch["length"], STATISTICS),
        "length": torch.tensor(batch["length"]),
        "label": torch.tensor(batch["label"], dtype=torch.int64),
        "teacher_hidden": torch.tensor(batch["teacher_hidden"], dtype=torch.float64),
    }


@pytest.fixture(scope="module", autouse=True)
def differentiable_twice():
    """Torch's fused attention has no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def nets_of(model):
    adapter, width = make_adapter(model)
    return oracle.Nets(
        oracle.InvertedTransformer(model, T, N, C),
        oracle.Adapter(width, H) if adapter else torch.nn.Identity(),
        oracle.MetaTeacher(H, CLASSIFIER.dims, C),
    )


def test_the_paper_needs_no_adapter_and_other_readouts_do():
    adapters = {name: make_adapter(model)[0] for name, model in MODELS.items()}
    assert [name for name, adapter in adapters.items() if adapter] == ["tokens", "flatten"]


def dictionary(nets, before, train):
    """Keys of the momentum encoder for the batch, and the queue's, less the empty slots."""
    momentum = oracle.tensors(before.momentum_params)
    inputs = train["features"], train["length"]
    keys = functional_call(nets.student, momentum, inputs)[2].detach()
    labels = torch.cat([train["label"], torch.tensor(np.array(before.queue.labels))])
    keys = torch.cat([keys, torch.tensor(np.array(before.queue.keys))])
    return keys[labels >= 0], labels[labels >= 0]


def assert_moco_follows(nets, config, before, after, student_params, train):
    """The momentum encoder follows the *new* student; the queue takes the keys of the old one.

    Without a contrastive loss, nothing reads the keys, and they are not computed.
    """
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
    computed = float(config.contrastive.weight > 0)
    np.testing.assert_allclose(after.queue.keys[slots], computed * keys, rtol=1e-6)
    np.testing.assert_array_equal(after.queue.labels[slots], train["label"])


def test_the_teacher_takes_a_step_on_equation_1():
    """Of its projector and classifier; tests of HuBERT hold the layers below against torch."""
    quiet = {f"{name}_dropout": 0.0 for name in ("hidden", "attention", "activation")}
    layers = Wav2Vec2Layers(type(HUBERT)(**HUBERT.to_dict() | quiet))
    model = TEACHER.clone(encoder=layers, projector=10)
    make_step, init, make_batch = teacher_stage(changed(teacher=NO_MASKS), model, PLAIN)
    with jax.enable_x64(True):
        before, batch = to_float64(init()), make_batch(0)
        after, metrics = jax.jit(make_step())(before, batch, RNG)
        features = oracle.standardized(batch["inputs"], batch["length"], STATISTICS).numpy()
        mask = np.arange(T) < batch["length"][:, None]
        below = {k: v for k, v in before.params.items() if k != "projector"}
        below["classifier"] = {"dense_0": {"kernel": np.zeros((H, C)), "bias": np.zeros(C)}}
        bare = model.clone(projector=0, classifier_dims=())
        encoded = jax.jit(bare.apply)({"params": below}, features, mask).hidden
    tail = [before.params[part] for part in ("projector", "classifier")]
    projector, classifier = map(oracle.tensors, tail)
    hidden = functional_call(torch.nn.Linear(H, 10), projector, torch.tensor(np.array(encoded)))
    logits = functional_call(oracle.MetaTeacher(10, TEACHER.classifier_dims, C), classifier, hidden)
    loss = F.cross_entropy(logits, torch.tensor(batch["label"], dtype=torch.int64))
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)
    for part, params in (("projector", projector), ("classifier", classifier)):
        ours = moved(before.params[part], after.params[part])
        assert_same_gradient(ours, oracle.gradient(loss, params, retain_graph=True))


@pytest.mark.parametrize(
    ("model", "weight"),
    [*((model, 0.3) for model in MODELS.values()), (MODEL, 0.0)],
    ids=[*MODELS, "cross_entropy_alone"],
)
def test_the_student_takes_a_step_on_equation_2(model, weight):
    config, nets = changed(contrastive=NO_MASKS | {"weight": weight}), nets_of(model)
    before, after, metrics, batch = take_step(student_stage(config, model, PLAIN))
    train, params = as_torch(batch), oracle.tensors(before.params)
    keys = dictionary(nets, before, train)
    _, loss = oracle.student_objective(nets.student, params, train, keys, config)
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


def distill(model=MODEL, **settings):
    config = changed(contrastive=NO_MASKS)
    config.update(settings)
    return config, take_step(distill_stage(config, model, PLAIN, PLAIN))


@pytest.fixture(scope="module")
def as_in_the_paper():
    """The step of the default config, before and after."""
    return distill()


def test_distillation_takes_its_steps_on_equations_9_and_4(as_in_the_paper):
    """The meta-gradient is torch's with ``create_graph=True``."""
    config, step = as_in_the_paper
    assert_steps_on_equations_9_and_4(nets_of(MODEL), config, *step)


@pytest.mark.parametrize("name", ["tokens", "flatten"])
def test_distillation_through_an_adapter_takes_its_steps_on_equations_9_and_4(name):
    config, step = distill(MODELS[name])
    assert_steps_on_equations_9_and_4(nets_of(MODELS[name]), config, *step)


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
def test_an_ablation_changes_what_it_says_and_nothing_else(switch, as_in_the_paper):
    """Each switch has its own place in the oracle's equations."""
    config, (before, after, metrics, batch) = distill(**switch)
    assert_steps_on_equations_9_and_4(nets_of(MODEL), config, before, after, metrics, batch)
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


def curriculum_gradient(nets, config, before, batch):
    """The loss of Eq. 10 and its gradient; T' of Eq. 12 held or not."""
    train = as_torch(batch["train"])
    params, adapter = oracle.tensors(before.params), oracle.tensors(before.frozen.adapter_params)
    meta, keys = oracle.tensors(before.frozen.meta_params), dictionary(nets, before, train)
    output, loss = oracle.student_objective(nets.student, params, train, keys, config)
    adapted = functional_call(nets.adapter, adapter, output[0])
    teacher_logits = functional_call(nets.meta, meta, adapted)
    if config.curriculum.hold_teacher:
        teacher_logits = teacher_logits.detach()
    loss = loss + oracle.equation_12(teacher_logits, output[1], train["label"])
    return loss.item(), oracle.gradient(loss, params)


@pytest.mark.parametrize(
    ("model", "hold"),
    [*((model, True) for model in MODELS.values()), (MODEL, False)],
    ids=[*MODELS, "teacher_not_held"],
)
def test_the_updated_student_takes_a_step_on_equation_10_and_earns_equation_13(model, hold):
    config = changed(contrastive=NO_MASKS, curriculum={"hold_teacher": hold})
    before, after, metrics, batch = take_step(curriculum_stage(config, model, PLAIN))
    nets = nets_of(model)
    loss, theirs = curriculum_gradient(nets, config, before, batch)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-9)
    assert_same_gradient(moved(before.params, after.params), theirs)
    train, quiz = as_torch(batch["train"]), as_torch(batch["quiz"])
    assert_moco_follows(nets, config, before, after, after.params, train)
    rows, inputs = torch.arange(B), (quiz["features"], quiz["length"])
    _, logits, _ = functional_call(nets.student, oracle.tensors(after.params), inputs)
    student = logits.softmax(1)[rows, quiz["label"]]
    logits = functional_call(
        nets.meta, oracle.tensors(before.frozen.meta_params), quiz["teacher_hidden"]
    )
    teacher = logits.softmax(1)[rows, quiz["label"]]
    reward = (student > teacher).double().mean().item()
    assert 0 < reward < 1
    assert metrics["reward"] == pytest.approx(reward)


def test_a_teacher_that_is_not_held_bends_the_gradient_of_equation_12():
    """Else the two cases above could be one."""
    config = changed(contrastive=NO_MASKS)
    _, init, make_batch = curriculum_stage(config, MODEL, PLAIN)
    with jax.enable_x64(True):
        before = jax.device_get(started(init()))
    nets, batch, gradients = nets_of(MODEL), make_batch(0), []
    for hold in (True, False):
        config.curriculum.hold_teacher = hold
        _, gradient = curriculum_gradient(nets, config, before, batch)
        gradients.append(torch.cat([g.flatten() for g in gradient.values()]))
    held, not_held = gradients
    assert (held - not_held).norm() > 1e-3 * held.norm()
