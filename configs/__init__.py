"""Presets, found by name: `--config NAME` reads NAME.yaml from this folder."""
