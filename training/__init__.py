"""What the training engine (`trainer.py`) uses: optimiser, targets, saved state, what a run shows."""
