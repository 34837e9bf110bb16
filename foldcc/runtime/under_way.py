"""Under way: a block that moves parameters or gradients starts where it is called, and ends where its results are read.

    v = unshard1(w)         starts its gathers
    y = block0(x)           runs in the meantime
    z = block1(y, v)        waits for them, and for what is made of them

Of reductions one is under way at a time: what they are given lives until they have ended. Those of a block end when those of
the next one have started.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any
from weakref import WeakSet

from torch import fx

from foldcc.ir.program import unshards
from foldcc.ops import record


class UnderWay:
    """A call whose first collectives have started. What reads them runs at its end.

    Attributes:
        adds: some of them are sums.
        readers: who has results of it, each of which is kept for its readers alone.
    """

    def __init__(self, block: fx.GraphModule, args: Sequence[Any]):
        self.known: dict[fx.Node, Any] = {}
        self.left: list[fx.Node] = []
        self.started: dict[fx.Node, Any] = {}
        self.adds = False
        self.readers: WeakSet[Later] = WeakSet()
        given = iter(args)
        for node in block.graph.nodes:
            known = record(node.target)
            if node.op == "placeholder":
                self.known[node] = next(given)
            elif node.op == "output" or not self.known.keys() >= {*node.all_input_nodes}:
                self.left.append(node)
            elif known is not None and known.issue is not None:
                self.started[node] = known.issue(*self._on(node.args))
                self.left.append(node)
                self.adds |= known.adds
            else:
                self.known[node] = self._run(node)
        read = {x for node in self.left for x in node.all_input_nodes}
        self.known = {node: value for node, value in self.known.items() if node in read}

    def _on(self, arguments: Any) -> Any:
        return fx.map_arg(arguments, self.known.__getitem__)

    def _run(self, node: fx.Node) -> Any:
        target: Any = node.target
        return target(*self._on(node.args), **self._on(node.kwargs))

    def end(self) -> None:
        """Gives readers what the block returns."""
        for node in self.left:
            if node.op == "output":
                for reader in self.readers:
                    reader.value = reduce(operator.getitem, reader.path, self._on(node.args[0]))
            elif node in self.started:
                self.known[node] = self.started.pop(node)()
            else:
                self.known[node] = self._run(node)
        self.left, self.known = [], {}


class Later:
    """What a call that is under way returns, or a part of that."""

    def __init__(self, call: UnderWay, path: tuple[Any, ...] = ()):
        self.call, self.path = call, path
        self.value: Any = None
        call.readers.add(self)

    def part(self, i: Any) -> Any:
        return Later(self.call, (*self.path, i)) if self.call.left else self.value[i]

    def now(self) -> Any:
        self.call.end()
        return self.value


class Runner:
    """Gives the values of the nodes of one main graph, in order.

    Args:
        ahead: calls may be under way.
    """

    def __init__(self, main: fx.GraphModule, *, ahead: bool):
        self.main, self.ahead = main, ahead
        self.sums: UnderWay | None = None

    def __call__(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.target is operator.getitem and isinstance(some := values[node.all_input_nodes[0]], Later):
            return some.part(node.args[1])
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _now(values[n]))
        if node.op == "output":
            return args[0]
        of: Any = getattr(self.main, str(node.target)) if node.op == "call_module" else node.target
        if not self.ahead or not unshards(node.target) or node.op != "call_module":
            return of(*args, **kwargs)
        call = UnderWay(of, args)
        if call.adds:
            if self.sums is not None:
                self.sums.end()
            self.sums = call
        return Later(call)


def _now(value: Any) -> Any:
    return value.now() if isinstance(value, Later) else value
