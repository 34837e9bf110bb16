"""The loss of each token, so that the mean over tokens is an ordinary sum and an ordinary division in the graph."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from foldcc.layout import INVARIANT, PARTIAL, VARYING, Layout
from foldcc.ops.captured import Division, Index, Site, captured
from foldcc.ops.collectives import all_reduce, all_reduce_max
from foldcc.ops.positions import looked_up, within

aten = torch.ops.aten


def _token_loss(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index)


def _in_pieces(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The same in operators that kernels join with what is around them: of each token, two numbers are kept."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shifted = wide - wide.detach().amax(-1, True)
    valid = target != ignore_index
    picked = shifted.gather(-1, torch.where(valid, target, 0).unsqueeze(-1)).squeeze(-1)
    return (shifted.exp().sum(-1).log() - picked).masked_fill(~valid, 0).to(logits.dtype)


def _vocabulary(at: Site, logits: Node, target: Node, ignore_index: int) -> Node:
    """Over a divided vocabulary: the largest logit, the sum of exponentials and the target's logit are joined."""
    emit, axes, layout = at.emit, at.axes, at.layout
    vocab = axes.split(",")
    wide: Layout = logits.meta["layout"]
    partial = replace(layout, states={**layout.states, **dict.fromkeys(vocab, PARTIAL)})
    fixed = emit(aten.detach.default, (logits,), wide)
    column = replace(layout, dims=(*layout.dims, ()))
    own = replace(column, states={**column.states, **dict.fromkeys(vocab, VARYING)})
    largest = emit(all_reduce_max, (emit(aten.amax.default, (fixed, [-1], True), own), axes), column)
    shifted = emit(aten.sub.Tensor, (logits, largest), wide)
    powers = emit(aten.sum.dim_IntList, (emit(aten.exp.default, (shifted,), wide), [-1]), partial)
    total = emit(all_reduce, (powers, axes, INVARIANT), layout)
    mine, inside = within(emit, axes, wide.shape[1], target, layout)
    places = looked_up(emit, mine, inside, target, wide.global_shape[1], layout, ignore_index)
    index = emit(aten.unsqueeze.default, (places, -1), own)
    varying = replace(layout, states=own.states)
    picked = emit(aten.squeeze.dim, (emit(aten.gather.default, (shifted, -1, index), own), -1), varying)
    picked = emit(aten.mul.Tensor, (picked, inside), partial)
    picked = emit(all_reduce, (picked, axes, INVARIANT), layout)
    each = emit(aten.sub.Tensor, (emit(aten.log.default, (total,), layout), picked), layout)
    ignored = emit(aten.eq.Scalar, (target, ignore_index), layout)
    return emit(aten.masked_fill.Scalar, (each, ignored, 0), layout)  # a product would be NaN where the mean is over none


token_loss = captured(
    "token_loss(Tensor logits, Tensor target, int ignore_index) -> Tensor",
    meaning="the cross entropy of each token",
    eager=_token_loss,
    shape=lambda logits, target, ignore_index: logits.new_empty(target.shape),
    in_pieces=_in_pieces,
    rule="t vocab, t -> t",
    divisions=(Division(("vocab",), stretch=True, ends_sum=True, lower=_vocabulary),),
    degree=lambda read: max(read),
    index=Index(operand="target", table="logits", dim=1, ignored="ignore_index"),
).overload
