"""Faster versions of the networks, for inference."""
