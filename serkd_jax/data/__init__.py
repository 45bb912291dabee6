"""Corpora, audio and feature records, splits: the only part that imports TensorFlow."""
