"""Code files: format, the plan of who writes which, writing, and the degraded or paired images behind their sources."""
