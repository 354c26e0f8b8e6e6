"""Scores: edits and captions in the nano world, figure 8, MagicBrush."""
