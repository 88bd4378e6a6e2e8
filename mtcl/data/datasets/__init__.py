"""Datasets: each maps an index to a sample."""
