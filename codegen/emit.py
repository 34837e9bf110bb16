"""Emit: regions of the lowered program become calls of Triton kernels, whose source is one file that people can read.

    x2 = pow(x, 2)
    v = mean(x2, [-1], True)                        y, scale = input_layernorm(x, weight)
    ...                            becomes
    y = mul(weight, normal)                         # the kernel and its launcher stand in a file, under this name

What no region covers runs as ATen. A kernel computes what its nodes compute, with float32 between them.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, fx

from foldcc.codegen import experts, plan, router, rows, source
from foldcc.codegen.kernels import Kernel, Kernels, counted, described, modules, moved
from foldcc.codegen.regions import Region, chains, in_sequence, is_free, mark_inline
from foldcc.errors import FoldError, require
from foldcc.ir.pipeline import Pass
from foldcc.ir.program import Program
from foldcc.ir.walk import BACKWARD, FORWARD

Finder = Callable[[fx.Graph, set[fx.Node]], list[Region]]
SKELETONS: tuple[Finder, ...] = (experts.find, router.find, plan.find, rows.find)


@dataclass(frozen=True, kw_only=True)
class Emit(Pass):
    """Attributes:
    edited: a module of kernels, from `load_kernels`, that are called in place of the emitted ones of the same names.
    known: names of kernels by what they are, which other kernels do not get.
    """

    requires = frozenset({"lowered"})
    provides = frozenset({"emitted"})
    edited: ModuleType | None = None
    known: Mapping[str, str] = field(default_factory=dict)

    def run(self, program: Program) -> Program:
        names = dict(self.known)
        for main, direction in zip(program.mains, (FORWARD, BACKWARD), strict=False):
            self._emit(program.name, main, direction, names)
        return program

    def _emit(self, program: str, main: fx.GraphModule, direction: str, names: dict[str, str]) -> None:
        """Replaces the regions of every block of a main graph, in place.

        Args:
            names: of kernels by what they are.
        """
        texts: list[str] = []
        calls: list[tuple[fx.GraphModule, str, Region, Kernel]] = []
        for block_name, block in main.named_children():
            assert isinstance(block, fx.GraphModule)
            for found in regions(block.graph):
                what = f"{block_name} {direction} {found.source('kernel')}"
                name = names.setdefault(what, _unique(_named(found, direction), names.values()))
                head, bytes_, flops = described(name, found, block_name, direction)
                text = f"{head}\n{found.source(name)}\n"
                texts.append(text)
                covered = sum((moved(n) for n in found.nodes if counted(n)), 0)
                kernel = Kernel(
                    name=name,
                    key=what,
                    kind=found.kind,
                    block=block_name,
                    direction=direction,
                    nodes=tuple(n.name for n in found.nodes if not is_free(n)),
                    modules=modules(found),
                    source=text,
                    moved=bytes_,
                    flops=flops,
                    covered=covered,
                    path=source.directory(),
                )
                calls.append((block, name, found, kernel))
        if not calls:
            return
        path = source.write(f"{program}_{direction}", "\n\n".join([source.HEAD, *texts]))
        module = source.load(path)
        instead: dict[fx.Node, fx.Node] = {}
        for block, name, found, kernel in calls:
            edited = getattr(self.edited, name, None)
            launcher = getattr(module, name) if edited is None else _checked(edited, found)
            _replace(block.graph, found, launcher, replace(kernel, path=path), instead)
        for block in main.children():
            assert isinstance(block, fx.GraphModule)
            _sort(block.graph)
            block.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
            block.recompile()


def regions(graph: fx.Graph) -> list[Region]:
    """The regions of a graph: what a skeleton takes, then chains of what is left."""
    mark_inline(graph)
    found: list[Region] = []
    for skeleton in SKELETONS:
        for each in skeleton(graph, {n for r in found for n in r.nodes if not is_free(n)}):
            if in_sequence(graph, [*found, each]):
                found.append(each)
    return [*found, *chains(graph, found)]


def kernels_of(program: Program, notes: Sequence[str] = ()) -> Kernels:
    """The kernels of an emitted program, and what is left of it."""
    found: list[Kernel] = []
    left: dict[str, Any] = {}
    for main in program.mains:
        for block in main.children():
            assert isinstance(block, fx.GraphModule)
            for node in block.graph.nodes:
                if "kernel" in node.meta:
                    found.append(node.meta["kernel"])
                elif counted(node):
                    left[str(node.target)] = left.get(str(node.target), 0) + moved(node)
    return Kernels(found, left, notes)


def load_kernels(path: Any) -> ModuleType:
    """Kernels from a file that was emitted, and edited since: pass the result to `parallelize(..., kernels=)`.

    Args:
        path: of the file; `model.kernels[name].path` says where an emitted one is. Functions that keep their names are
            called in place of the emitted ones.

    Raises:
        FoldError: the file is not there, or is no Python.
    """
    require("path", path, (str, PathLike), "the path of a file")
    file = Path(path)
    if not file.is_file():
        raise FoldError(
            f"There is no file of kernels {file}.", valid="model.kernels[name].path of an emitted kernel, or a copy"
        )
    try:
        return source.load(file)
    except SyntaxError as error:
        raise FoldError(f"The kernels in {file} cannot be read: {error}.") from None


def _checked(launcher: Callable[..., Any], found: Region) -> Callable[..., Any]:
    """An edited launcher, which must take and return what its node does."""
    given = list(inspect.signature(launcher).parameters)
    wanted = [n.name for n in found.inputs]
    name = getattr(launcher, "__name__", "kernel")
    if given != wanted:
        raise FoldError(
            f"The edited kernel {name} takes ({', '.join(given)}), and its node gives ({', '.join(wanted)}).",
            valid="the parameters of the emitted launcher, in their order",
        )

    def checked(*tensors: Any) -> Any:
        result = launcher(*tensors)
        results = result if isinstance(result, tuple) else (result,)
        like = [n.meta["val"] for n in found.outputs]
        if len(results) != len(like) or any(not _alike(x, y) for x, y in zip(results, like, strict=True)):
            told = ", ".join(f"{y.dtype} {list(y.shape)}" for y in like)
            raise FoldError(f"The edited kernel {name} returns another type or shape than its node.", valid=told)
        return result

    checked.__name__ = name
    return checked


def _alike(x: Any, like: Any) -> bool:
    known = all(not isinstance(n, int) or n == m for n, m in zip(like.shape, x.shape, strict=False))
    return isinstance(x, Tensor) and x.dtype == like.dtype and x.dim() == like.dim() and known


def _named(found: Region, direction: str) -> str:
    """A name for a kernel: the skeleton's, or the last part of the module that its first node came from."""
    places = modules(found)
    name = found.kind if found.kind not in ("chain", "column_sum") else places[0].split(".")[-1] if places else "main"
    name = re.sub(r"\W", "_", name) + ("_sum" if found.kind == "column_sum" else "")
    name = name if name[:1].isalpha() else f"layer_{name}"
    return f"{name}_backward" if direction == "backward" else name


def _unique(name: str, taken: Collection[str]) -> str:
    return next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in taken)


def _replace(
    graph: fx.Graph, found: Region, launcher: Callable[..., Any], kernel: Kernel, instead: dict[fx.Node, fx.Node]
) -> None:
    """Puts a call of a kernel in place of the nodes that it computes; `_sort` puts it where it belongs.

    Args:
        instead: what stands in place of nodes that were replaced before, which this adds to.
    """
    first = found.nodes[0]
    with graph.inserting_before(first):
        call = graph.call_function(launcher, tuple(instead.get(n, n) for n in found.inputs))
        call.meta = {**found.outputs[0].meta, "kernel": kernel}
        results = [call]
        if len(found.outputs) > 1:
            call.meta["val"] = tuple(n.meta["val"] for n in found.outputs)
            results = [graph.call_function(operator.getitem, (call, i)) for i in range(len(found.outputs))]
            for result, old in zip(results, found.outputs, strict=True):
                result.meta = dict(old.meta)
    for result, old in zip(results, found.outputs, strict=True):
        old.replace_all_uses_with(result)
        instead[old] = result
    for node in reversed(found.nodes):
        if not node.users and not is_free(node):
            graph.erase_node(node)


def _sort(graph: fx.Graph) -> None:
    """Puts every node after what it reads, and otherwise leaves the order as it was."""
    done: set[fx.Node] = set()
    order: list[fx.Node] = []

    def visit(node: fx.Node) -> None:
        left = [node]
        while left:
            top = left[-1]
            missing = [x for x in top.all_input_nodes if x not in done]
            if missing:
                left += reversed(missing)
                continue
            left.pop()
            if top not in done:
                done.add(top)
                order.append(top)

    for node in graph.nodes:
        visit(node)
    last = graph._root
    for node in order:
        last.append(node)
        last = node


__all__ = ["Emit", "kernels_of", "load_kernels", "regions"]
