"""A Mixture-of-Experts language model in plain PyTorch, folded on eight virtual ranks.

python examples/quickstart.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import foldcc


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, experts: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.experts_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * width, hidden) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        tokens = self.experts_norm(x).flatten(0, 1)
        weights, ids = self.router(tokens).softmax(-1).topk(2)
        y = foldcc.ops.experts(tokens, ids, weights, self.up, self.down, activation_fn=swiglu)
        return x + y.view_as(x)


def swiglu(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, -1)
    return F.silu(gate) * up


class Model(nn.Module):
    def __init__(self, vocab: int = 128, hidden: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, hidden), nn.Linear(hidden, vocab, bias=False)
        self.blocks = nn.ModuleList(Block(hidden, heads=4, experts=8, width=96) for _ in range(layers))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


torch.manual_seed(0)
model = Model()
ids = torch.randint(128, (8, 33))
batch = {"ids": ids[:, :-1], "labels": ids[:, 1:]}

mesh = foldcc.init_folded_mesh("virtual", attention={"dp": 4, "tp": 2}, moe={"ep": 8})
folded = foldcc.parallelize(model, mesh, example_inputs=batch)

loss = folded(**batch)
loss.backward()
print(f"loss {loss:.6f}, in one process {model(**batch):.6f}")
foldcc.clip_grad_norm_(folded.parameters(), 1.0)
torch.optim.AdamW(folded.parameters()).step()

print(folded.stages)
print(folded.collectives())
