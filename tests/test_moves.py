"""Moves: the steps of the table bring a value where it is wanted, and its price is what they send."""

from __future__ import annotations

import operator
import re
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from foldcc import ops
from foldcc.ir.program import Program, Slot
from foldcc.layout import PARTIAL, VARYING, Layout, Shard, State
from foldcc.mesh import FoldedMesh
from foldcc.ops import record
from foldcc.ops.groups import active
from foldcc.ops.layout import reshard
from foldcc.ops.moves import MOVES
from foldcc.ops.operator import positional
from foldcc.passes.differentiate import Differentiate
from foldcc.passes.localize import Localize
from foldcc.plan import costs
from foldcc.runtime.placement import cut, join
from foldcc.runtime.simulate import simulate

ROOT = Path(__file__).parent.parent
SIZES = {sympy.Symbol(name): 6 for name in "ab"}
WHOLE = torch.arange(36.0, dtype=torch.float64).view(6, 6)


def layout(state: State, ranks: int) -> Layout:
    return Layout(tuple((f,) for f in SIZES), SIZES, {"tp": state}, {"tp": ranks})


def moving(source: State, target: State, ranks: int) -> Program:
    """One block, which brings its argument from one state to another."""
    graph, main = fx.Graph(), fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(reshard, (x, layout(target, ranks)))
    for node, state in ((x, source), (y, target)):
        node.meta |= {
            "val": FakeTensorMode().from_tensor(WHOLE),
            "layout": layout(state, ranks),
            "grad": True,
            "parameter": False,
        }
    graph.output((y,))
    call = main.create_node("call_module", "block", (main.placeholder("x"),))
    main.output((main.call_function(operator.getitem, (call, 0)),))
    root = torch.nn.Module()
    root.add_module("block", fx.GraphModule(torch.nn.Module(), graph))
    mesh = FoldedMesh.parse(f"tp={ranks}")
    program = Program(fx.GraphModule(root, main), (Slot("x", "input", ("x",)),), pytree.treespec_leaf(), {}, mesh)
    return Localize().run(program)


def states(pair: tuple[str, str]) -> tuple[State, State]:
    """States of a pair of types; what is divided before is not divided so after."""
    source, target = (Shard(dim, 0, 1) if letter == VARYING else letter for dim, letter in enumerate(pair))
    return source, target


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("pair", MOVES, ids="".join)
def test_the_steps_of_a_move_bring_a_value_where_it_is_wanted(pair: tuple[str, str], ranks: int) -> None:
    source, target = states(pair)
    program = moving(source, target, ranks)
    held = [cut(WHOLE, layout(source, ranks), program.mesh, rank) for rank in range(ranks)]
    if source == PARTIAL:
        held = [torch.full_like(WHOLE, rank) for rank in range(1, ranks)]
        held.append(WHOLE - sum(held))
    with active(program.mesh):
        parts = [y for (y,) in simulate(program.mesh, program.blocks["block"], [held])]
    found = sum(parts) if target == PARTIAL else join(parts, layout(target, ranks), program.mesh, "y")
    assert torch.equal(found, WHOLE)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("pair", MOVES, ids="".join)
def test_the_price_of_a_move_is_what_its_steps_send(pair: tuple[str, str], ranks: int) -> None:
    source, target = states(pair)
    sent = 0.0
    for node in Differentiate().run(moving(source, target, ranks)).blocks["block"].graph.nodes:
        known = record(node.target)
        if known is not None and known.sent is not None:
            sent += known.sent(node.args[0].meta["val"].numel(), node.meta["val"].numel(), ranks)
    free = costs.move(source, target, WHOLE.numel(), ranks, True, 0.0)
    found = costs.price(*pair, ranks)
    assert found is not None and free is not None
    traffic = costs.TRAFFIC * WHOLE.numel() * found.written if found.forward else 0.0
    assert free - traffic == pytest.approx(sent)


def test_what_is_no_move_has_no_price() -> None:
    assert costs.move(Shard(0, 0, 1), PARTIAL, 1.0, 2, True, 0.0) is None
    assert costs.move("R", "I", 1.0, 2, True, 0.0) is None
    assert costs.move("R", "I", 1.0, 2, False, 0.0) == 0.0


ROWS = re.findall(
    r"^\| (\w) → (\w) \| `(\w+)`[^|]*\| (\w) → (\w) \| (?:`(\w+)`)?", (ROOT / "docs" / "layouts.md").read_text(), re.MULTILINE
)


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_the_pairs_that_the_documentation_lists_are_those_of_the_records(row: tuple[str, ...]) -> None:
    src, dst, name, back, forth, transposed = row
    known: Any = getattr(ops, name)
    told = {"x": torch.empty(4, device="meta", requires_grad=True), "axes": "tp", "src": src, "dst": dst, "dim": 0, "outer": 1}
    told |= {"dims": [0], "outers": [1], "into": [0], "into_outers": [1], "by": 1, "before": 1}
    assert [{"src": src, "dst": dst}.get(t, t) for t in known.types.split(" -> ")] == [src, dst]
    seen: list[Any] = []
    with active(FoldedMesh.parse("tp=2")):
        y = known(*positional(known.overload, told))
        with Seen(seen):
            y.backward(torch.empty_like(y))
    ((found, arguments),) = seen
    assert found.name == (transposed or name)
    assert [arguments.get(t, t) for t in found.types.split(" -> ")] == [back, forth]


class Seen(TorchDispatchMode):
    """Keeps the records of the operators that run, with their arguments."""

    def __init__(self, seen: list[Any]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (known := record(func)) is not None:
            self.seen.append((known, known.arguments(args, kwargs or {})))
        return func(*args, **(kwargs or {}))
