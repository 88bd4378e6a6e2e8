"""Evaluate a model on labelled images: metrics, saved predictions, feature consistency."""
