"""Model files: ours, the published ones, exports; and what reads HDF5 safely."""
