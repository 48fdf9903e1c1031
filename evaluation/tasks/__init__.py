"""Measurements of the uses of a prior (filling in, larger pictures, translation, text), of samples as training images,
and of sampling settings."""
