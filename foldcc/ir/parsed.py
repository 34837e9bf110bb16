"""One graph of a text as an fx graph: lines become nodes, and what a line does not say follows from its operator."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from foldcc.ir.names import atom, named
from foldcc.ir.plan import Names
from foldcc.ir.program import Slot
from foldcc.ir.syntax import SLOT, Call, Expression, Line, Section, Text, Value, bad, line_of, typed
from foldcc.ir.text import GRADED, short
from foldcc.layout import Layout
from foldcc.ops.layout import cross_fold, reshard

_DTYPES = {short(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_ENTERS = re.compile(r"(argument|parameter|buffer|constant|input|key|tap|gradient of result) ?(.*)")
_NAME = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^\s,]+")


def declared(text: Text, section: Section) -> list[Line]:
    """The arguments of a graph that are declared where they are read, `mul(%x : f32[8], 2)`."""
    found: dict[str, Line] = {}

    def visit(x: Any, line: Line) -> None:
        for y in (*x.args, *x.kwargs.values()) if isinstance(x, Call) else x if isinstance(x, list) else ():
            visit(y, line)
        if isinstance(x, Value) and x.type and x.name not in found:
            found[x.name] = line_of(text, section, line.number, f"%{x.name} : {x.type} = argument")

    for line in section.lines:
        if not SLOT.match(line.operation):
            visit(Expression(line.operation, line.number, line.text).read(), line)
    return list(found.values())


class Graph:
    """Makes one graph of its text.

    Attributes:
        nodes: by the names of the text; one that means something to Python gets another in the graph.
        blocks: that the graph calls.
        layouts: that are written where the graph returns something, for each of the lists that it returns.
        kept, together: what the plan says of it.
        inside: of a call of a block, and of what is taken out of it, what the block returns there.
    """

    def __init__(self, text: Text, section: Section, sections: Mapping[tuple[str, str], Section]):
        self.text, self.section, self.sections = text, section, sections
        self.graph, self.root = fx.Graph(), torch.nn.Module()
        self.nodes: dict[str, fx.Node] = {}
        self.blocks: dict[str, Graph] = {}
        self.layouts: list[list[Layout | None]] = []
        self.kept: Names | None = None
        self.together: tuple[Names, ...] = ()
        self.inside: dict[fx.Node, Any] = {}
        self.slots: list[Slot] = []
        self.batch_dims: dict[str, int | None] = {}
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        holds = text.holds or frozenset()
        self.main = section.name == "main"
        self.local = "localized" in holds and not self.main
        self.joint = bool(holds & {"joint", "differentiated"})
        self.laid_out = "sharded" in holds
        self.folding = "dispatched" in holds and "localized" not in holds  # some values are one rank's already
        self.sizes = self._data_sizes()

    def _data_sizes(self) -> dict[str, torch.SymInt]:
        """Sizes that data decide, by the names that they have in the text, once blocks are traced."""
        told = [f"{x.size} {x.sizes}" for x in self.section.lines if self.joint]
        numbers = [int(n) for x in told for n in re.findall(r"\bu(\d+)", x)]
        assert self.mode.shape_env is not None
        made = [self.mode.shape_env.create_unbacked_symint() for _ in range(max(numbers, default=-1) + 1)]
        for size in made:
            torch._check(size >= 0)
        return {str(size): size for size in made}

    def build(self) -> fx.GraphModule:
        for line in [*declared(self.text, self.section), *self.section.lines]:
            slot = _ENTERS.fullmatch(line.operation)
            if line.name in self.nodes:
                raise bad(line.number, line.text, f"computes %{line.name} a second time", "another name")
            node = self._entering(line, slot[1], slot[2]) if slot else self._computed(line)
            self.nodes[line.name] = node
            if line.where:
                node.meta["nn_module_stack"] = {line.where: (line.where, "")}
            if line.source:
                node.meta["source"] = line.source
        self._leaving()
        return _LazyGraphModule(self.root, self.graph)

    # --- what enters and leaves ------------------------------------------------------------------

    def _entering(self, line: Line, kind: str, rest: str) -> fx.Node:
        node = self.graph.placeholder(line.name)
        self._carry(node, line)
        value = self._value(line)
        if value is not None:
            node.meta["val"] = value
        elif line.dtype in _DTYPES:
            node.meta["dtype"] = _DTYPES[line.dtype]
        if kind == "gradient of result":
            node.meta["result"] = int(rest)
        elif kind != "argument":
            names, *facts = rest.split(" · ")
            found = tuple(ast.literal_eval(n) if n[0] in "'\"" else n for n in _NAME.findall(names))
            if not found:
                raise bad(line.number, line.text, f"names no {kind}", f"{kind} {line.name}")
            self.slots.append(
                Slot(node.name, kind, found, grad="gradient" in facts or (kind in GRADED and "frozen" not in facts))
            )
            self.batch_dims |= (
                dict.fromkeys(found[:1], atom(facts[-1][8:])) if facts and facts[-1].startswith("samples ") else {}
            )
        return node

    def _leaving(self) -> None:
        section = self.section
        if "return" not in section.leaving:
            raise bad(
                section.number,
                f"{section.name} {section.direction}",
                "begins a graph that returns nothing",
                "a last line return [%name, …]",
            )
        told = self._last("return")
        nested = bool(told) and isinstance(told[0], list)
        if self.joint and "differentiated" not in (self.text.holds or ()) and not (nested or self.main):
            number, line = section.leaving["return"]
            raise bad(
                number,
                f"return {line}",
                "returns no gradients beside its results",
                "return [[%result, …], [%gradient, None, …]]",
            )
        layouts = self.layouts

        def leaf(x: Any) -> Any:
            if isinstance(x, list):
                layouts.append([])
                return tuple(map(leaf, x))
            if layouts:
                own = typed(self.text, *section.leaving["return"], x.type, True) if isinstance(x, Value) and x.type else {}
                layouts[-1].append(own.get("layout"))
            return self._node(x, *section.leaving["return"])

        self.graph.output(leaf(told))
        if self.joint and not self.main and section.direction != "backward":
            for x in told[0] if nested else told:
                self._laid_out(x)
        self.layouts = layouts[1:] if nested else layouts
        if "keep" in section.leaving:
            self.kept = tuple(self.nodes[x.name].name for x in self._last("keep"))
        if "joined" in section.leaving:
            self.together = tuple(map(tuple, self._last("joined")))

    def _laid_out(self, x: Value) -> None:
        """A result has a layout: what its line says in sizes is one too, such as `[]`."""
        line, node = next((y for y in self.section.lines if y.name == x.name), None), self.nodes[x.name]
        if line is not None and line.sizes is not None and x.type is None and "layout" not in node.meta:
            node.meta["layout"] = typed(self.text, line.number, line.text, line.told, enters=True)["layout"]

    def _last(self, word: str) -> Any:
        number, told = self.section.leaving[word]
        return Expression(told, number, f"{word} {told}").read()

    # --- what is computed ------------------------------------------------------------------------

    def _computed(self, line: Line) -> fx.Node:
        expression = Expression(line.operation, line.number, line.text)
        call = expression.read()
        if not isinstance(call, Call):
            raise bad(line.number, line.text, "computes nothing", "%name : type = operation(%x, 2), or argument")
        node = self._called(call, line, line.name)
        for axes in re.findall(r"# (\S+) may be used up", expression.rest):
            node.meta["used_up"] = frozenset(axes.split(","))
        if expression.rest.endswith("# again"):
            node.meta["again"] = True
        return node

    def _called(self, call: Call, line: Line, name: str | None) -> fx.Node:
        args = tuple(self._node(x, line.number, line.text) for x in call.args)
        kwargs = {key: self._node(x, line.number, line.text) for key, x in call.kwargs.items()}
        if self.main and call.name != "main" and (call.name, self.section.direction) in self.sections:
            return self._block(call.name, args, name)
        if call.name in ("reshard", "cross_fold") and "localized" not in (self.text.holds or ()) and len(args) == 1:
            if line.layout is None:
                raise bad(
                    line.number,
                    line.text,
                    f"has no layout for {call.name} to give",
                    "%name : f32[batch@dp, hidden] = reshard(%x)",
                )
            args = (*args, line.layout)
        try:
            target = named(call.name, args, kwargs)
        except (KeyError, AttributeError):
            raise bad(
                line.number, line.text, f"calls {call.name}, which is no operator", "aten.name, or an operator of foldcc"
            ) from None
        if target is None:
            raise bad(
                line.number,
                line.text,
                f"calls {call.name}, of which no overload takes these arguments",
                self._schemas(call.name),
            )
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        if name is not None:
            self._carry(node, line)
        self._infer(node, line)
        return node

    def _schemas(self, name: str) -> str:
        space, op = name.split(".") if "." in name else ("foldcc", name)
        packet = getattr(getattr(torch.ops, space), op)
        return "\n".join(str(getattr(packet, o)._schema) for o in packet.overloads() if "out" not in o)

    def _block(self, called: str, args: tuple[Any, ...], name: str | None) -> fx.Node:
        if not hasattr(self.root, called):
            self.blocks[called] = Graph(self.text, self.sections[called, self.section.direction], self.sections)
            setattr(self.root, called, self.blocks[called].build())
        node = self.graph.create_node("call_module", called, args, name=name)
        returned = getattr(self.root, called).graph.output_node().args[0]
        # A joint graph returns gradients too, which nobody takes before it is split.
        self.inside[node] = returned[0] if self.joint and "differentiated" not in (self.text.holds or ()) else returned
        return node

    def _node(self, x: Any, number: int, line: str) -> Any:
        """An argument, in which values are nodes."""
        if isinstance(x, list):
            return [self._node(y, number, line) for y in x]
        if isinstance(x, Call):
            return self._called(x, Line("", "", "", None, None, None, "", number=number, text=line), None)
        if not isinstance(x, Value):
            return x
        if x.name not in self.nodes:
            raise bad(number, line, f"reads %{x.name}, which no line above it computes", ", ".join(f"%{n}" for n in self.nodes))
        return self.nodes[x.name]

    def _carry(self, node: fx.Node, line: Line) -> None:
        """What a line says of a value, its fake tensor aside."""
        if line.layout is not None and self.laid_out:
            node.meta["layout"] = line.layout
        if line.layout is not None and not self.joint:
            node.meta["dims"] = line.layout.dims

    def _told(self, line: Line) -> tuple[torch.dtype, tuple[Any, ...]] | None:
        """The dtype and the shape that a line says; None if it has none, or has sizes that are not known."""
        shape = line.sizes
        if line.layout is not None:
            shape = line.layout.shape if self.local else line.layout.global_shape
        if shape is None or (not self.joint and not all(isinstance(n, int) for n in shape)):
            return None
        if line.dtype not in _DTYPES:
            raise bad(line.number, line.text, f"has no dtype called {line.dtype}", ", ".join(_DTYPES))
        return _DTYPES[line.dtype], tuple(self._size(n) for n in shape)

    def _value(self, line: Line) -> Any:
        """The size, or the fake tensor, that the type of a line stands for."""
        told = self._told(line)
        if told is None:
            return self._size(line.size) if line.size else None
        with self.mode:
            return torch.empty(told[1], dtype=told[0], device=line.device or "cpu")

    def _size(self, told: Any) -> Any:
        """A size of a type: a number, or made of names of sizes that data decide."""
        return told if isinstance(told, int) else eval(re.sub(r"[^u\d*+ ]", "", str(told)), {}, dict(self.sizes))

    def _infer(self, node: fx.Node, line: Line) -> None:
        """The fake tensor of a call: what the operator makes of its operands'."""
        if node.target is operator.getitem and node.args[0] in self.inside:
            self._taken(node, line)
            return
        told = self._told(line)
        if self.folding and (told is None if line.layout is None else line.layout.view == "moe"):
            node.meta |= {"dtype": _DTYPES.get(line.dtype), "layout": line.layout}
            if node.target in (reshard, cross_fold) and "val" in node.args[0].meta:
                node.meta["val"] = node.args[0].meta["val"]
            return
        by_data = self.joint and (line.size or any(isinstance(n, str) for n in line.sizes or ()))
        if by_data or not all("val" in x.meta for x in node.all_input_nodes):
            value = self._value(line)
        else:
            value = self._run(node, line)
            if isinstance(value, torch.Tensor):
                value = self._agreed(value, told, line)
        if value is not None:
            node.meta["val"] = value

    def _taken(self, node: fx.Node, line: Line) -> None:
        """What is taken out of a call of a block."""
        leaf, value = self.inside[node.args[0]][node.args[1]], self._value(line)
        if isinstance(leaf, tuple):
            self.inside[node] = leaf
        elif leaf is not None:
            # A text may say less than is printed.
            told = ("val", "dtype") if self.section.direction == "backward" else ("val", "dtype", "layout", "dims")
            node.meta |= {key: leaf.meta[key] for key in told if key in leaf.meta} if value is None else {"val": value}

    def _agreed(self, made: torch.Tensor, told: tuple[torch.dtype, tuple[Any, ...]] | None, line: Line) -> torch.Tensor:
        """A value that has the type of its line; of an exchange, only who wrote the line knows how many rows come."""
        shown = _shown(made)
        if told is None:
            if self.laid_out and not (line.dtype or self.joint or self.main):
                raise bad(
                    line.number, line.text, f"says no layout of what it computes, {shown}", "%name : f32[batch@dp, seq] R(tp)"
                )
            return made
        if made.dtype == told[0] and [*map(str, made.shape)] == [*map(str, told[1])]:
            return made
        alike = made.dtype == told[0] and made.dim() == len(told[1])
        if not alike or not all(isinstance(m, torch.SymInt) or m == n for m, n in zip(made.shape, told[1], strict=True)):
            types = f"{short(told[0])}[{', '.join(map(str, told[1]))}]"
            raise bad(line.number, line.text, f"has the type {types} for what is {shown}")
        return self._value(line) if self.joint else made

    def _run(self, node: fx.Node, line: Line) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        try:
            with self.mode, torch.no_grad():
                return node.target(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as refused:
            operands = ", ".join(f"%{x.name} {_shown(x.meta['val'])}" for x in node.all_input_nodes)
            raise bad(
                line.number,
                line.text,
                f"is refused by its operator: {str(refused).splitlines()[0]}",
                f"other operands than {operands}",
            ) from refused


def _shown(value: Any) -> str:
    return f"{short(value.dtype)}[{', '.join(map(str, value.shape))}]" if isinstance(value, torch.Tensor) else str(value)
