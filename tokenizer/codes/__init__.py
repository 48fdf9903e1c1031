"""Code files: their format, and the plan of who writes which."""
