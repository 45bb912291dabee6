"""Corpora, audio records and feature records; only writing these needs TensorFlow."""
