"""The four training stages, each with a state and a pure `step(state, batch, rng)`."""
