"""The measurements behind every number that this project shows."""
