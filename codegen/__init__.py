"""Triton code generation: regions of a lowered program as kernels whose source people can read."""

from foldcc.codegen.emit import Emit, kernels_of, load_kernels
from foldcc.codegen.kernels import Coverage, Kernel, Kernels

__all__ = ["Coverage", "Emit", "Kernel", "Kernels", "kernels_of", "load_kernels"]
