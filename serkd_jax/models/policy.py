"""The curriculum's policy (Section 3.4): an MLP from the student's state to the next task."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Policy(nn.Module):
    """Maps an observation (..., S) to logits (..., K) over the tasks, task 0 being the easiest.

    Attributes:
        num_tasks: K.
        width: width of the hidden layer.
        easy_bias: initial difference between the logits of the easiest and the hardest task. The
            last layer's kernel starts at zero, so that this bias alone decides before any reward.
    """

    num_tasks: int
    width: int = 64
    easy_bias: float = 2.0

    @nn.compact
    def __call__(self, observation: jax.Array) -> jax.Array:
        """Scores the tasks."""
        hidden = nn.relu(nn.Dense(self.width, name="hidden")(observation))

        def favour_easy(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
            del key
            return jnp.linspace(self.easy_bias / 2, -self.easy_bias / 2, shape[0], dtype=dtype)

        return nn.Dense(
            self.num_tasks,
            kernel_init=nn.initializers.zeros,
            bias_init=favour_easy,
            name="tasks",
        )(hidden)
