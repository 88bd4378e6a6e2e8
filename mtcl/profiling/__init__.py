"""Count a model's operations and time it."""
