"""Measurements of what one prior is used for: filling in, larger pictures, translation, text."""
