"""Capture: an nn.Module becomes one graph over global shapes, with one node per attention and per set of experts."""

from foldcc.capture.export import capture
from foldcc.capture.modules import register_experts

__all__ = ["capture", "register_experts"]
