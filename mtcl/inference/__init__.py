"""Predict images without labels with a trained model."""

from mtcl.inference.image_reading import MAX_PIXELS, load_image
from mtcl.inference.predictor import Predictor

__all__ = [
    "MAX_PIXELS",
    "Predictor",
    "load_image",
]
