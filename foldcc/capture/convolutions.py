"""Convolutions that look back alone, as one node: PyTorch has them as one that looks both ways, of which a part is read.

    y = conv1d(x, w, padding=taps - 1)[:, :, :s]    or    y = conv1d(pad(x, (taps - 1, 0)), w)
becomes
    y = causal_conv(x, w)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from foldcc.ir.node import argument, name_of
from foldcc.ir.rewrite import emit, replace_node
from foldcc.ops.convolution import causal_conv

_PADS = {"aten.pad", "aten.constant_pad_nd"}


def causal(node: fx.Node) -> fx.Node:
    """What stands in the place of an `aten.conv1d`, which is the same node if it looks ahead, too."""
    x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
    channels, (outputs, within, taps) = x.meta["val"].shape[-2], weight.meta["val"].shape
    groups, back = argument(node, "groups"), taps - 1
    depthwise = groups == channels == outputs and within == 1 and channels > 1
    simple = list(argument(node, "stride")) == list(argument(node, "dilation")) == [1]
    if not simple or x.meta["val"].dim() != 3 or not (groups == 1 or depthwise):
        return node
    if list(argument(node, "padding")) == [back] and back:
        length = x.meta["val"].shape[2]
        if not node.users or not all(_is_front(user, node, length) for user in node.users):
            return node
        y = emit(node, causal_conv, x, weight, bias, depthwise)
        for user in list(node.users):
            replace_node(user, y)
        return node
    if list(argument(node, "padding")) == [0] and _is_padded(x, back):
        return emit(node, causal_conv, x.args[0], weight, bias, depthwise)
    return node


def _is_front(user: fx.Node, node: fx.Node, length: int) -> bool:
    """Whether a value is the first positions of a convolution."""
    if user.target is not torch.ops.aten.slice.Tensor or user.args[0] is not node:
        return False
    start, stop, step = (argument(user, name) for name in ("start", "end", "step"))
    return argument(user, "dim") in (2, -1) and start in (None, 0) and stop == length and step == 1


def _is_padded(x: Any, back: int) -> bool:
    """Whether a value is another one behind so many zeros."""
    if name_of(x.target) not in _PADS or list(x.args[1]) != [back, 0]:
        return False
    value = argument(x, "value")
    return not value and (name_of(x.target) != "aten.pad" or argument(x, "mode") == "constant")
