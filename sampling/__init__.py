"""Sampling: codes drawn from the prior, decoded into images."""
