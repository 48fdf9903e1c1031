"""Cached decoding: token ids in, token ids out; no images."""
