"""Exact equivalence of a folded program with the captured one, over a finite field."""

from foldcc.verification.proof import Difference, Proof
from foldcc.verification.prove import verify

__all__ = ["Difference", "Proof", "verify"]
