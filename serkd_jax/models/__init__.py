"""Flax (linen) models: the teacher, the student and the curriculum policy."""
