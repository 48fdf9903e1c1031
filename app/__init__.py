"""Programs that stand on everything else."""
