"""The page to play with: vqgen-app."""
