"""Stage two: an autoregressive transformer over code sequences."""
