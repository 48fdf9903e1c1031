"""Images: where they come from, how they are decoded, and in which batches they are seen."""
