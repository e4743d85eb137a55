"""Data sets: one module each; what they share is in `datasets.shared`."""
