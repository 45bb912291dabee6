"""Corpora, audio records and feature records; only writing records needs TensorFlow."""
