"""Command lines: `python -m foldcc`."""
