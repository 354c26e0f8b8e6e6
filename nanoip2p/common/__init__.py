"""Helpers for the rest of the package: files, command lines, config.json, devices, plots."""
