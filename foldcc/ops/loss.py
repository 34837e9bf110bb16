"""The loss of each token, so that the mean over tokens is an ordinary sum and an ordinary division in the graph."""

from __future__ import annotations

import torch
from torch import Tensor

from foldcc.ops.operator import LIBRARY, without_gradient


def _token_loss(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index)


def token_loss_in_pieces(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The same in operators that kernels join with what is around them: of each token, two numbers are kept."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shifted = wide - wide.detach().amax(-1, True)
    valid = target != ignore_index
    picked = shifted.gather(-1, torch.where(valid, target, 0).unsqueeze(-1)).squeeze(-1)
    return ((shifted.exp().sum(-1).log() - picked) * valid).to(logits.dtype)


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
