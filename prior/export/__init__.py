"""vqgen-export: a prior and its tokenizer as a folder for other programs, with a model card."""
