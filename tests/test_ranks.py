"""What each rank is given and keeps: its samples, its shapes, its optimizer's moments. On few processes."""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from models import tiny_model, token_batch
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.tensor.placement_types import _StridedShard

import foldcc
from foldcc.testing import run_distributed


def _stepped(text: str):
    """A Mixtral of one layer in a layout, and its AdamW after a step."""
    mesh = foldcc.FoldedMesh.parse(text, "cpu")
    batch = token_batch(2)
    folded = foldcc.parallelize(tiny_model("mixtral", num_hidden_layers=1), mesh, example_inputs=batch)
    optimizer = torch.optim.AdamW(folded.parameters(), lr=1e-2)
    folded(**batch).loss.backward()
    optimizer.step()
    return folded, optimizer


def _moments(folded, optimizer):
    return {n: optimizer.state[p]["exp_avg"].full_tensor() for n, p in folded.named_parameters() if p in optimizer.state}


def moments_in_another_layout(folder: str) -> dict[str, bool]:
    folded, optimizer = _stepped("tp=2|etp=2")
    wanted = _moments(folded, optimizer)
    assert any(isinstance(q, _StridedShard) for p in folded.parameters() for q in p.placements)
    checkpoint.save(states.get_optimizer_state_dict(folded, optimizer), checkpoint_id=folder)
    full = states.get_optimizer_state_dict(folded, optimizer, options=states.StateDictOptions(full_state_dict=True))
    found = {}
    for text in ("tp=2|etp=2", "tp=2|ep=2"):
        other, its = _stepped(text)
        for group in its.state.values():
            group["exp_avg"].zero_()
        state = states.get_optimizer_state_dict(other, its)
        checkpoint.load(state, checkpoint_id=folder)
        states.set_optimizer_state_dict(other, its, state)
        got = _moments(other, its)
        layouts = all(its.state[p]["exp_avg"].placements == p.placements for p in other.parameters())
        found[text] = layouts and all(torch.equal(got[n], w) for n, w in wanted.items())
        for group in its.state.values():
            group["exp_avg"].zero_()
        options = states.StateDictOptions(full_state_dict=True)
        states.set_optimizer_state_dict(other, its, full, options=options)
        found[f"{text}, full"] = all(torch.equal(_moments(other, its)[n], w) for n, w in wanted.items())
    return found


def test_moments_of_weights_cut_in_blocks_are_stored_and_loaded_in_every_layout():
    with tempfile.TemporaryDirectory() as folder:
        for rank in run_distributed(moments_in_another_layout, 2, folder):
            assert rank and all(rank.values()), rank


def written_over() -> str:
    mesh = foldcc.FoldedMesh.parse("tp=2|etp=2", "cpu")
    folded = foldcc.parallelize(tiny_model("mixtral", num_hidden_layers=1), mesh, example_inputs=token_batch(2))
    state = tiny_model("mixtral", num_hidden_layers=1).state_dict() if dist.get_rank() == 0 else {}
    options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    try:
        states.set_model_state_dict(folded, state, options=options)
    except foldcc.FoldError as error:
        return str(error)
    return "nothing"


def test_a_full_state_dict_that_was_written_over_weights_cut_in_blocks_is_refused():
    for said in run_distributed(written_over, 2):
        assert "was written over as if a rank held one box" in said
