"""The law of types: which operators are legal on operands in which states, and what their results are."""
