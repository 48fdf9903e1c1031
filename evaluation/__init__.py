"""Evaluation: metrics of tokenizers, priors and samples, each with a receipt; reports of runs."""
