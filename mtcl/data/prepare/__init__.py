"""Conversion of official releases into the layout that mtcl reads."""
