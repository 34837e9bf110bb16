"""Triton code generation: nothing is emitted yet."""
