"""The nano world: painted scenes whose edits have a known right answer."""
