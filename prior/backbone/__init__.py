"""The causal LM of transformers behind a prior: its configuration, the network, and its weights alone."""
