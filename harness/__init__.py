"""What makes a run safe and observable; the algorithm knows nothing of it."""
