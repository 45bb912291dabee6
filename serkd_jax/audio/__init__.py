"""Waveforms: decoding, checks and log-mel frames, in NumPy, without JAX and TensorFlow."""
