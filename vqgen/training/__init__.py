"""Shared by both training programs: run, training loop, checkpoints, optimizers and logs."""
