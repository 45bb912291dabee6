"""Scores of the test predictions, and the tables made from them."""
