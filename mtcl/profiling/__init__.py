"""Count a model's parameters and operations, and measure time and memory."""
