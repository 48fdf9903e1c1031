"""vqgen-convert, and priors of other projects; their tokenizers are in `tokenizer/convert/`."""
