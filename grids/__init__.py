"""Grids of runs: rows of options, presets, and running many."""
