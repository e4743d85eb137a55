"""Model files: ours, the published ones, exports, and the safe reading of HDF5."""
