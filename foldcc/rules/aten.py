"""Factor rules for ATen operators: a table that a reader checks by eye, and rules that follow from shapes.

A property test holds every rule against the real operator, for every legal sharding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from foldcc.ir.node import argument, argument_or, name_of, operands
from foldcc.ops.captured import captured_record
from foldcc.rules.notation import Letters, Pattern, Rule, notation

aten = torch.ops.aten
Shape = tuple[int, ...]

TABLE = {
    name: notation(text)
    for name, text in {
        "aten.mm": "m k, k n -> m n ; linear 0 | 1",
        "aten.bmm": "b m k, b k n -> b m n ; linear 0 | 1",
        "aten.addmm": "n, m k, k n -> m n ; add 0",
        "aten.linear": "... k, n k, n -> ... n ; linear 0 | 1 ; add 2",
        "aten.histc": "... -> [experts]",
        "aten.rms_norm": "... [h], [h] -> ... [h]",
        "aten.layer_norm": "... [h], [h], [h] -> ... [h]",
        "aten.native_layer_norm": "... [h], [h], [h] -> ... [h], ... one, ... one",
    }.items()
}

_CASTS = ("aten._to_copy", "aten.neg", "aten.mul", "aten.div", "aten.add", "aten.sub", "aten.where", "aten.masked_fill")
_FILLS = ("aten.zeros", "aten.ones", "aten.full", "aten.empty", "aten.new_zeros", "aten.new_ones", "aten.new_full")
_LIKE = ("aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like", "aten.copy", "aten.dropout")
_LIKE += ("aten.pow", "aten.bitwise_not", "aten.clone", "aten.alias", "aten.detach", "aten.lift_fresh_copy")


def rule_of(node: Node) -> Rule | None:
    """The rule of a call of an ATen or foldcc operator, None if it has none."""
    inputs = [None if x is None else _shape(x.meta["val"]) for x in operands(node)]
    value = node.meta["val"]
    outputs = [_shape(v) for v in value] if isinstance(value, (tuple, list)) else [_shape(value)]
    return rule_for(node, inputs, outputs)


def rule_for(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    """The rule of a call whose operands and results have these shapes, None if it has none."""
    rule = _rule_for(node, inputs, outputs)
    if rule is None or 0 not in rule.sizes.values():
        return rule
    return replace(rule, whole=rule.whole | {x for x, n in rule.sizes.items() if n == 0})  # nothing to divide


def mixes_by_argument(node: Node) -> bool:
    """Whether an argument away from its usual value makes the operator mix what its line in a table keeps apart."""
    name = name_of(node.target)
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if name == "aten.embedding":
        return bool(argument(node, "scale_grad_by_freq"))  # its gradient counts the tokens of the whole batch
    if name == "aten.histc":
        return bool(argument(node, "min") == argument(node, "max"))  # the range is that of the whole data
    return len(argument_or(node, "normalized_shape") or ()) > 1  # a line for norms is about one dimension


def _rule_for(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    name, known = name_of(node.target), captured_record(node.target)
    table = TABLE.get(name) if known is None else notation(known.rule_of(node))
    if table is not None:
        while inputs and inputs[-1] is None and len(inputs) > len(table.operands):
            inputs.pop()
        return None if mixes_by_argument(node) else table.rule(inputs, outputs)
    if name in DERIVED:
        return DERIVED[name](node, inputs, outputs)
    pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    if pointwise or name in _LIKE or name in _CASTS:
        return _pointwise(name, node, inputs, outputs)
    return None


def _shape(value: Any) -> Shape | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _names(prefix: str, count: int) -> Pattern:
    return tuple((f"{prefix}{i}",) for i in range(count))


def _build(
    inputs: Sequence[Pattern | None],
    outputs: Sequence[Pattern | None],
    shapes: Sequence[Shape | None],
    *,
    whole: set[str] | frozenset[str] = frozenset(),
    linear: Sequence[Sequence[int]] = (),
    wishes: dict[str, str] | None = None,
    sizes: dict[str, int] | None = None,
) -> Rule:
    sizes = dict(sizes or {})
    for pattern, shape in zip([*inputs, *outputs], shapes, strict=True):
        for dim, size in zip(pattern or (), shape or (), strict=True):
            if len(dim) == 1:
                sizes.setdefault(dim[0], size)
    return Rule(tuple(inputs), tuple(outputs), sizes, frozenset(whole), tuple(map(frozenset, linear)), wishes=wishes or {})


def _pointwise(name: str, node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    (out,) = outputs
    assert out is not None
    letters = _names("d", len(out))
    patterns: list[Pattern | None] = []
    for shape in inputs:
        if shape is None:
            patterns.append(None)
            continue
        tail = list(zip(letters, out, strict=True))[len(out) - len(shape) :]
        patterns.append(tuple(x if n == m else () for n, (x, m) in zip(shape, tail, strict=True)))
    tensors = [i for i, s in enumerate(inputs) if s is not None]
    linear: list[list[int]] = []
    if name == "aten._to_copy" and not node.meta["val"].dtype.is_floating_point:
        linear = []  # rounding a term is not rounding the sum
    elif name in (
        "aten.neg",
        "aten._to_copy",
        "aten.clone",
        "aten.alias",
        "aten.detach",
        "aten.lift_fresh_copy",
    ):
        linear = [[0]]
    elif name == "aten.mul":
        linear = [[i] for i in tensors]
    elif name == "aten.div":
        linear = [[0]] if argument_or(node, "rounding_mode") is None else []
    elif name in ("aten.add", "aten.sub") and len(tensors) == 2:
        linear = [[0, 1]]
    elif name == "aten.where" and len(tensors) == 3:
        linear = [[1, 2]]
    return _build(patterns, [letters], [*inputs, out], linear=linear)


def _fill(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    (out,) = outputs
    assert out is not None
    # The tensor argument, if any, gives only dtype and device.
    empty: list[Pattern | None] = [None for _ in inputs]
    return _build(empty, [_names("d", len(out))], [*[None for _ in inputs], out])


def _arange(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    return _build([], [(("n",),)], [outputs[0]], whole={"n"})


def _view(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    source, target = inputs[0], outputs[0]
    assert source is not None and target is not None
    if 0 in source:
        names = [_names(side, len(shape)) for side, shape in (("x", source), ("y", target))]
        return _build([names[0]], [names[1]], [source, target], whole={x for p in names for (x,) in p}, linear=[[0]])
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
    return _build([patterns[0]], [patterns[1]], [source, target], whole=whole, linear=[[0]], sizes=sizes)


def _expand(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    rule = _pointwise("aten.expand", node, inputs, outputs)
    return Rule(**{**vars(rule), "linear": (frozenset([0]),)})


def _moved(order: Callable[[Node, int], list[int | None]]) -> Callable[..., Rule]:
    """A rule for an operator whose result's dimension i is the operand's dimension order[i], or a new one of size 1."""

    def rule(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
        source, target = inputs[0], outputs[0]
        assert source is not None and target is not None
        letters = _names("d", len(source))
        kept = order(node, len(source))
        dropped = {letters[i][0] for i in range(len(source)) if i not in kept}
        if name_of(node.target) == "aten.squeeze":
            # A dimension that stays must not get size 1 on a rank, where it would go.
            dropped |= {letters[i][0] for i in _dims(node, len(source))}
        result = tuple(() if i is None else letters[i] for i in kept)
        return _build([letters], [result], [source, target], whole=dropped, linear=[[0]])

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
    left, right = list(_names("d", len(source))), list(_names("d", len(source)))
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
    return _build([tuple(left)], [tuple(right)], [source, target], whole=whole, linear=[[0]], sizes=sizes)


def _slice_scatter(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    base, part = inputs[0], inputs[1]
    assert base is not None and part is not None
    dim = argument(node, "dim") % len(base)
    left, right = list(_names("d", len(base))), list(_names("d", len(base)))
    whole = set()
    if base[dim] != part[dim]:
        left[dim], right[dim] = ("all",), ("part",)
        whole = {"all", "part"}
    return _build([tuple(left), tuple(right)], [tuple(left)], [base, part, outputs[0]], whole=whole, linear=[[0, 1]])


def _split(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    (source,) = inputs
    assert source is not None
    dim = argument(node, "dim") % len(source)
    left = list(_names("d", len(source)))
    lengths = {shape[dim] for shape in outputs if shape is not None}
    results: list[Pattern | None] = []
    sizes, whole = {}, set()
    if len(lengths) == 1 and 0 not in lengths:
        (m,) = lengths
        left[dim] = ("pieces", "piece")
        sizes, whole = {"pieces": source[dim] // m, "piece": m}, {"pieces"}
        results = [tuple(("piece",) if i == dim else x for i, x in enumerate(_names("d", len(source))))] * len(outputs)
    else:
        left[dim] = ("all",)
        whole = {"all", *(f"part{k}" for k in range(len(outputs)))}
        for k in range(len(outputs)):
            results.append(tuple((f"part{k}",) if i == dim else x for i, x in enumerate(_names("d", len(source)))))
    return _build([tuple(left)], results, [source, *outputs], whole=whole, linear=[[0]], sizes=sizes)


def _unbind(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    (source,) = inputs
    assert source is not None
    dim = argument(node, "dim") % len(source)
    letters = _names("d", len(source))
    result = tuple(x for i, x in enumerate(letters) if i != dim)
    whole = {letters[dim][0]}
    return _build([letters], [result] * len(outputs), [source, *outputs], whole=whole, linear=[[0]])


def _cat(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    out = outputs[0]
    assert out is not None
    dim = argument(node, "dim") % len(out)
    letters = list(_names("d", len(out)))
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
    return _build(patterns, [tuple(letters)], [*inputs, out], whole=whole, linear=linear, sizes=sizes)


def _stack(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    out = outputs[0]
    assert out is not None
    dim = argument(node, "dim") % len(out)
    letters = _names("d", len(out))
    pattern = tuple(x for i, x in enumerate(letters) if i != dim)
    linear = [list(range(len(inputs)))]
    return _build([pattern] * len(inputs), [letters], [*inputs, out], whole={letters[dim][0]}, linear=linear)


def _dims(node: Node, rank: int) -> set[int]:
    dims = argument_or(node, "dim")
    if dims is None or dims == []:
        return set(range(rank))
    return {d % max(rank, 1) for d in ([dims] if isinstance(dims, int) else dims)}


def _reduced(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    """sum and mean: linear, so that a reduced dimension may be sharded and leaves a partial result."""
    (source,) = inputs
    assert source is not None
    letters, dims = _names("d", len(source)), _dims(node, len(source))
    keep = argument_or(node, "keepdim")
    result = tuple(() if i in dims else x for i, x in enumerate(letters) if keep or i not in dims)
    return _build([letters], [result], [source, outputs[0]], linear=[[0]])


def _along(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    """softmax, topk, sort, cumsum, amax …: one dimension must be whole; the others are independent of each other."""
    if len(inputs) == 2:  # the larger of two tensors
        return _pointwise(name_of(node.target), node, inputs, outputs)
    (source,) = inputs
    assert source is not None
    letters, dims = _names("d", len(source)), _dims(node, len(source))
    whole = {letters[i][0] for i in dims}
    results: list[Pattern | None] = []
    for out in outputs:
        assert out is not None
        if len(out) < len(source):
            results.append(tuple(x for i, x in enumerate(letters) if i not in dims))
            continue
        made = [x if n == m else ("top_k",) for x, n, m in zip(letters, out, source, strict=True)]
        results.append(tuple(() if out[i] == 1 else x for i, x in enumerate(made)))
    whole |= {"top_k"} if any("top_k" in d for r in results for d in r or ()) else set()
    wishes = {"top_k": "k"}
    return _build([letters], results, [source, *outputs], whole=whole, wishes=wishes)


def _gather(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    source, ids = inputs[0], inputs[1]
    assert source is not None and ids is not None
    dim = argument(node, "dim") % len(source)
    if any(n != m for i, (n, m) in enumerate(zip(source, ids, strict=True)) if i != dim):
        return None
    letters, chosen = list(_names("d", len(source))), list(_names("d", len(source)))
    chosen[dim] = ("chosen",)
    whole = {letters[dim][0], "chosen"}
    first, second = tuple(letters), tuple(chosen)
    if name_of(node.target) == "aten.gather":
        return _build([first, second], [second], [source, ids, outputs[0]], whole=whole, linear=[[0]])
    if any(shape != ids for shape in inputs[2:]):
        return None  # only a corner of what is scattered is read
    rest: list[Pattern | None] = [second for _ in inputs[2:]]
    return _build([first, second, *rest], [first], [*inputs, outputs[0]], whole=whole)


def _one_hot(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    (source,) = inputs
    assert source is not None
    if argument(node, "num_classes") < 0:
        return None  # the largest class of the whole data
    letters = _names("d", len(source))
    return _build([letters], [(*letters, ("classes",))], [source, outputs[0]], whole={"classes"})


def _pad(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    source, out = inputs[0], outputs[0]
    assert source is not None and out is not None
    # What is added in front and cut off at the end may keep the size, so the amounts decide, from the last dimension on.
    amounts = list(argument(node, "pad"))
    touched = {len(source) - 1 - i for i in range(len(amounts) // 2) if any(amounts[2 * i : 2 * i + 2])}
    letters = _names("d", len(source))
    result = [(f"padded{i}",) if i in touched else x for i, x in enumerate(letters)]
    whole = {x for i in touched for x in (*letters[i], *result[i])}
    linear = [[0]] if not argument_or(node, "value") else []
    return _build([letters], [tuple(result)], [source, out], whole=whole, linear=linear)


def _select_scatter(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    base, part = inputs[0], inputs[1]
    assert base is not None and part is not None
    dim, letters = argument(node, "dim") % len(base), _names("d", len(base))
    one = (*letters[:dim], *letters[dim + 1 :])
    return _build([letters, one], [letters], [base, part, outputs[0]], whole=set(letters[dim]), linear=[[0, 1]])


def convolved(node: Node, x: Shape, weight: Shape) -> tuple[tuple[Pattern, Pattern, Pattern, Pattern], set[str]] | None:
    """Patterns of a convolution's operand, weight, bias and result, and what must be whole; places mix, samples do not."""
    rank = len(weight) - 2
    if len(x) not in (rank + 1, rank + 2):
        return None
    batch = (("b",),) * (len(x) - rank - 1)
    places, taps, found = _names("s", rank), _names("k", rank), _names("r", rank)
    whole = {x for pattern in (places, taps, found) for (x,) in pattern}
    channels, outputs, inner = ("i",), ("o",), ("i",)
    if argument(node, "groups") != 1:
        inner, whole = ("within",), whole | {"i", "o", "within"}
    first = (outputs, inner, *taps)
    if argument_or(node, "transposed") or "transpose" in name_of(node.target):
        first = (inner, outputs, *taps)
        if argument(node, "groups") != 1:
            first = (channels, inner, *taps)
    return ((*batch, channels, *places), first, (outputs,), (*batch, outputs, *found)), whole


def _convolution(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    x, weight = inputs[0], inputs[1]
    assert x is not None and weight is not None
    known = convolved(node, x, weight)
    if known is None:
        return None
    (first, second, bias, result), whole = known
    biased = len(inputs) > 2 and inputs[2] is not None
    rest: list[Pattern | None] = [bias if biased else None] * len(inputs[2:])
    rule = _build([first, second, *rest], [result], [*inputs, outputs[0]], whole=whole, linear=[[0], [1]])
    return replace(rule, add=frozenset({2} if biased else ()))


def _triangle(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    (source,) = inputs
    assert source is not None
    letters = _names("d", len(source))
    return _build([letters], [letters], [source, outputs[0]], whole={letters[-1][0], letters[-2][0]}, linear=[[0]])


def _matmul(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule:
    """Batches of `m k, k n -> m n`, where a vector has no m or no n and batch dimensions broadcast."""
    x, y, out = inputs[0], inputs[1], outputs[0]
    assert x is not None and y is not None and out is not None
    own = [("m",)] * (len(x) > 1) + [("n",)] * (len(y) > 1)
    batch = _names("b", len(out) - len(own))
    shared = out[: len(batch)]

    def pattern(shape: Shape, last: Sequence[Letters]) -> Pattern:
        outer = shape[: len(shape) - len(last)]
        start = len(batch) - len(outer)
        return (*(b if n == m else () for b, n, m in zip(batch[start:], outer, shared[start:], strict=True)), *last)

    first = pattern(x, [("m",), ("k",)][-len(x) :])
    second = pattern(y, [("k",), ("n",)][: len(y)])
    return _build([first, second], [(*batch, *own)], [x, y, out], linear=[[0], [1]])


def _masked_attention(node: Node, inputs: list[Shape | None], outputs: list[Shape | None]) -> Rule | None:
    """scaled_dot_product_attention with a mask that broadcasts over samples and heads; queries and keys stay whole."""
    rule = notation("b (kv_heads group) q d, b kv_heads k d, b kv_heads k e -> b (kv_heads group) q e ; linear 2").rule(
        inputs[:3], outputs
    )
    if rule is None:
        return None
    mask: Pattern | None = None
    if len(inputs) > 3 and inputs[3] is not None:
        full = (("b",), ("kv_heads", "group"), ("q",), ("k",))[-len(inputs[3]) :]
        wide = [math.prod(rule.sizes[x] for x in dim) for dim in full]
        mask = tuple(dim if n == m else () for dim, n, m in zip(full, inputs[3], wide, strict=True))
    operands_ = (*rule.operands, *([mask] if len(inputs) > 3 else []))
    return Rule(**{**vars(rule), "operands": operands_, "whole": frozenset("qkde")})


def _tables() -> Iterator[tuple[str, Callable[..., Rule | None]]]:
    yield from ((n, _fill) for n in (*_FILLS, "aten.new_empty", "aten.scalar_tensor"))
    yield "aten.reshape", _view
    yield from ((n, _reduced) for n in ("aten.sum", "aten.mean"))
    along = "softmax log_softmax _softmax _log_softmax topk sort argsort cumsum cumprod"
    along += " amax amin argmax max min any all prod"
    yield from ((f"aten.{n}", _along) for n in along.split())
    yield from ((f"aten.{n}", _split) for n in ("split", "split_with_sizes", "chunk"))
    yield from ((f"aten.{n}", _gather) for n in ("gather", "scatter", "scatter_add"))
    yield from ((f"aten.{n}", _triangle) for n in ("tril", "triu"))
    yield from ((f"aten.{n}", _pad) for n in ("pad", "constant_pad_nd"))
    yield "aten.arange", _arange
    yield "aten.matmul", _matmul
    yield "aten.scaled_dot_product_attention", _masked_attention
    yield "aten.expand", _expand
    yield "aten.t", _moved(lambda node, rank: list(reversed(range(rank))))
    yield "aten.permute", _moved(lambda node, rank: [d % rank for d in argument(node, "dims")])
    yield "aten.transpose", _moved(_transposed)
    yield "aten.unsqueeze", _moved(_unsqueezed)
    yield "aten.squeeze", _moved(_squeezed)
    yield "aten.select", _moved(_selected)
    yield "aten.slice", _slice
    yield "aten.slice_scatter", _slice_scatter
    yield "aten.unbind", _unbind
    yield "aten.cat", _cat
    yield "aten.stack", _stack
    yield "aten.one_hot", _one_hot
    yield "aten.select_scatter", _select_scatter
    convolutions = "convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
    yield from ((f"aten.{n}", _convolution) for n in convolutions.split())


DERIVED = dict(_tables())
__all__ = ["DERIVED", "TABLE", "argument", "name_of", "operands", "rule_for", "rule_of"]
