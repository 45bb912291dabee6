"""Flax (linen) models: the teacher, the students and the curriculum's policy."""
