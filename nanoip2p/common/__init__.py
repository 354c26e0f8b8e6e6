"""Helpers that all folders use: files, command lines, config.json, devices, plots."""
