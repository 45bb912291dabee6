"""serkd-jax: knowledge distillation for speech emotion recognition in JAX."""
