"""Tokenizers of other projects, converted from and to their files."""
