"""Waveforms: decoding, checks and log-mel frames; NumPy, neither JAX nor TensorFlow."""
