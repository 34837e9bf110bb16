"""Triton code generation: regions of a lowered program as kernels whose source people can read.

From the top down:

    emit, kernels, source                     the kernels of a program: found, described, kept as files
    regions, experts, router, plan, rows      which nodes are one kernel
    chains, grouped, launchers, tiles         kernels and their launchers as text
    values, lines                             an element of a node as text, from elements of its operands
    whole_rows, padded, topk                  a row of a node as text, from rows of its operands
    names, dtypes, pointwise, index           what both are made of
"""

from foldcc.codegen.emit import Emit, kernels_of, load_kernels
from foldcc.codegen.kernels import Coverage, Kernel, Kernels

__all__ = ["Coverage", "Emit", "Kernel", "Kernels", "kernels_of", "load_kernels"]
