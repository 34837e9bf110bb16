"""Rules for operators that only move elements: views, pieces, joins, lookups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch.fx import Node

from foldcc.ir.node import argument, argument_or, name_of, operands
from foldcc.rules.kinds import named
from foldcc.rules.notation import Derived, Letters, Pattern, Rule, Shape, build, names
from foldcc.rules.pointwise import pointwise
from foldcc.rules.reductions import dims_of


def _view(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    source, target = inputs[0], outputs[0]
    assert source is not None and target is not None
    if 0 in source:
        own = [names(side, len(shape)) for side, shape in (("x", source), ("y", target))]
        return build([own[0]], [own[1]], [source, target], whole={x for p in own for (x,) in p}, linear=[[0]])
    left: list[list[str]] = [[] for _ in source]
    right: list[list[str]] = [[] for _ in target]
    sizes: dict[str, int] = {}
    whole: set[str] = set()
    queues = [[(i, n) for i, n in enumerate(shape) if n != 1] for shape in (source, target)]
    while queues[0] and queues[1]:
        (i, m), (j, n) = queues[0][0], queues[1][0]
        small = min(m, n)
        if max(m, n) % small:
            # Sizes do not nest: what is left has nothing in common that could be sharded.
            for queue, side in ((queues[0], left), (queues[1], right)):
                for at, size in queue:
                    name = f"{'xy'[side is right]}{at}"
                    sizes[name] = size
                    whole.add(name)
                    side[at].append(name)
            break
        name = f"v{len(sizes)}"
        sizes[name] = small
        left[i].append(name)
        right[j].append(name)
        for queue, size in ((queues[0], m), (queues[1], n)):
            at = queue[0][0]
            queue.pop(0)
            if size != small:
                queue.insert(0, (at, size // small))
    patterns = [tuple(map(tuple, side)) for side in (left, right)]
    return build([patterns[0]], [patterns[1]], [source, target], whole=whole, linear=[[0]], sizes=sizes)


def _expand(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    rule = pointwise(node, inputs, outputs)
    return Rule(**{**vars(rule), "linear": (frozenset([0]),)})


def _moved(order: Callable[[Node, int], list[int | None]]) -> Callable[..., Rule]:
    """A rule for an operator whose result's dimension i is the operand's dimension order[i], or a new one of size 1."""

    def rule(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
        source, target = inputs[0], outputs[0]
        assert source is not None and target is not None
        letters = names("d", len(source))
        kept = order(node, len(source))
        dropped = {letters[i][0] for i in range(len(source)) if i not in kept}
        if name_of(node.target) == "aten.squeeze":
            # A dimension that stays must not get size 1 on a rank, where it would go.
            dropped |= {letters[i][0] for i in dims_of(node, len(source))}
        result = tuple(() if i is None else letters[i] for i in kept)
        return build([letters], [result], [source, target], whole=dropped, linear=[[0]])

    return rule


def _transposed(node: Node, rank: int) -> list[int | None]:
    order: list[int | None] = list(range(rank))
    a, b = (argument(node, d) % rank for d in ("dim0", "dim1"))
    order[a], order[b] = order[b], order[a]
    return order


def _unsqueezed(node: Node, rank: int) -> list[int | None]:
    order: list[int | None] = list(range(rank))
    order.insert(argument(node, "dim") % (rank + 1), None)
    return order


def _squeezed(node: Node, rank: int) -> list[int | None]:
    dims = argument_or(node, "dim")
    shape = operands(node)[0].meta["val"].shape
    dims = range(rank) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % rank for d in dims if shape[d] == 1}
    return [i for i in range(rank) if i not in gone]


def _selected(node: Node, rank: int) -> list[int | None]:
    return [i for i in range(rank) if i != argument(node, "dim") % rank]


def _slice(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    source, target = inputs[0], outputs[0]
    assert source is not None and target is not None
    dim = argument(node, "dim") % len(source)
    left, right = list(names("d", len(source))), list(names("d", len(source)))
    n, m = source[dim], target[dim]
    start = argument(node, "start") or 0
    start = max(start + n, 0) if start < 0 else start
    sizes, whole = {}, set()
    if n != m:
        if m and argument(node, "step") == 1 and n % m == 0 and start % m == 0:
            left[dim], right[dim] = ("pieces", "piece"), ("piece",)
            sizes, whole = {"pieces": n // m, "piece": m}, {"pieces"}
        else:
            left[dim], right[dim] = ("all",), ("part",)
            whole = {"all", "part"}
    return build([tuple(left)], [tuple(right)], [source, target], whole=whole, linear=[[0]], sizes=sizes)


def _slice_scatter(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    base, part = inputs[0], inputs[1]
    assert base is not None and part is not None
    dim = argument(node, "dim") % len(base)
    left, right = list(names("d", len(base))), list(names("d", len(base)))
    whole = set()
    if base[dim] != part[dim]:
        left[dim], right[dim] = ("all",), ("part",)
        whole = {"all", "part"}
    return build([tuple(left), tuple(right)], [tuple(left)], [base, part, outputs[0]], whole=whole, linear=[[0, 1]])


def _split(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    (source,) = inputs
    assert source is not None
    dim = argument(node, "dim") % len(source)
    left = list(names("d", len(source)))
    lengths = {shape[dim] for shape in outputs if shape is not None}
    results: list[Pattern | None] = []
    sizes, whole = {}, set()
    if len(lengths) == 1 and 0 not in lengths:
        (m,) = lengths
        left[dim] = ("pieces", "piece")
        sizes, whole = {"pieces": source[dim] // m, "piece": m}, {"pieces"}
        results = [tuple(("piece",) if i == dim else x for i, x in enumerate(names("d", len(source))))] * len(outputs)
    else:
        left[dim] = ("all",)
        whole = {"all", *(f"part{k}" for k in range(len(outputs)))}
        for k in range(len(outputs)):
            results.append(tuple((f"part{k}",) if i == dim else x for i, x in enumerate(names("d", len(source)))))
    return build([tuple(left)], results, [source, *outputs], whole=whole, linear=[[0]], sizes=sizes)


def _unbind(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    (source,) = inputs
    assert source is not None
    dim = argument(node, "dim") % len(source)
    letters = names("d", len(source))
    result = tuple(x for i, x in enumerate(letters) if i != dim)
    whole = {letters[dim][0]}
    return build([letters], [result] * len(outputs), [source, *outputs], whole=whole, linear=[[0]])


def _cat(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    out = outputs[0]
    assert out is not None
    dim = argument(node, "dim") % len(out)
    letters = list(names("d", len(out)))
    # A vector without entries may stand among operands of any rank.
    lengths = [0 if len(shape) != len(out) else shape[dim] for shape in inputs if shape is not None]
    patterns: list[Pattern | None] = []
    sizes, whole = {}, set()
    for k, shape in enumerate(inputs):
        if shape is not None and len(shape) != len(out):
            patterns.append(((f"part{k}",),))
            continue
        own: Letters = ("piece",) if len(set(lengths)) == 1 else (f"part{k}",)
        patterns.append(None if shape is None else tuple(own if i == dim else x for i, x in enumerate(letters)))
    if len(set(lengths)) == 1:
        letters[dim] = ("pieces", "piece")
        sizes, whole = {"pieces": len(lengths), "piece": lengths[0]}, {"pieces"}
    else:
        whole = {f"part{k}" for k in range(len(inputs))} | {letters[dim][0]}
    linear = [list(range(len(inputs)))]
    return build(patterns, [tuple(letters)], [*inputs, out], whole=whole, linear=linear, sizes=sizes)


def _stack(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    out = outputs[0]
    assert out is not None
    dim = argument(node, "dim") % len(out)
    letters = names("d", len(out))
    pattern = tuple(x for i, x in enumerate(letters) if i != dim)
    linear = [list(range(len(inputs)))]
    return build([pattern] * len(inputs), [letters], [*inputs, out], whole={letters[dim][0]}, linear=linear)


def _gather(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    source, ids = inputs[0], inputs[1]
    assert source is not None and ids is not None
    dim = argument(node, "dim") % len(source)
    if any(n != m for i, (n, m) in enumerate(zip(source, ids, strict=True)) if i != dim):
        return None
    letters, chosen = list(names("d", len(source))), list(names("d", len(source)))
    chosen[dim] = ("chosen",)
    whole = {letters[dim][0], "chosen"}
    first, second = tuple(letters), tuple(chosen)
    if name_of(node.target) == "aten.gather":
        return build([first, second], [second], [source, ids, outputs[0]], whole=whole, linear=[[0]])
    if any(shape != ids for shape in inputs[2:]):
        return None  # only a corner of what is scattered is read
    rest: list[Pattern | None] = [second for _ in inputs[2:]]
    rule = build([first, second, *rest], [first], [*inputs, outputs[0]], whole=whole)
    if name_of(node.target) != "aten.scatter_add":
        return rule
    # What is added to each place is a sum over what is chosen, and what was there joins it once.
    return replace(rule, whole=rule.whole - {"chosen"}, linear=(frozenset({0, 2}),), add=frozenset({0}))


def _index_add(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    """As `scatter_add`: rows are added where they belong, and what was there joins the sum once."""
    base = inputs[0]
    assert base is not None
    letters, dim = names("d", len(base)), argument(node, "dim") % max(len(base), 1)
    rows = tuple(("chosen",) if d == dim else x for d, x in enumerate(letters))
    rule = build([letters, (("chosen",),), rows], [letters], [*inputs, outputs[0]], whole=set(letters[dim]), linear=[[0, 2]])
    return replace(rule, add=frozenset({0}))


def _one_hot(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    (source,) = inputs
    assert source is not None
    if argument(node, "num_classes") < 0:
        return None  # the largest class of the whole data
    letters = names("d", len(source))
    return build([letters], [(*letters, ("classes",))], [source, outputs[0]], whole={"classes"})


def _pad(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    source, out = inputs[0], outputs[0]
    assert source is not None and out is not None
    # What is added in front and cut off at the end may keep the size, so the amounts decide, from the last dimension on.
    amounts = list(argument(node, "pad"))
    touched = {len(source) - 1 - i for i in range(len(amounts) // 2) if any(amounts[2 * i : 2 * i + 2])}
    letters = names("d", len(source))
    result = [(f"padded{i}",) if i in touched else x for i, x in enumerate(letters)]
    whole = {x for i in touched for x in (*letters[i], *result[i])}
    linear = [[0]] if not argument_or(node, "value") else []
    return build([letters], [tuple(result)], [source, out], whole=whole, linear=linear)


def _select_scatter(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    base, part = inputs[0], inputs[1]
    assert base is not None and part is not None
    dim, letters = argument(node, "dim") % len(base), names("d", len(base))
    one = (*letters[:dim], *letters[dim + 1 :])
    return build([letters, one], [letters], [base, part, outputs[0]], whole=set(letters[dim]), linear=[[0, 1]])


def _triangle(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    (source,) = inputs
    assert source is not None
    letters = names("d", len(source))
    return build([letters], [letters], [source, outputs[0]], whole={letters[-1][0], letters[-2][0]}, linear=[[0]])


def _turned(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    """flip and roll: the dimensions that they turn must be whole, which are all where roll names none."""
    (source,) = inputs
    assert source is not None
    letters = names("d", len(source))
    dims = argument_or(node, "dims") or range(len(source))
    return build([letters], [letters], [source, outputs[0]], whole={letters[d][0] for d in dims}, linear=[[0]])


RULES: dict[str, Derived] = {
    "aten.reshape": _view,
    "aten.expand": _expand,
    "aten.t": _moved(lambda node, rank: list(reversed(range(rank)))),
    "aten.permute": _moved(lambda node, rank: [d % rank for d in argument(node, "dims")]),
    "aten.transpose": _moved(_transposed),
    "aten.unsqueeze": _moved(_unsqueezed),
    "aten.squeeze": _moved(_squeezed),
    "aten.select": _moved(_selected),
    "aten.slice": _slice,
    "aten.slice_scatter": _slice_scatter,
    "aten.select_scatter": _select_scatter,
    **dict.fromkeys(named("split split_with_sizes chunk"), _split),
    "aten.unbind": _unbind,
    "aten.cat": _cat,
    "aten.stack": _stack,
    **dict.fromkeys(named("gather scatter scatter_add"), _gather),
    "aten.index_add": _index_add,
    "aten.one_hot": _one_hot,
    **dict.fromkeys(named("pad constant_pad_nd"), _pad),
    **dict.fromkeys(named("tril triu"), _triangle),
    **dict.fromkeys(named("flip roll"), _turned),
}
