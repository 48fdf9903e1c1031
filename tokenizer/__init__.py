"""Stage one: images to grids of discrete codes and back."""
