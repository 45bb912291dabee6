"""Scores of the test predictions, and the tables made of them."""
