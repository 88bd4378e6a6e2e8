"""Draw predictions and measurements as images."""
