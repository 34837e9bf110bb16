"""The loss of each token, so that the mean over tokens is an ordinary sum and an ordinary division in the graph."""

from __future__ import annotations

import torch
from torch import Tensor

from foldcc.ops.operator import LIBRARY, without_gradient


def _token_loss(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index)


# As for attention: the captured node stays one node, the local one dissolves into ATen.
LIBRARY.define("token_loss(Tensor logits, Tensor target, int ignore_index) -> Tensor")
LIBRARY.define("local_token_loss(Tensor logits, Tensor target, int ignore_index) -> Tensor")
LIBRARY.impl("local_token_loss", _token_loss, "CompositeImplicitAutograd")
LIBRARY.impl("token_loss", _token_loss, "CompositeExplicitAutograd")
torch.library.register_fake(
    "foldcc::token_loss", lambda logits, target, ignore_index: logits.new_empty(target.shape), lib=LIBRARY
)
without_gradient("token_loss")
token_loss = torch.ops.foldcc.token_loss.default
local_token_loss = torch.ops.foldcc.local_token_loss.default
