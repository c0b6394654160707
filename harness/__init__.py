"""What makes a run safe and observable. The algorithm does not import it."""
