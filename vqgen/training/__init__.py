"""What both training programs share: the run, its loop, checkpoints, optimizers and logs."""
