"""Corpora, audio records and feature records; only records and features need TensorFlow."""
