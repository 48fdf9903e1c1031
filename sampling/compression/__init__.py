"""Compression: the codes of images, stored with the prior's probabilities by a range coder."""
