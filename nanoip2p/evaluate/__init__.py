"""Evaluation: edits and captions in the nano world, figure 8 of the paper, MagicBrush."""
