"""What `evaluation.py` uses beside `metrics.py`: test-time views, calibration, mean maps."""
