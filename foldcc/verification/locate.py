"""Where two programs part: the first call of a block whose inputs are right and whose results are not, and in it the node.

A node of the folded program says in `meta["origin"]` which node of the localized program it was traced from; one that
was captured has the captured node's name, so its value can be held against the captured program's; a cast that a precision put
there was not, and is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from foldcc.ir.pipeline import Stages
from foldcc.ir.program import INPUT, WEIGHT, Program, gradients, unshards, where
from foldcc.layout import Layout
from foldcc.verification.compare import reading, wrong_rank
from foldcc.verification.folded import Folded
from foldcc.verification.lockstep import Ranked
from foldcc.verification.proof import Difference


def locate_forward(stages: Stages, folded: Folded, difference: Difference) -> Difference:
    """Adds the place to a difference of outputs."""
    outlined = stages["outline"].program
    calls = list(zip(outlined.calls, _of_blocks(folded.program.calls, outlined), strict=True))
    entering: dict[fx.Node, list[Ranked]] = {}
    seen: dict[fx.Node, Ranked] = {}

    def watch(node: fx.Node, values: Ranked) -> None:
        if node.op == "call_module":
            entering[node] = [seen[a] for a in node.args]
        seen[node] = values

    folded.forward(watch)
    for captured, call in calls:
        names = captured.meta["nodes"]
        at = _first_in_block(stages, folded, str(call.target), names, entering[call])
        if at is not None:
            return _at(difference, folded.program, str(call.target), "forward", *at)
    return difference


def _first_in_block(
    stages: Stages, folded: Folded, block: str, names: Sequence[str], values: list[Ranked]
) -> tuple[fx.Node, Layout] | None:
    """The first node of a block's forward graph whose value is wrong, although everything before it is right."""
    localized = {n.name: n for n in stages["localize"].program.blocks[block].graph.nodes}
    outlined = [n.name for n in stages["outline"].program.blocks[block].graph.nodes if n.op == "call_function"]
    captured = dict(zip(outlined, names, strict=True))
    graph: fx.GraphModule = getattr(folded.program.graph, block)
    last = {n.meta["origin"]: n for n in graph.graph.nodes if "origin" in n.meta}
    held: list[tuple[fx.Node, Ranked]] = []

    def watch(node: fx.Node, ranked: Ranked) -> None:
        origin = node.meta.get("origin")
        if origin in captured and origin in localized and last[origin] is node:
            held.append((node, ranked))

    folded.run(graph, values, watch)
    for node, ranked in held:
        origin = node.meta["origin"]
        layout, wanted = localized[origin].meta.get("layout"), folded.reference.values.get(captured[origin])
        if _comparable(ranked, wanted, layout):
            assert isinstance(layout, Layout)
            if wrong_rank(ranked, wanted.detach(), layout, folded.program.mesh, folded.reference.field) is not None:
                return node, layout
    return None


def _comparable(values: Ranked, wanted: Any, layout: Any) -> bool:
    """Whether a value is a tensor that its layout says how to cut."""
    known = isinstance(layout, Layout) and all(isinstance(n, int) for n in layout.shape) and not _by_data(layout)
    return known and isinstance(wanted, Tensor) and all(isinstance(x, Tensor) for x in values)


def _by_data(layout: Layout) -> bool:
    return "V" in layout.states.values()


def locate_backward(stages: Stages, folded: Folded, difference: Difference) -> Difference:
    """Adds the place to a difference of gradients: the first call of the backward pass that turns right into wrong."""
    program, reference = folded.program, folded.reference
    backward = program.backward
    assert backward is not None and program.wanted is not None
    contributions: dict[fx.Node, Ranked] = {}
    folded.gradients(contributions.__setitem__)
    outlined = stages["outline"].program
    calls = [n for n in backward.graph.nodes if n.op == "call_module" and not str(n.target).endswith("_again")]
    forward = list(reversed(program.calls))
    captured = dict(zip(_of_blocks(forward, outlined), reversed(outlined.calls), strict=True))
    slots = {n.name: s for n, s in zip(program.placeholders, program.slots, strict=True)}
    for call, ahead in _matched(calls, forward):
        block = getattr(backward, str(call.target))
        (output,) = block.graph.find_nodes(op="output")
        made = gradients(output.args[0])
        nested = made is not output.args[0]  # beside what the first of two passes leaves for the second
        items = [u for c in call.users if c.args[1] == 0 for u in c.users] if nested else [*call.users]
        results = {u.args[1]: u for u in items}
        actuals = [_unsharded(a) for a in ahead.args]
        names = [_name(stages, a) for a in captured[ahead].args] if ahead in captured else [a.name for a in actuals]
        wanted = reference.gradients([n for n in dict.fromkeys(names) if n is not None], program.wanted)
        # Parameters first, for they have names, and those that are used last, whose gradients are made first.
        for i in sorted(range(len(names)), key=lambda i: (actuals[i].op != "placeholder", -i)):
            name, actual = names[i], actuals[i]
            if i not in results or name not in wanted or max(_uses(program, x) for x in (actual, ahead.args[i])) > 1:
                continue
            if ahead in captured and _read_inside(stages, captured[ahead].args[i]):
                continue
            layout = _layout(program, ahead, i).transposed
            values = contributions[results[i]]
            if _comparable(values, wanted[name], layout):
                rank = wrong_rank(values, wanted[name], layout, program.mesh, reference.field)
                if rank is not None:
                    slot = slots.get(getattr(actual, "name", ""))
                    told = reading(values, wanted[name], layout, program.mesh, reference.field)
                    what = f"The gradient of {slot.names[0] if slot else name}"
                    parameter = slot.names[0] if slot and slot.kind == "parameter" else difference.parameter
                    found = Difference(what=what, parameter=parameter, rank=rank, reading=told)
                    return _at(found, program, str(call.target), "backward", made[i], layout)
    return difference


def _of_blocks(calls: Sequence[fx.Node], captured: Program) -> list[fx.Node]:
    """Those calls whose blocks are captured ones, and not steps of parameters alone."""
    return [c for c in calls if str(c.target) in captured.blocks]


def _unsharded(value: fx.Node) -> fx.Node:
    """The parameter that an argument of a block is made of, where it is made in the main graph; else the argument."""
    if value.op == "placeholder":
        return value
    made: Any = value.args[0]
    call = made if made.op == "call_module" else made.args[0]  # beside what it saves
    source: fx.Node = call.args[value.args[1]] if unshards(call.target) else value
    return source


def _matched(calls: Sequence[fx.Node], forward: Sequence[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    """Each call of the backward pass with the call of the forward pass that it belongs to."""
    found: list[tuple[fx.Node, fx.Node]] = []
    left = list(forward)  # parameters are unsharded ahead of the blocks that they are for
    for call in calls:
        half = str(call.target).removesuffix(WEIGHT)
        if found and half != str(call.target) and str(found[-1][0].target) == half + INPUT:
            found.append((call, found[-1][1]))
            continue
        for ahead in left:
            if str(call.target) == str(ahead.target) or str(call.target).startswith(f"{ahead.target}_"):
                found.append((call, ahead))
                left.remove(ahead)
                break
    return found


def _name(stages: Stages, value: Any) -> str | None:
    """The captured node that a value of the outlined main graph is."""
    if not isinstance(value, fx.Node) or value.op == "placeholder":
        return getattr(value, "name", None)
    call, position = value.args
    block = stages["outline"].program.blocks[str(call.target)]
    (output,) = block.graph.find_nodes(op="output")
    order = [n for n in block.graph.nodes if n.op == "call_function"]
    return str(call.meta["nodes"][order.index(output.args[0][position])])


def _uses(program: Program, value: Any) -> int:
    """How often a value of the main graph is read: its gradient is the sum over all of them."""
    return sum(1 for user in value.users for a in user.all_input_nodes if a is value) if isinstance(value, fx.Node) else 2


def _read_inside(stages: Stages, value: Any) -> bool:
    """Whether the block that returns a value reads it as well: then its gradient is a sum, of which one term enters here."""
    if not isinstance(value, fx.Node) or value.op == "placeholder":
        return False
    call, position = value.args
    (output,) = stages["outline"].program.blocks[str(call.target)].graph.find_nodes(op="output")
    return any(user is not output for user in output.args[0][position].users)


def _layout(program: Program, call: fx.Node, position: int) -> Layout:
    block: fx.GraphModule = getattr(program.graph, str(call.target))
    formals: list[fx.Node] = list(block.graph.find_nodes(op="placeholder"))
    layout: Layout = formals[position].meta["layout"]
    return layout


def _at(difference: Difference, program: Program, block: str, direction: str, node: Any, layout: Layout) -> Difference:
    module, source = where(node), node.meta.get("source")
    told: Mapping[str, Any] = {x.name: x.meta.get("layout") for x in node.all_input_nodes}
    return replace(
        difference,
        node=f"{node.name} = {node.target} in {block}, {direction}",
        at=" ".join(str(x) for x in (module, source) if x),
        layouts=(f"{node.name} {layout}", *(f"{name} {x}" for name, x in told.items() if x is not None)),
    )
