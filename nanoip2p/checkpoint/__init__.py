"""Checkpoints of Stable Diffusion 1.x and its editors: open, save, convert."""
