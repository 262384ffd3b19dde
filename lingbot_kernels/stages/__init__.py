"""Loops around the model."""
