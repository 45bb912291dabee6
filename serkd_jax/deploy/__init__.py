"""What is left of a student after training: a folder that runs without checkpoint or TensorFlow."""
