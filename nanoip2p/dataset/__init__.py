"""Captions, pairs of pictures, and the layouts that datasets come in."""
