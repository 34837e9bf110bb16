"""Models that know nothing of foldcc: a small GPT in plain PyTorch, with or without experts that a loop goes through.

python examples/your_own_model.py --experts 4 --mesh "dp=2,tp=2|ep=4"
torchrun --nproc-per-node 4 examples/your_own_model.py --experts 4 --mesh "dp=2,tp=2|ep=4"
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import foldcc


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, length: int, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.c_attn, self.c_proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.register_buffer("bias", torch.ones(length, length).tril().view(1, 1, length, length))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in self.c_attn(x).split(c, dim=2))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * k.size(-1) ** -0.5
            y = scores.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf")).softmax(-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


def mlp(hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden))


class Looped(nn.Module):
    """Experts as they are often written: modules in a list, each of which computes the tokens that chose it."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(hidden, experts), nn.ModuleList(mlp(hidden) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens, y = x.view(-1, x.size(-1)), x.new_zeros(x[..., 0].numel(), x.size(-1))
        weights, chosen = self.gate(tokens).softmax(-1).topk(2)
        for i, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == i)
            y.index_add_(0, rows, expert(tokens[rows]) * weights[rows, place, None])
        return y.view_as(x)


def stacked(module: Looped, x: Tensor) -> Tensor:
    """What `Looped` computes, said once, so that its experts may be divided. The class stays as it is."""
    tokens = x.flatten(0, 1)
    weights, chosen = module.gate(tokens).softmax(-1).topk(2)
    up, b_up, down, b_down = (torch.stack(ws) for ws in zip(*(e.parameters() for e in module.experts), strict=True))
    return foldcc.ops.experts(tokens, chosen, weights, up, down, b_up=b_up, b_down=b_down, activation_fn=F.gelu).view_as(x)


foldcc.register_experts(Looped, stacked)


class GPT(nn.Module):
    def __init__(self, vocab: int = 64, hidden: int = 32, layers: int = 2, experts: int = 0, fused: bool = True) -> None:
        super().__init__()
        self.wte, self.wpe, self.ln_f = nn.Embedding(vocab, hidden), nn.Embedding(64, hidden), nn.LayerNorm(hidden)
        self.h = nn.ModuleList(nn.ModuleDict({
            "ln_1": nn.LayerNorm(hidden), "ln_2": nn.LayerNorm(hidden), "attn": Attention(hidden, 4, 64, fused),
            "mlp": Looped(hidden, experts) if experts else mlp(hidden)}) for _ in range(layers))  # fmt: skip
        self.lm_head = nn.Linear(hidden, vocab, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1), device=ids.device))
        for block in self.h:
            x = x + block["attn"](block["ln_1"](x))
            x = x + block["mlp"](block["ln_2"](x))
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def train(model: nn.Module, batches: list[Tensor]) -> list[float]:
    split = {0.1: [p for p in model.parameters() if p.dim() >= 2], 0.0: [p for p in model.parameters() if p.dim() < 2]}
    optimizer = torch.optim.AdamW([{"params": ps, "weight_decay": decay} for decay, ps in split.items()], lr=3e-3)
    losses = []
    for ids in batches:
        _, loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        foldcc.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(arguments: list[str]) -> tuple[list[float], list[float]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mesh", default="dp=2,tp=2")
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="attention that computes its own mask")
    args, launched = parser.parse_args(arguments), "RANK" in os.environ
    mesh = foldcc.FoldedMesh.parse(args.mesh, "cpu" if launched else "virtual")
    torch.manual_seed(0)
    model, batches = GPT(experts=args.experts, fused=not args.eager), list(torch.randint(64, (4, 8, 17)))
    folded = foldcc.parallelize(model, mesh)
    mine = [ids.chunk(mesh.size("dp"))[mesh.coordinate(dist.get_rank(), "dp")] for ids in batches] if launched else batches
    return train(folded, mine), train(model, batches)


if __name__ == "__main__":
    for here, alone in zip(*main(sys.argv[1:]), strict=True):
        print(f"loss {here:.6f}, in one process {alone:.6f}")
    if dist.is_initialized():
        dist.destroy_process_group()
