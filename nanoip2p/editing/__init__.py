"""Many edits in one call: batches, turns, grids and sweeps."""
