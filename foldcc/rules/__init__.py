"""Factor rules for ATen operators."""
