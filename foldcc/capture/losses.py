"""Losses over classes as what they are made of: the loss of each sample or token, a sum of them, and a division by a count.

    loss = cross_entropy_loss(logits, target)                    # mean over valid tokens
becomes
    loss = sum(token_loss(logits, target)) / sum(target != ignore_index)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from foldcc import ops
from foldcc.ir.node import argument
from foldcc.ir.rewrite import emit

aten = torch.ops.aten
MEAN, SUM = 1, 2


class _Loss(NamedTuple):
    """A call that stands before `node`, over rows [t, c] and a target for each: classes [t], or probabilities [t, c]."""

    node: fx.Node
    rows: fx.Node
    target: fx.Node

    def emit(self, target: Any, *args: Any) -> fx.Node:
        return emit(self.node, target, *args)

    def summed(self, by_class: fx.Node) -> fx.Node:
        return self.emit(aten.neg.default, self.emit(aten.sum.dim_IntList, by_class, [-1]))

    def weighed(self, weight: fx.Node | None, x: fx.Node) -> fx.Node:
        """What is known of each class [t, c], times its weight."""
        return x if weight is None else self.emit(aten.mul.Tensor, x, weight)

    def of_target(self, x: fx.Node) -> fx.Node:
        """Of numbers [t, c] those of the targets, [t, 1]; of the first class where the target is no class."""
        ignored = self.emit(aten.eq.Scalar, self.target, argument(self.node, "ignore_index"))
        there = self.emit(aten.masked_fill.Scalar, self.target, ignored, 0)
        return self.emit(aten.gather.default, x, -1, self.emit(aten.unsqueeze.default, there, -1))


def cross_entropy(node: fx.Node) -> fx.Node:
    logits, target, smoothing = (argument(node, name) for name in ("self", "target", "label_smoothing"))
    if logits.meta["val"].dim() < 2:
        return node
    loss, weight = _rows(node, logits, target), argument(node, "weight")
    if target.meta["val"].is_floating_point():
        return _of_probabilities(loss, weight, smoothing)
    each = loss.emit(ops.token_loss, loss.rows, loss.target, argument(node, "ignore_index"))
    each = each if weight is None else loss.emit(aten.mul.Tensor, each, _weights(loss, weight))
    if smoothing:
        logs = loss.weighed(weight, loss.emit(aten.log_softmax.int, loss.rows, -1))
        even = loss.emit(aten.div.Scalar, loss.summed(logs), loss.rows.meta["val"].shape[-1])
        each = loss.emit(aten.mul.Scalar, each, 1 - smoothing)
        each = loss.emit(aten.add.Tensor, each, loss.emit(aten.mul.Scalar, _without_ignored(loss, even), smoothing))
    return _reduced(loss, each, target, weight)


def nll(node: fx.Node) -> fx.Node:
    logs, target, weight = (argument(node, name) for name in ("self", "target", "weight"))
    if logs.meta["val"].dim() < 2:
        return node
    loss = _rows(node, logs, target)
    each = _without_ignored(loss, loss.emit(aten.neg.default, loss.emit(aten.squeeze.dim, loss.of_target(loss.rows), -1)))
    each = each if weight is None else loss.emit(aten.mul.Tensor, each, _weights(loss, weight))
    return _reduced(loss, each, target, weight)


def _rows(node: fx.Node, values: fx.Node, target: fx.Node) -> _Loss:
    """Classes are the second dimension, and last in rows."""
    shape = values.meta["val"].shape
    if len(shape) == 2:
        return _Loss(node, values, target)
    alike = target.meta["val"].dim() == len(shape)
    count = target.meta["val"].numel() // (shape[1] if alike else 1)
    last = [0, *range(2, len(shape)), 1]
    rows = emit(node, aten.reshape.default, emit(node, aten.permute.default, values, last), [count, shape[1]])
    flat = emit(node, aten.permute.default, target, last) if alike else target
    return _Loss(node, rows, emit(node, aten.reshape.default, flat, [count, shape[1]] if alike else [count]))


def _of_probabilities(loss: _Loss, weight: fx.Node | None, smoothing: float) -> fx.Node:
    target, classes = loss.target, loss.rows.meta["val"].shape[-1]
    if smoothing:
        target = loss.emit(aten.add.Scalar, loss.emit(aten.mul.Scalar, target, 1 - smoothing), smoothing / classes)
    logs = loss.weighed(weight, loss.emit(aten.log_softmax.int, loss.rows, -1))
    each = loss.summed(loss.emit(aten.mul.Tensor, logs, target))
    if argument(loss.node, "reduction") == MEAN:
        return loss.emit(aten.mean.default, each)
    return _reduced(loss, each, None, None)


def _weights(loss: _Loss, weight: fx.Node) -> fx.Node:
    """The weight of each target's class [t]; none where it is ignored."""
    wide = loss.emit(aten.expand.default, weight, list(loss.rows.meta["val"].shape))
    return _without_ignored(loss, loss.emit(aten.squeeze.dim, loss.of_target(wide), -1))


def _without_ignored(loss: _Loss, each: fx.Node) -> fx.Node:
    ignored = loss.emit(aten.eq.Scalar, loss.target, argument(loss.node, "ignore_index"))
    return loss.emit(aten.masked_fill.Scalar, each, ignored, 0)


def _reduced(loss: _Loss, each: fx.Node, target: fx.Node | None, weight: fx.Node | None) -> fx.Node:
    """The losses in the shape of the targets, or their sum, or that divided by how many count, or by their weights."""
    reduction = argument(loss.node, "reduction")
    if reduction not in (MEAN, SUM):
        shape = loss.node.meta["val"].shape
        return each if len(shape) == 1 else loss.emit(aten.reshape.default, each, list(shape))
    total = loss.emit(aten.sum.default, each)
    if reduction == SUM:
        return total
    assert target is not None
    counted = (
        loss.emit(aten.ne.Scalar, target, argument(loss.node, "ignore_index")) if weight is None else _weights(loss, weight)
    )
    return loss.emit(aten.div.Tensor, total, loss.emit(aten.sum.default, counted))
