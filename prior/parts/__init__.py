"""The parts of a prefix: what sequences are conditioned on, a file for each kind."""
