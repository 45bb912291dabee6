"""The four training stages, each a state and a pure `step(state, batch, rng)`."""
