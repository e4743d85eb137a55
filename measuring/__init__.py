"""What `evaluation.py` uses beside `metrics.py`: views, calibration, mean maps, corruptions, groups, a matrix."""
