"""Datasets: NYUD-v2, PASCAL-Context and the built-in rooms."""
