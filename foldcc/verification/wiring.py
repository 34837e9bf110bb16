"""That the main graphs, which are as deep as the model, call the same blocks on the same values, in both directions.

A block stands for a function of which nothing is known: its results are hashes of its name and its arguments, and the
derivative of a result by an argument is a hash as well. What the backward main graph returns must be what the chain rule
makes of the captured main graph: a call that is left out, a value that is passed on wrongly, and a gradient that is
counted twice or not at all show as different numbers. Every value is one number, so depth costs next to nothing. A block that
the captured graph does not call, such as one that unshards parameters, stands for the identity.

Where backward passes are in two, that the halves make what the whole makes is seen by their operators: two graphs make the same
where each gradient is the same expression of what they are given.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import fx

from foldcc.ir.pipeline import Stages
from foldcc.ir.program import Program
from foldcc.verification.field import MERSENNE

aten = torch.ops.aten
Values = dict[Any, Any]


def wired_alike(stages: Stages, stage: str) -> bool:
    """Whether the main graphs of a differentiated stage are those that differentiating the captured one gives."""
    captured, local, program = (stages[name].program for name in ("annotate", "localize", stage))
    slots = {node.name: _hash("slot", node.name) for node in captured.placeholders}
    values = _run(captured.graph, slots, captured.blocks)
    outputs, saved = _run(program.graph, slots, captured.blocks)[program.output]
    if _flat(outputs) != _flat(values[captured.output]):
        return False
    if program.backward is None:
        return True
    whole = program
    if "apart" in program.properties:
        cut = next(k for k, s in enumerate(stages) if "apart" in s.program.properties)
        whole, apart = stages[cut - 1].program, stages[cut].program
        if _expressions(whole) != _expressions(apart) or _calls(apart) != _calls(program):
            return False
    assert whole.backward is not None
    tangents = [_hash("tangent", i) for i, _ in enumerate(program.objectives)]
    found = _backward(whole.backward, local, [*saved, *tangents], captured.blocks)
    wanted = _chain_rule(captured, local, values, tangents)
    return all((g or 0) == wanted.get(n, 0) for g, n in zip(found, captured.placeholders, strict=True))


def _expressions(program: Program) -> Any:
    """What a backward main graph returns, each gradient as a hash of the expression that makes it of what is given."""

    def run(graph: fx.GraphModule, given: Sequence[Any]) -> Any:
        values: Values = {}
        entering = iter(given)
        for node in graph.graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return args[0]
            if node.op == "placeholder":
                values[node] = next(entering)
            elif node.op == "call_module":
                values[node] = run(graph.get_submodule(str(node.target)), args)
            elif node.target is operator.getitem and isinstance(args[0], tuple):
                values[node] = args[0][args[1]]
            else:
                values[node] = f"%{_hash(str(node.target), str(args), str(kwargs))}"
        raise AssertionError("a graph ends with its output")

    assert program.backward is not None
    return run(program.backward, [f"%{n.name}" for n in program.backward.graph.find_nodes(op="placeholder")])


def _calls(program: Program) -> list[str]:
    """A backward main graph, as text."""
    assert program.backward is not None
    return [f"{n.name} {n.target} {n.args}" for n in program.backward.graph.nodes]


def _hash(*of: Any) -> int:
    return int.from_bytes(blake2b(repr(of).encode(), digest_size=8).digest(), "little") % MERSENNE


def _flat(x: Any) -> list[Any]:
    return [leaf for item in x for leaf in _flat(item)] if isinstance(x, (tuple, list)) else [x]


def _run(main: fx.GraphModule, slots: Mapping[str, int], known: Collection[str]) -> Values:
    """The value of each node of a main graph, forward; what a call saves says which call it was."""
    values: Values = {}
    for node in main.graph.nodes:
        if node.op == "placeholder":
            values[node] = slots[node.name]
        elif node.op == "call_module":
            values[node] = _call(main.get_submodule(str(node.target)), str(node.target), [values[a] for a in node.args], known)
        elif node.op == "call_function":
            values[node] = node.target(*fx.map_arg(node.args, values.__getitem__))
        else:
            values[node] = fx.map_arg(node.args[0], values.__getitem__)
    return values


def _call(block: Any, name: str, arguments: list[int], known: Collection[str]) -> Any:
    (output,) = block.graph.find_nodes(op="output")
    returned, saved = output.args[0], None
    if len(returned) == 2 and isinstance(returned[0], (tuple, list)):  # a differentiated block: results, and what it saves
        returned, saved = returned
    results = arguments if name not in known else [_hash(name, arguments, i) for i in range(len(returned))]
    return results if saved is None else (results, [(name, arguments, i) for i in range(len(saved))])


def _derivative(local: Program, call: tuple[str, list[int]], gradients: Mapping[int, int], position: int) -> int:
    """The gradient of an argument, for those of the results."""
    return sum(g * _hash("derivative", call, i, position) for i, g in gradients.items()) % MERSENNE


def _interface(local: Program, name: str) -> tuple[list[int], list[int]]:
    """Which results and which arguments of a block have gradients."""
    block = local.blocks[name]
    (output,) = block.graph.find_nodes(op="output")
    arguments = block.graph.find_nodes(op="placeholder")
    return [i for i, n in enumerate(output.args[0]) if n.meta["grad"]], [i for i, n in enumerate(arguments) if n.meta["grad"]]


def _backward(main: fx.GraphModule, local: Program, given: list[Any], known: Collection[str]) -> list[Any]:
    """What a backward main graph returns. A call must be given all that one call saved, in order."""
    values: Values = {}
    entering = iter(given)
    for node in main.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(entering)
        elif node.op == "call_module":
            values[node] = _transposed(local, str(node.target), [values[a] for a in node.args], known)
        elif node.target is aten.add.Tensor:
            values[node] = sum(values[a] for a in node.args) % MERSENNE
        elif node.op == "call_function":
            values[node] = node.target(*fx.map_arg(node.args, values.__getitem__))
    (output,) = main.graph.find_nodes(op="output")
    return list(fx.map_arg(output.args[0], values.__getitem__))


def _transposed(local: Program, target: str, arguments: list[Any], known: Collection[str]) -> list[Any]:
    name, *missing = target.split("_")
    saved = [a for a in arguments if isinstance(a, tuple) and a[0] != "anew"]
    anew = [a[1] for a in arguments if isinstance(a, tuple) and a[0] == "anew"]
    tangents = iter(a for a in arguments if not isinstance(a, tuple))
    results, positions = _interface(local, name)
    if "again" in missing:  # parameters of the call that saved them
        return [("anew", x) for x in saved[0][1]]
    there = {i: next(tangents) for k, i in enumerate(results) if str(k) not in missing}
    count = len(list(local.blocks[name].graph.find_nodes(op="placeholder")))
    if name not in known:
        return [there.get(i) for i in range(count)]
    in_order = bool(saved) and [s[2] for s in saved] == list(range(len(saved))) and all(s[:2] == saved[0][:2] for s in saved)
    right = in_order and saved[0][0] == name and _in_order(anew, saved[0][1])
    call = saved[0][:2] if right else ("", [])
    return [_derivative(local, call, there, i) if i in positions else None for i in range(count)]


def _in_order(some: list[Any], every: list[Any]) -> bool:
    """Whether some values stand among others in this order."""
    left = iter(every)
    return all(x in left for x in some)


def _chain_rule(captured: Program, local: Program, values: Values, tangents: list[int]) -> Values:
    """The gradient of each value of the captured main graph."""
    found: Values = {}
    for node, tangent in zip(captured.objectives, tangents, strict=True):
        found[node] = (found.get(node, 0) + tangent) % MERSENNE
    for call in reversed(captured.calls):
        results, positions = _interface(local, str(call.target))
        there = {u.args[1]: found[u] for u in call.users if u in found and u.args[1] in results}
        arguments = [values[a] for a in call.args]
        for i in positions if there else ():
            gradient = _derivative(local, (str(call.target), arguments), there, i)
            found[call.args[i]] = (found.get(call.args[i], 0) + gradient) % MERSENNE
    return found
