"""Dropout: how much it drops, that no two draws are alike, and where it is, as in torch."""

from functools import partial
from itertools import combinations
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from serkd_jax.encoders import ENCODERS, find_encoder
from serkd_jax.encoders.base import EncoderModel
from serkd_jax.encoders.checkpoint import convert_params
from serkd_jax.models.students.inverted import InvertedStudent
from serkd_jax.models.transformer import Dropout
from serkd_jax.programs import Programs
from tiny_config import get_config
from tiny_encoders import encoder_of, random_torch_model, tiny_config, to_numpy, whisper_extractor
from tiny_stages import (
    HUBERT,
    RNG,
    STUDENT,
    TEACHER,
    curriculum_stage,
    distill_stage,
    student_stage,
    teacher_stage,
)
from torch_oracle import FrameTransformer, InvertedTransformer, torch_names


def watch(see):
    """Lets `see` have the path, the rate and the mask of every dropout that a model applies."""

    def intercept(call, args, kwargs, context):
        module = context.module
        if isinstance(module, Dropout) and module.rate and args[1] is not None:
            mask = call(jnp.ones(args[0].shape), args[1]) != 0
            see("/".join(module.path), module.rate, mask)
        return call(*args, **kwargs)

    return nn.intercept_methods(intercept)


def run(apply, *args):
    """A model's output; the rates and the masks of its dropouts, in their order."""
    rates = []

    @jax.jit
    def with_masks(*args):
        masks = []
        with watch(lambda _, rate, mask: rates.append(rate) or masks.append(mask)):
            return apply(*args), masks

    out, masks = with_masks(*args)
    return out, rates, [np.asarray(mask) for mask in masks]


def assert_share(flags, share):
    """As many are set as in all but a millionth of independent draws."""
    low, high = scipy.stats.binom.interval(1 - 1e-6, flags.size, share)
    assert low <= flags.sum() <= high, (flags.mean(), share)


def assert_drawn_apart(masks, rates):
    """Masks of the same shape agree no more than by chance."""
    for (one, p), (other, q) in combinations(zip(masks, rates, strict=True), 2):
        if one.shape == other.shape:
            assert_share(one == other, p * q + (1 - p) * (1 - q))


@pytest.mark.parametrize("rate", [0.1, 0.7])
def test_a_share_of_the_values_survives_scaled_up_and_each_is_drawn_on_its_own(rate):
    x = np.random.default_rng(0).normal(size=(2, 51, 40)).astype(np.float32)
    drop = jax.jit(Dropout(rate).apply)
    keys, other_keys = jax.random.split(jax.random.key(0), (2, 2))
    out, other = np.asarray(drop({}, x, keys)), np.asarray(drop({}, x, other_keys))
    kept = out != 0
    for mask in kept:
        assert_share(mask, 1 - rate)
    np.testing.assert_allclose(out[kept], x[kept] / (1 - rate), rtol=1e-6)
    assert_drawn_apart([*kept, *(other != 0)], 4 * [rate])
    halves = [part for mask in kept for part in (mask[:25], mask[26:])]  # of the same words
    assert_drawn_apart(halves, 4 * [rate])
    np.testing.assert_array_equal(drop({}, x, keys), out)
    np.testing.assert_array_equal(drop({}, x[::-1], keys[::-1]), out[::-1])
    np.testing.assert_array_equal(drop({}, x, None), x)


@pytest.fixture
def replay(monkeypatch):
    """Makes torch drop what our masks drop, in the order of its calls; its rates are its own."""

    def replay(masks):
        masks = iter(masks)

        def dropout(x, p=0.5, training=True, inplace=False):
            if not (p and training):
                return x
            return x * torch.tensor(next(masks)).reshape(x.shape) / (1 - p)

        monkeypatch.setattr(F, "dropout", dropout)
        return masks

    return replay


def assert_masks_are_drawn_apart(rates, masks):
    """In all places of all layers, and for both examples."""
    for mask, rate in zip(masks, rates, strict=True):
        assert_share(mask, 1 - rate)
    by_example = [part for mask in masks for part in mask]
    assert_drawn_apart(by_example, np.repeat(rates, 2))


@pytest.mark.parametrize("kind", ["hubert base", "wavlm large", "whisper 80"])
def test_an_encoder_drops_where_torch_does_and_what_no_other_place_drops(kind, replay):
    """Every place has a rate of its own, which is that of its field in the configuration."""
    if kind == "whisper 80":
        rates, samples = {"dropout": 0.2}, 64 * 320
    else:
        rates, samples = {"hidden_dropout": 0.2, "feat_proj_dropout": 0.5}, 4000
        rates |= {"layerdrop": 0.0, "apply_spec_augment": False}
        # Few convolutions are enough, and compile faster.
        rates |= {"conv_dim": (16, 16), "conv_kernel": (10, 8), "conv_stride": (5, 64)}
    rates |= {"attention_dropout": 0.3, "activation_dropout": 0.4}
    config, encoder = tiny_config(kind, **rates), find_encoder(kind.split()[0])
    oracle = random_torch_model(config)
    oracle.set_attn_implementation("eager")  # the fused one has a dropout of its own
    params = convert_params(encoder, config, to_numpy(oracle))
    waveform = np.random.default_rng(0).normal(0.1, 1, (2, samples)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    model = EncoderModel(encoder, config)
    output, rates, masks = run(
        lambda params: model.apply({"params": params}, waveform, None, keys), params
    )
    assert_masks_are_drawn_apart(rates, masks)

    left = replay(masks)
    inputs = waveform
    if kind == "whisper 80":
        extractor = whisper_extractor(config)
        inputs = extractor(list(waveform), sampling_rate=16_000, max_length=samples)
        inputs = inputs["input_features"]
    with torch.no_grad():
        theirs = encoder_of(oracle).train()(torch.tensor(np.asarray(inputs))).last_hidden_state
    assert next(left, None) is None
    np.testing.assert_allclose(output.last_hidden_state, theirs, atol=1e-4)


@pytest.mark.parametrize("inverted", [True, False])
def test_the_student_drops_after_its_embedding_and_both_parts_of_every_layer(inverted, replay):
    sizes = {"width": 16, "mlp_dim": 12, "num_heads": 2, "num_layers": 2, "dropout": 0.3}
    sizes |= {"classifier_dims": (7,), "projection_dims": (6,), "norm": "post"}
    student = InvertedStudent(3, **sizes, readout="tokens", inverted=inverted)
    features, lengths = np.random.default_rng(0).normal(size=(2, 12, 12)), np.full(2, 12)
    features = features.astype(np.float32)
    params = jax.jit(student.init)(jax.random.key(1), features, lengths)
    keys = jax.random.split(jax.random.key(0), 2)
    output, rates, masks = run(partial(student.apply, params), features, lengths, keys)
    assert rates == [0.3] * (1 + 2 * 2)
    assert_masks_are_drawn_apart(rates, masks)

    left = replay(masks)
    oracle = (InvertedTransformer if inverted else FrameTransformer)(student, 12, 12, 3, 0.3)
    named = torch_names(params["params"])
    oracle.load_state_dict({name: torch.tensor(np.array(x)) for name, x in named.items()})
    theirs = oracle(torch.tensor(features), torch.tensor(lengths))
    assert next(left, None) is None
    for a, b in zip(output, theirs, strict=True):
        np.testing.assert_allclose(a, b.detach(), atol=1e-5)


@pytest.mark.parametrize("kind", ["", *ENCODERS])
def test_the_recipes_rates_are_those_of_all_layers_of_the_teacher_and_the_student(kind):
    config, checkpoint = get_config(), None
    config.student.dropout, config.student.num_layers = 0.4, 3
    config.teacher.update({"dropout": 0.2, "num_layers": 2})
    if kind:
        config.teacher.patch_frames = 0
        variant = "whisper 80" if kind == "whisper" else f"{kind} base"
        checkpoint = SimpleNamespace(kind=find_encoder(kind), config=tiny_config(variant))
    programs = Programs(config, 3, (24, 8), 8, 1, jax.devices()[:1])
    programs.checkpoint = checkpoint
    frames = jnp.zeros((1, 24, 32 if kind else 8))
    used = {}
    for name, model, length in (
        ("teacher", programs.teacher, jnp.ones((1, 24), bool)),
        ("student", programs.student, jnp.ones(1, int)),
    ):
        rates = used[name] = []
        with watch(lambda path, rate, mask, rates=rates: rates.append(rate)):
            jax.eval_shape(model.init, RNG, frames, length, jax.random.split(RNG, 1))
    before = 0 if kind == "whisper" else 1  # Whisper's layers have none before the first
    assert used == {"teacher": [0.2] * (before + 4 * 2), "student": [0.4] * (1 + 2 * 3)}


RATE = 0.4
LAYERS = type(HUBERT)(
    **HUBERT.to_dict() | {f"{name}_dropout": RATE for name in ("hidden", "attention", "activation")}
)


@pytest.mark.parametrize(
    ("make_stage", "model"),
    [
        (teacher_stage, TEACHER.clone(encoder=TEACHER.encoder.clone(config=LAYERS))),
        (student_stage, STUDENT.clone(dropout=RATE)),
        (distill_stage, STUDENT.clone(dropout=RATE)),
        (curriculum_stage, STUDENT.clone(dropout=RATE)),
    ],
    ids=["teacher", "student", "distill", "curriculum"],
)
def test_every_step_of_a_stage_drops_anew_for_every_example_wherever_it_is(make_stage, model):
    make_step, init, make_batch = make_stage(model=model)
    step = make_step()

    @jax.jit
    def masks(count, batch, rng=RNG):
        """Of a step after so many; the program computes nothing else."""
        seen = {}
        with watch(lambda path, rate, mask: seen.update({path: mask})):
            step(init().replace(step=count), batch, rng)
        return seen

    batch = make_batch(0)
    first, later, other = masks(0, batch), masks(1, batch), masks(0, batch, jax.random.key(8))
    assert len(first) == (5 if make_stage is teacher_stage else 3)  # of one layer each
    drawn = [np.asarray(mask) for each in (first, later, other) for mask in each.values()]
    assert_drawn_apart(drawn, len(drawn) * [RATE])
    for mask in first.values():
        assert_drawn_apart(list(np.asarray(mask)), len(mask) * [RATE])
    turned = masks(0, jax.tree.map(lambda x: x[::-1], batch))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[::-1]), first, turned)
