"""Networks of the tokenizer: encoder, decoder and discriminator."""
