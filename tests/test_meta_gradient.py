"""The meta-gradient (Section 3.3): the slope of Eq. 9 through the student's pilot step, in float64.

Torch's ``create_graph=True`` is the other oracle, in `test_steps_against_torch.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from ml_collections import ConfigDict

from serkd_jax.errors import UserError
from serkd_jax.stages import distill
from tiny_stages import RNG, changed, distill_stage, make_pair, to_float64

EXACT = ("second_order", "second_order_forward")


@pytest.fixture(scope="module")
def meta_step():
    """T' as a vector, and (order, T' or none, pilot rate, ...) -> (gradient of Eq. 9, its value).

    T' takes a step of plain unit-rate descent; how far it moves is its gradient.
    """
    plain = optax.sgd(1.0)

    with jax.enable_x64(True):
        state = to_float64(distill_stage(meta_optimizer=plain)[1]())
        start, unflatten = ravel_pytree(state.meta_params)
        start = np.asarray(start)

    @functools.cache
    def compiled(order, rate, soft):
        meta = {"order": order, "pilot_learning_rate": rate}
        config = changed(meta=meta, distill={"soft": soft})
        return jax.jit(distill_stage(config, meta_optimizer=plain)[0]())

    def run(order, meta_vector=start, rate=0.5, soft=True):
        with jax.enable_x64(True):
            before = state.replace(meta_params=unflatten(jnp.asarray(meta_vector)))
            after, metrics = compiled(order, rate, soft)(before, make_pair(0), RNG)
            moved = np.asarray(ravel_pytree(after.meta_params)[0])
            return meta_vector - moved, float(metrics["meta_loss"])

    return start, run


@pytest.mark.parametrize("order", [*EXACT, "first_order"])
def test_on_quadratics_the_meta_gradient_is_the_one_worked_out_by_hand(order):
    """With L = |s - A t|²/2 and L^col = |s+ - y|²/2 + |t|²/2 it is η Aᵀ(s+ - y) + t."""
    rng, rate = np.random.default_rng(0), 0.3
    a, s, t, y = (rng.normal(size=n).astype(np.float32) for n in ((4, 3), 4, 3, 4))
    loss, gradient = distill.meta_value_and_grad(
        ConfigDict({"order": order, "pilot_learning_rate": rate}),
        s,
        t,
        gradient=lambda t: s - a @ t,
        slope_along=lambda v, t: -v @ (a @ t),
        quiz_loss=lambda t, s: jnp.square(s - y).sum() / 2 + jnp.square(t).sum() / 2,
        axis=None,
    )
    pilot = s - rate * (s - a @ t)
    assert loss == pytest.approx((np.square(pilot - y).sum() + np.square(t).sum()) / 2, rel=1e-5)
    through = 0 if order == "first_order" else rate * a.T @ (pilot - y)
    np.testing.assert_allclose(gradient, through + t, rtol=1e-5)


def test_an_order_that_has_no_meta_gradient_is_refused():
    config = ConfigDict({"order": "third_order", "pilot_learning_rate": 1.0})
    parts = dict.fromkeys(("gradient", "slope_along", "quiz_loss", "axis"))
    with pytest.raises(UserError, match="third_order"):
        distill.meta_value_and_grad(config, {}, {}, **parts)


@pytest.mark.parametrize("order", EXACT)
def test_the_meta_gradient_is_the_slope_of_equation_9_through_the_pilot_step(meta_step, order):
    """Central differences along the gradient and along random directions, dropout included."""
    start, run = meta_step
    gradient, _ = run(order)
    rng = np.random.default_rng(0)
    for direction in (gradient, *rng.normal(size=(4, start.size))):
        direction = direction / np.linalg.norm(direction)
        (_, plus), (_, minus) = (run(order, start + e * direction) for e in (1e-5, -1e-5))
        slope = (plus - minus) / 2e-5
        assert gradient @ direction == pytest.approx(slope, rel=1e-4)


def test_the_part_through_the_pilot_step_is_there(meta_step):
    _, run = meta_step
    (second, _), (first, _) = run("second_order"), run("first_order")
    assert np.linalg.norm(second - first) > 0.01 * np.linalg.norm(second)


@pytest.mark.parametrize("order", EXACT)
@pytest.mark.parametrize("without", [{"rate": 0.0}, {"soft": False}], ids=["rate_0", "no_soft"])
def test_it_vanishes_at_pilot_rate_zero_and_without_the_soft_loss(meta_step, order, without):
    """L^soft is the only way from T' to the student."""
    _, run = meta_step
    (exact, _), (first, _) = run(order, **without), run("first_order", **without)
    np.testing.assert_allclose(exact, first, rtol=1e-9, atol=1e-12)
