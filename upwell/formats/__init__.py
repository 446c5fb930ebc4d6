"""Number formats of the checkpoints, encoded and decoded exactly."""
