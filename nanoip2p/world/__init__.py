"""The nano world: rendered scenes with known correct edits."""
