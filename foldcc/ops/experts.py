"""Mixture-of-Experts operators: `experts`, the node that is captured, and the ones that dispatch makes of it.

Shape suffixes: T tokens, H hidden, E experts, K chosen experts per token, I expert width, U rows (token, choice) that a
rank holds, P ranks of ep, Q ranks of etp. A gated expert's up projection has 2 * I outputs: gate and up, one after the
other or interleaved.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Tracer

from foldcc.errors import FoldError
from foldcc.ops.autocast import in_autocast_dtype
from foldcc.ops.capacity import Capacity, limited
from foldcc.ops.captured import captured
from foldcc.ops.operator import Operator, operator

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {}


class _Inline(Tracer):
    """Traces through submodules: an activation is a function, not a module tree."""

    def call_module(self, m: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs)


def activation(fn: Callable[[Tensor], Tensor]) -> str:
    """Registers what an expert does between its two projections and returns its text, which is its name in a graph.

    Args:
        fn: `[U, 2 * I] -> [U, I]` for gated experts, `[U, I] -> [U, I]` otherwise. It must not depend on sizes.
    """
    graph = _Inline().trace(lambda x: fn(x))
    text = ""
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            raise FoldError(f"An expert activation may not have parameters of its own, this one reads {node.target}.")
        if node.op == "call_function" or node.op == "call_method":
            name = node.target if isinstance(node.target, str) else node.target.__name__
            values = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
            text += f"{node.name}={name}({values}); "
    text = text.rstrip("; ") or "identity"
    _ACTIVATIONS.setdefault(text, torch.fx.GraphModule(torch.nn.Module(), graph).forward)
    return text


@torch.compiler.assume_constant_result
def _text(fn: Callable[..., Tensor], owner: Any) -> str:
    """`activation` for Dynamo, which runs this while it traces; it cannot hand over a bound method, but both its halves."""
    return activation(fn if owner is None else MethodType(fn, owner))


def activate(rows: Tensor, text: str) -> Tensor:
    """Applies the activation that `activation` registered under `text`."""
    return _ACTIVATIONS[text](rows)


def _shape_of_outer(x: Tensor, grad: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    n, k = grad.shape[1], x.shape[1]
    return x.new_empty((counts.shape[0], k, n) if transposed else (counts.shape[0], n, k))


def _ranges(counts: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of each expert."""
    found, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        found.append((expert, start, start + count))
        start += count
    return found


def _grouped_linear(x: Tensor, w: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    y = x.new_empty(x.shape[0], w.shape[2] if transposed else w.shape[1])
    for e, a, b in _ranges(counts):
        torch.mm(x[a:b], w[e] if transposed else w[e].t(), out=y[a:b])
    return y


def _grouped_outer(x: Tensor, grad: Tensor, counts: Tensor, transposed: bool) -> Tensor:
    w = _shape_of_outer(x, grad, counts, transposed)
    first, second = (x, grad) if transposed else (grad, x)
    for e, a, b in _ranges(counts):
        torch.mm(first[a:b].t(), second[a:b], out=w[e])  # zeros, where there are no rows
    return w


grouped_linear: Operator = operator(
    "grouped_linear(Tensor x, Tensor w, Tensor counts, bool transposed) -> Tensor",
    meaning="rows of expert e times its weight; counts[e] rows each, in order; w is [e, n, k], or [e, k, n] if transposed",
    eager=_grouped_linear,
    shape=lambda x, w, counts, transposed: x.new_empty(x.shape[0], w.shape[2] if transposed else w.shape[1]),
    transpose=lambda grad, x, w, counts, transposed: (
        grouped_linear(grad, w, counts, not transposed),
        grouped_outer(x, grad, counts, transposed),
    ),
)

grouped_outer: Operator = operator(
    "grouped_outer(Tensor x, Tensor grad, Tensor counts, bool transposed) -> Tensor",
    meaning="the weight gradient of grouped_linear: zero for an expert without rows",
    eager=_grouped_outer,
    shape=_shape_of_outer,
)


def _unsorted(rows: Tensor, order: Tensor) -> Tensor:
    """The rows as they stood before `rows[order]`, or its like, put them in order."""
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    return rows.index_select(0, inverse)  # on CPU several times faster than rows[inverse]


def _unpermute(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    rows_TKH = _unsorted(rows, order).unflatten(0, weights.shape)
    return (weights.unsqueeze(1) @ rows_TKH).squeeze(1)


def _weigh(grad_TH: Tensor, rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    rows_TKH = _unsorted(rows, order).unflatten(0, weights.shape)
    return (rows_TKH @ grad_TH.unsqueeze(2)).squeeze(2)


permute = operator(
    "permute(Tensor x, Tensor order, int copies) -> Tensor",
    meaning="row i is the token order[i] // copies: every token `copies` times, sorted by `order`",
    eager=lambda x, order, copies: x.index_select(0, order // copies if copies > 1 else order),
    shape=lambda x, order, copies: x.new_empty((order.shape[0], *x.shape[1:])),
    transpose=lambda grad, x, order, copies: gather_rows(grad, order, copies),
)

gather_rows: Operator = operator(
    "gather_rows(Tensor rows, Tensor order, int copies) -> Tensor",
    meaning="the transpose of permute: the copies of each token, summed",
    eager=lambda rows, order, copies: (
        _unsorted(rows, order).unflatten(0, (-1, copies)).sum(1) if copies > 1 else _unsorted(rows, order)
    ),
    shape=lambda rows, order, copies: rows.new_empty((order.shape[0] // copies, *rows.shape[1:])),
    transpose=lambda grad, rows, order, copies: permute(grad, order, copies),
)

unpermute = operator(
    "unpermute(Tensor rows, Tensor order, Tensor weights) -> Tensor",
    meaning="each token's rows, weighted and summed; weights is [T, K]",
    eager=_unpermute,
    shape=lambda rows, order, weights: rows.new_empty(weights.shape[0], rows.shape[1]),
    transpose=lambda grad, rows, order, weights: (
        permute(grad, order, weights.shape[1]) * weights.flatten()[order].unsqueeze(1),
        None,
        unpermute_weights(grad, rows, order, weights),
    ),
)

unpermute_weights: Operator = operator(
    "unpermute_weights(Tensor grad, Tensor rows, Tensor order, Tensor weights) -> Tensor",
    meaning="the gradient of unpermute with respect to its weights",
    eager=_weigh,
    shape=lambda grad, rows, order, weights: torch.empty_like(weights),
)

count = operator(
    "count(Tensor ids, int experts) -> Tensor",
    meaning="how many choices fell on each expert: [E], int64",
    eager=lambda ids, experts: torch.bincount(ids.flatten(), minlength=experts),
    shape=lambda ids, experts: ids.new_empty(experts, dtype=torch.int64),
)


def _splits(counts: Tensor, arriving: Tensor, ep: int, etp: int, place: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sent = counts.view(ep, -1)
    arriving = arriving.view(ep, etp, -1)
    host = torch.cat([sent.sum(1), arriving.flatten(), place.view(1)]).cpu()
    arriving_PQE = host[ep:-1].view(ep, etp, -1)
    received = arriving_PQE[:, int(host[-1])].sum(-1)
    # Rows stand by source: etp, then ep, then expert.
    return host[:ep], received, arriving_PQE.sum((0, 2)), arriving_PQE.transpose(0, 1).flatten()


splits = operator(
    "splits(Tensor counts, Tensor arriving, int ep, int etp, Tensor place) -> (Tensor, Tensor, Tensor, Tensor)",
    meaning="on the host: rows sent to and received from each ep rank, rows of each etp rank, rows of each (source, expert)",
    eager=_splits,
    shape=lambda counts, arriving, ep, etp, place: (
        torch.empty(ep, dtype=torch.int64, device="cpu"),
        torch.empty(ep, dtype=torch.int64, device="cpu"),
        torch.empty(etp, dtype=torch.int64, device="cpu"),
        torch.empty(arriving.numel(), dtype=torch.int64, device="cpu"),
    ),
)


def _by_expert(rows: Tensor, chunks: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    expert = torch.arange(chunks.shape[0]).remainder(experts).repeat_interleave(chunks)
    order = torch.argsort(expert, stable=True)
    return order.to(rows.device), chunks.view(-1, experts).sum(0)


by_expert = operator(
    "by_expert(Tensor rows, Tensor chunks, int experts) -> (Tensor, Tensor)",
    meaning="the order that puts the rows of one expert together, and each expert's number of rows, on the host",
    eager=_by_expert,
    shape=lambda rows, chunks, experts: (
        rows.new_empty(rows.shape[0], dtype=torch.int64),
        chunks.new_empty(experts),
    ),
)


def each_expert(
    rows: Tensor,
    counts: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    act: str,
    transposed: bool,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """The feed-forward layer of each expert on its own rows, `counts[e]` of them, in order of the experts."""
    order = None
    if b_up is not None or b_down is not None:
        order = expert_of_row(rows, counts)
    hidden = grouped_linear(rows, w_up, counts, transposed)
    if b_up is not None:
        hidden = hidden + b_up[order]
    y = grouped_linear(activate(hidden, act), w_down, counts, transposed)
    return y if b_down is None else y + b_down[order]


expert_of_row = operator(
    "expert_of_row(Tensor rows, Tensor counts) -> Tensor",
    meaning="the expert that each row belongs to, when counts[e] rows stand in order of the experts",
    eager=lambda rows, counts: torch.arange(counts.shape[0]).repeat_interleave(counts.cpu()).to(rows.device),
    shape=lambda rows, counts: rows.new_empty(rows.shape[0], dtype=torch.int64),
)


def _experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    act: str,
    transposed: bool,
    interleaved: bool,
    absent: bool = False,
    most: int = 0,
    group: int = 0,
) -> Tensor:
    if absent:
        ids = ids.clamp(max=w_up.shape[0] - 1)  # any expert will do, for the weight is zero
    order = torch.argsort(ids.flatten(), stable=True)
    counts = count(ids, w_up.shape[0])
    rows = each_expert(permute(x, order, ids.shape[1]), counts, w_up, w_down, act, transposed, b_up, b_down)
    return unpermute(rows, order, weights.to(rows.dtype))


def _defined(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_up: Tensor | None,
    b_down: Tensor | None,
    act: str,
    transposed: bool,
    interleaved: bool,
    absent: bool = False,
    most: int = 0,
    group: int = 0,
) -> Tensor:
    """The same without permuting a row: a sum over all experts of what each makes of its tokens, weighted."""
    y = torch.zeros_like(x)
    for e in range(w_up.shape[0]):
        weight = torch.where(ids == e, weights, 0.0).sum(-1, keepdim=True)
        rows = (ids == e).any(-1).nonzero().squeeze(1)
        up, down = (w_up[e], w_down[e]) if transposed else (w_up[e].t(), w_down[e].t())
        hidden = x[rows] @ up if b_up is None else x[rows] @ up + b_up[e]
        out = activate(hidden, act) @ down
        out = out if b_down is None else out + b_down[e]
        y = y.index_add(0, rows, out * weight[rows])
    return y


def _rule(transposed: bool, interleaved: bool, **_: Any) -> str:
    wide = "[expert_width gates]" if interleaved else "[gates expert_width]"
    up, down = f"[experts] {wide} [hidden]", "[experts] [hidden] [expert_width]"
    if transposed:
        up, down = f"[experts] [hidden] {wide}", "[experts] [expert_width] [hidden]"
    return f"t [hidden], t [k], t [k], {up}, {down}, [experts] {wide}, [experts] [hidden] -> t [hidden]"


def _products(ids: Any, w_up: Any, w_down: Any, **_: Any) -> list[tuple[float, tuple[str, ...], tuple[str, ...]]]:
    weights = {"w_up": w_up, "w_down": w_down}  # [experts, outputs, inputs], in either order of the last two
    return [(2 * prod(ids) * prod(w[1:]), ("x",), (name,)) for name, w in weights.items()]


experts_record = captured(
    "experts(Tensor x, Tensor ids, Tensor weights, Tensor w_up, Tensor w_down, Tensor? b_up, Tensor? b_down, "
    "str act, bool transposed, bool interleaved, bool absent=False, int most=0, int group=0) -> Tensor",
    meaning="a Mixture-of-Experts layer after its router; absent: ids may be E, which is no expert, where the weight is zero; "
    "most: what an expert takes of a group of tokens, to which it is padded, where it is not 0",
    eager=_experts,
    defined=_defined,
    shape=lambda x, *_: torch.empty_like(x),
    narrow={"x", "w_up", "w_down", "b_up", "b_down"},
    returns="x",
    dissolves=False,  # `dispatch` puts operators in its place that send tokens to where their experts are
    rule=_rule,
    placed={"experts": "ep", "expert_width": "etp"},
    products=_products,
    degree=lambda read: 2 * (read[0] + 1) + 2 + max(read),
    pinned=("experts",),
)
experts_node = experts_record.overload


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation_fn: Callable[[Tensor], Tensor],
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    transposed: bool = False,
    interleaved: bool = False,
    capacity: Capacity | None = None,
) -> Tensor:
    """A Mixture-of-Experts layer after its router: `y[t] = sum_k weights[t, k] * expert[ids[t, k]](x[t])`.

    Call it in a model's forward, and foldcc lays the experts out over `ep` and `etp`. Without foldcc it computes the
    same in plain PyTorch, with gradients.

    Args:
        x: tokens, [T, H].
        ids: chosen experts, [T, K], int64, each in 0 .. E - 1.
        weights: their weights, [T, K], applied after the down projection.
        w_up: [E, 2 * I, H] when `activation_fn` is gated, else [E, I, H]; last two dims swapped if `transposed`.
        w_down: [E, H, I]; last two dims swapped if `transposed`.
        activation_fn: what happens between the projections, on `[rows, 2 * I]` or `[rows, I]`.
        b_up, b_down: optional biases, [E, 2 * I] or [E, I], and [E, H].
        transposed: the weights are stored input-major.
        interleaved: gate and up alternate (gate0, up0, gate1, …) instead of standing one after the other.
        capacity: how many tokens of a group an expert takes; without one, all that chose it. What is beyond it is dropped: its
            weight is zero.

    Raises:
        FoldError: the widths do not fit together, or the capacity does not fit the tokens.
    """
    up, down = (w_up.shape[2], w_down.shape[1]) if transposed else (w_up.shape[1], w_down.shape[2])
    if up % down:
        raise FoldError(f"The experts' up projection has {up} outputs, no multiple of the down projection's {down} inputs.")
    if isinstance(activation_fn, MethodType):
        act = _text(activation_fn.__func__, activation_fn.__self__)
    else:
        act = _text(activation_fn, None)
    if capacity is not None:
        weights = limited(ids, weights, w_up.shape[0], capacity)
    given = (x, ids, weights, w_up, w_down, b_up, b_down, act, transposed, interleaved)
    if torch.compiler.is_exporting() or torch.compiler.is_compiling():
        return experts_node(*given)
    if torch.is_autocast_enabled(x.device.type):  # which does not see what is inside
        return cast(Tensor, in_autocast_dtype(_experts, given, x.device.type, (0, 3, 4, 5, 6), returned=0))
    return _experts(*given)
