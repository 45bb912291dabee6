"""Exported students: folders that run without checkpoints and without TensorFlow."""
