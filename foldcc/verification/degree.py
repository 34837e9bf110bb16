"""How likely is it that two different programs agree? At most degree / prime, in each round.

Over a field, a program is a rational function of its random inputs and of the values of its hashes, which are random and
independent as well; so are a sigmoid and a tanh, of which each value is one fraction of one hash, the rows of a softmax,
but for their sum, and whatever is divided by its own sum. Where two such functions differ, they agree at a random point
with a probability of at most their degree over the prime (Schwartz 1980, Zippel 1979). The degree is that of the products,
times one more than the number of other divisions, whose divisors have to be multiplied out. Two programs that differ do so
first in the argument of a hash, or in a result: both may agree by chance.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from foldcc.ir.program import Program
from foldcc.ops.captured import captured_record
from foldcc.verification.functions import HASHED
from foldcc.verification.meanings import MOVES

_SUMS = {"add", "sub", "rsub", "cat", "stack", "sum", "mean", "cumsum", "where", "masked_fill", "index_add", "scatter_add"}
_NAMES = "exp expm1 rsqrt std linalg_vector_norm logsumexp softmax _softmax log_softmax _log_softmax"
_FRESH = {*HASHED, *_NAMES.split()}


def bound(captured: Program, prime: int, rounds: int) -> float:
    """The largest chance that all rounds miss a difference. A gradient has at most twice the degree of its output."""
    count = _Count()
    count.graph(captured.graph, [1] * len(captured.slots))
    return min(1.0, 4 * count.degree * (1 + count.divisions) / prime) ** rounds


class _Count:
    """Degrees and divisions of a program, calls of blocks included."""

    def __init__(self) -> None:
        self.degree, self.divisions = 1, 0

    def graph(self, graph: fx.GraphModule, entering: list[int]) -> list[int]:
        """The degrees of what a graph returns, for those of what it is given."""
        degrees: dict[fx.Node, Any] = {}
        given = iter(entering)
        for node in graph.graph.nodes:
            if node.op == "placeholder":
                degrees[node] = next(given)
            elif node.op == "call_module":
                degrees[node] = self.graph(graph.get_submodule(str(node.target)), [degrees[a] for a in node.args])
            elif node.op == "output":
                return list(pytree.tree_leaves(fx.map_arg(node.args[0], degrees.__getitem__)))
            elif isinstance(found := degrees.get(node.all_input_nodes[0]) if node.all_input_nodes else None, list):
                degrees[node] = found[node.args[1]]
            else:
                degrees[node] = self.node(node, [degrees[x] for x in node.all_input_nodes] or [0])
                self.degree = max(self.degree, degrees[node])
        raise AssertionError("a graph ends with its output")

    def node(self, node: fx.Node, read: list[int]) -> int:
        name = str(node.target).split(".")[1] if "." in str(node.target) else ""
        value, largest = node.meta.get("val"), max(read)
        if name in _FRESH:
            return 1
        if name in ("silu", "gelu", "elu", "softplus"):
            return largest + 1
        if name == "div" and isinstance(divisor := node.args[1], fx.Node):
            own = divisor
            while own.op == "call_function" and own is not node.args[0] and own.all_input_nodes:
                own = own.all_input_nodes[0]
                if own is node.args[0]:
                    return largest + 1
            self.divisions += divisor.meta["val"].numel()
        if name in ("reciprocal", "floor_divide", "remainder", "fmod"):
            self.divisions += value.numel() if isinstance(value, Tensor) else 1
        if name in ("square", "var"):
            return 2 * largest
        if name == "prod":
            return largest * node.args[0].meta["val"].numel()
        if name == "pow" and isinstance(node.args[1], fx.Node):
            return 1
        if name == "pow":
            return largest * max(1, round(abs(float(node.args[1]))))
        if degree := captured_record(node.target).degree:
            return degree(read)
        if not isinstance(value, Tensor):
            return largest
        return largest if name in _SUMS or name in MOVES else sum(read)
