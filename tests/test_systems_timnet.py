"""TIM-Net: what each level has heard, its gates, its two directions, its normalisation."""

import jax
import jax.numpy as jnp
import numpy as np

from serkd_jax.models.students.timnet import Stack
from tiny_students import count, random_inputs, random_variables, tiny

STACK = Stack(6, 4, 0.1, None, None)


def test_its_sizes_are_those_of_the_original():
    assert count("timnet", 4, 606, 39) == (129_650, 3_120)
    assert count("timnet", 4, 606, 39, num_levels=8) == (104_376, 2_496)
    assert count("timnet", 4, 326, 1024) == (206_480, 3_120)


def alone(params, stats, x):
    """The sum over levels of a stack's weighted means, for one recording, frame by frame."""
    x, total = x @ params["embed"]["kernel"] + params["embed"]["bias"], 0
    for level, weight in enumerate(params["level_weights"]):
        gate = x
        for part in range(2):
            conv, norm = (params[f"{what}_{level}_{part}"] for what in ("conv", "norm"))
            running = stats[f"norm_{level}_{part}"]
            new = np.zeros_like(gate)
            for t in range(len(gate)):
                before = gate[t - 2**level] if t >= 2**level else np.zeros_like(gate[0])
                z = before @ conv["kernel"][0] + gate[t] @ conv["kernel"][1] + conv["bias"]
                z = (z - running["mean"]) / np.sqrt(running["var"] + 0.001)
                new[t] = np.maximum(z * norm["scale"] + norm["bias"], 0)
            gate = new
        x = x / (1 + np.exp(-gate))
        total = total + weight * x.mean(0)
    return total


def test_it_is_the_loop_over_frames_for_each_recording_by_itself():
    model, (features, num_frames) = tiny("timnet", num_levels=3), random_inputs(4, 9, 5)
    variables = random_variables(model, features, num_frames)
    params, stats = variables["params"], variables["batch_stats"]
    stats = {name: jax.tree.map(np.abs, each) for name, each in stats.items()}  # variances are
    weights = {"level_weights": params["level_weights"]}
    expected = [
        alone(params["forward"] | weights, stats["forward"], x[:n])
        + alone(params["backward"] | weights, stats["backward"], x[:n][::-1])
        for x, n in zip(features, num_frames, strict=True)
    ]
    out = model.apply({"params": params, "batch_stats": stats}, features, num_frames)
    np.testing.assert_allclose(out.hidden, expected, atol=1e-5)


def test_a_level_has_heard_twice_as_much_as_the_one_below_and_nothing_of_the_future():
    """A frame of NaN in each of the copies shows in all that depends on it."""
    frames = 40
    features, valid = np.ones((frames, frames, 5), np.float32), np.ones((frames, frames), bool)
    features[np.arange(frames), np.arange(frames)] = np.nan
    variables = random_variables(STACK, features, valid, None)
    age = np.arange(frames) - np.arange(frames)[:, None]
    for level, output in enumerate(STACK.apply(variables, features, valid, None), start=1):
        heard = np.isnan(output).any(2)
        np.testing.assert_array_equal(heard, (age >= 0) & (age <= 2 ** (level + 1) - 2))


def test_without_convolutions_every_gate_is_a_half():
    model, inputs = tiny("timnet", num_levels=3), random_inputs(3, 9, 5)
    variables = random_variables(model, *inputs)
    params, stats = variables["params"], variables["batch_stats"]
    for name in ("forward", "backward"):
        for part, values in params[name].items():
            if part != "embed":  # a norm leaves a 0 as it is
                values.update(jax.tree.map(np.zeros_like, values))
        stats[name] = jax.tree.map(np.zeros_like, stats[name])
    mean = np.stack([x[:n].mean(0) for x, n in zip(*inputs, strict=True)])
    start = sum(
        mean @ params[name]["embed"]["kernel"] + params[name]["embed"]["bias"]
        for name in ("forward", "backward")
    )
    expected = sum(w * start / 2**j for j, w in enumerate(params["level_weights"], start=1))
    np.testing.assert_allclose(model.apply(variables, *inputs).hidden, expected, atol=1e-6)


def test_the_other_direction_is_the_same_network_from_the_end_of_the_recording():
    model, (features, num_frames) = tiny("timnet", num_levels=3), random_inputs(4, 9, 5)
    variables = random_variables(model, features, num_frames)
    turned = features.copy()
    for row, n in zip(turned, num_frames, strict=True):
        row[:n] = row[:n][::-1]

    def swapped(part):
        return part | {"forward": part["backward"], "backward": part["forward"]}

    expected = model.apply(variables, features, num_frames).logits
    other = jax.tree.map(np.asarray, {name: swapped(part) for name, part in variables.items()})
    np.testing.assert_allclose(model.apply(other, turned, num_frames).logits, expected, atol=1e-5)
    unturned = model.apply(other, features, num_frames).logits
    assert np.abs(unturned - expected).max() > 1e-3


def test_dropout_takes_whole_channels():
    """Of convolutions of 0, a norm leaves its bias, so that a gate shows what was dropped."""
    stack = Stack(50, 1, 0.5, None, None)
    features, valid = np.ones((4, 7, 5), np.float32), np.ones((4, 7), bool)
    variables = random_variables(stack, features, valid, None)
    for name, values in variables["params"].items():
        if name.startswith("conv"):
            values.update(jax.tree.map(np.zeros_like, values))
        elif name.startswith("norm"):
            values["bias"] = np.full(50, 0.7, np.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    (level,), _ = stack.apply(variables, features, valid, keys, mutable="batch_stats")
    embed = variables["params"]["embed"]
    gates = np.asarray(level) / (features @ embed["kernel"] + embed["bias"])
    assert np.ptp(gates, axis=1).max() < 1e-5
    kept = gates[:, 0] > 0.6
    expected = np.where(kept, jax.nn.sigmoid(0.7 / 0.5), 0.5)
    np.testing.assert_allclose(gates[:, 0], expected, atol=1e-5)
    assert 0.3 < kept.mean() < 0.7
    assert kept.any(0).mean() > 0.7, "each example has its own"


def test_its_statistics_follow_those_of_the_valid_frames():
    features, num_frames = random_inputs(4, 9, 5)
    valid = np.arange(9) < num_frames[:, None]
    variables = random_variables(STACK, features, valid, None)
    keys = jax.random.split(jax.random.key(0), 4)
    found = []
    for padding in (0, 9):
        filled = np.where(valid[..., None], features, padding)
        levels, changed = STACK.apply(variables, filled, valid, keys, mutable="batch_stats")
        found.append((np.asarray(levels[-1])[valid], changed["batch_stats"]))
    jax.tree.map(np.testing.assert_array_equal, *found)

    conv, stats = variables["params"]["conv_0_0"], variables["batch_stats"]["norm_0_0"]
    embed = variables["params"]["embed"]
    x = jnp.where(valid[..., None], features @ embed["kernel"] + embed["bias"], 0)
    before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
    x = (before @ conv["kernel"][0] + x @ conv["kernel"][1] + conv["bias"])[valid]
    for name, value in (("mean", x.mean(0)), ("var", x.var(0))):
        expected = 0.99 * stats[name] + 0.01 * value
        np.testing.assert_allclose(found[0][1]["norm_0_0"][name], expected, atol=1e-6)
