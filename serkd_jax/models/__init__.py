"""Flax (linen) models: HuBERT, the teacher, the student and the curriculum policy."""
