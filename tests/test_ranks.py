"""What each rank is given and keeps: its samples, its shapes, its optimizer's moments. On few processes."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from models import tiny_model, token_batch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.tensor.placement_types import _StridedShard
from versions import joins_blocks

import foldcc
from foldcc.runtime import placement
from foldcc.samples import sample_dims
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


@joins_blocks
def test_moments_of_weights_cut_in_blocks_are_stored_and_loaded_in_every_layout():
    with tempfile.TemporaryDirectory() as folder:
        for rank in run_distributed(moments_in_another_layout, 2, folder):
            assert rank and all(rank.values()), rank


class Gated(nn.Module):
    """A weight that tp divides in two blocks, and one that it does not."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Parameter(torch.randn(32, 16) / 4), nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (x @ self.up.T).chunk(2, -1)
        return torch.sigmoid(gate) * up @ self.down


def whole_values_loaded() -> dict[str, bool | str]:
    mesh, x, found = foldcc.FoldedMesh.parse("tp=2", "cpu"), torch.ones(2, 4, 16), {}
    given, first = Gated(seed=1), dist.get_rank() == 0
    trained = torch.optim.AdamW(given.parameters())
    given(x * torch.arange(16)).sum().backward()
    trained.step()
    moments = states.get_optimizer_state_dict(given, trained)

    def equal(folded: nn.Module) -> bool:
        return all(torch.equal(p.full_tensor(), given.get_parameter(n)) for n, p in folded.named_parameters())

    for meta in (False, True):
        for broadcast in (False, True):
            with torch.device("meta" if meta else "cpu"):
                model = Gated()
            folded = foldcc.parallelize(model, mesh, example_inputs=(x,))
            assert any(isinstance(p, _StridedShard) for p in folded.up.placements)
            options = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
            state = given.state_dict() if first or not broadcast else {}
            states.set_model_state_dict(folded, state, options=options)
            found[f"weights, {meta=}, {broadcast=}"] = equal(folded) and torch.allclose(folded(x), given(x))
            if meta:
                continue
            optimizer = torch.optim.AdamW(folded.parameters())
            folded(x).sum().backward()
            optimizer.step()
            states.set_optimizer_state_dict(folded, optimizer, moments if first or not broadcast else {}, options=options)
            wanted = {n: trained.state[p]["exp_avg"] for n, p in given.named_parameters()}
            found[f"moments, {broadcast=}"] = all(torch.equal(m, wanted[n]) for n, m in _moments(folded, optimizer).items())
    try:
        folded.load_state_dict({**folded.state_dict(), "up": folded.up})
    except foldcc.FoldError as error:
        found["said"] = str(error)
    return found


def told_without_joining() -> dict[str, str]:
    placement.BLOCKS_ARE_JOINED = False  # as with PyTorch 2.11
    try:
        x = torch.ones(2, 4, 16)
        folded = foldcc.parallelize(Gated(), foldcc.FoldedMesh.parse("tp=2", "cpu"), example_inputs=(x,))
        optimizer = torch.optim.AdamW(folded.parameters())
        folded(x).sum().backward()
        optimizer.step()
        loads = {f"load, {assign=}": partial(folded.load_state_dict, Gated().state_dict(), assign=assign) for assign in (0, 1)}
        return {
            what: said(call) for what, call in {**loads, "weights": folded.state_dict, "moments": optimizer.state_dict}.items()
        }
    finally:
        placement.BLOCKS_ARE_JOINED = True


def test_a_version_that_joins_no_blocks_trains_and_neither_stores_nor_loads_them():
    for found in run_distributed(told_without_joining, 2):
        assert len(found) == 4
        for told in found.values():
            assert "A weight is cut in several blocks" in told
            assert "PyTorch 2.12 or later" in told


@joins_blocks
def test_whole_values_of_weights_cut_in_blocks_are_loaded_from_rank_0_and_from_all():
    for found in run_distributed(whole_values_loaded, 2):
        assert "up was written over as if a rank held one box" in found.pop("said")  # what PyTorch would do by itself
        assert len(found) == 6 and all(found.values()), found


class SequenceFirst(nn.Module):
    """Attention over dimension 0; samples are in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.q, self.head = nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 32)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.e(ids)
        s, b, h = x.shape
        q = self.q(x).view(s, b, 2, 8).permute(1, 2, 0, 3)
        y = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).permute(2, 0, 1, 3).reshape(s, b, h)
        return nn.functional.cross_entropy(self.head(x + y).flatten(0, 1), labels.flatten())


def sequence_first(ids: Tensor) -> tuple[str, float, dict[str, Tensor]]:
    mine = ids.chunk(2, 1)[dist.get_rank()].contiguous()
    batch = {"ids": mine, "labels": mine}
    mesh = foldcc.FoldedMesh.parse("dp=2", "cpu")
    try:
        foldcc.parallelize(SequenceFirst().double(), mesh, example_inputs=batch)
        said = "nothing"
    except foldcc.FoldError as error:
        said = str(error)
    folded = foldcc.parallelize(SequenceFirst().double(), mesh, example_inputs=batch, batch_dims={"ids": 1, "labels": 1})
    loss = folded(**batch)
    loss.backward()
    return said, loss.item(), {n: p.grad.full_tensor() for n, p in folded.named_parameters()}


def test_a_sequence_first_model_is_refused_until_its_samples_are_said_and_then_right():
    ids = torch.randint(32, (6, 4), generator=torch.Generator().manual_seed(0))
    model = SequenceFirst().double()
    loss = model(ids, ids)
    loss.backward()
    for said, found, gradients in run_distributed(sequence_first, 2, ids):
        assert "is the sequence of an attention" in said
        assert found == pytest.approx(loss.item(), rel=1e-12)
        for n, p in model.named_parameters():
            torch.testing.assert_close(gradients[n], p.grad, rtol=1e-10, atol=1e-12)


def test_samples_that_are_ambiguous_are_refused():
    inputs = [torch.zeros(4, 6), torch.zeros(6, 4)]
    names = ["['a']", "['b']"]
    with pytest.raises(foldcc.FoldError, match=r"Which dimension of \['b'\] is samples is ambiguous"):
        sample_dims(inputs, names, {}, divided=True)
    assert sample_dims(inputs, names, {"b": None}, divided=True) == {"['a']": 0, "['b']": None}
    assert sample_dims(inputs, names, {"b": 1}, divided=True) == {"['a']": 0, "['b']": 1}
    with pytest.raises(foldcc.FoldError, match="different numbers of samples"):
        sample_dims(inputs, names, {"a": 0, "b": 0}, divided=True)


class Tokens(nn.Module):
    """A mean over samples, whose number is a constant of the graph."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).square().mean()


def said(call: Any) -> str:
    """What a call raises, with its kind; empty if it does not."""
    try:
        call()
    except (foldcc.FoldError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def disagree(random: int) -> dict[str, str]:
    rank = dist.get_rank()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(random))
    over = {axis: foldcc.init_folded_mesh("cpu", attention={axis: 2}) for axis in ("dp", "tp")}
    folded = foldcc.parallelize(Tokens(), over["dp"], example_inputs={"x": x})
    equal = Tokens()
    nn.init.constant_(equal.down.bias, rank)  # of numbers that are all the same
    same = foldcc.parallelize(equal, over["dp"], example_inputs={"x": x})
    twice = foldcc.parallelize(Tokens(seed=rank), over["dp"], example_inputs={"x": x})
    shared = foldcc.parallelize(Tokens(), over["tp"], example_inputs={"x": x})
    later = foldcc.parallelize(Tokens(), over["tp"], example_inputs={"x": x})
    free = foldcc.parallelize(Tokens(), over["tp"], example_inputs={"x": x}, check_ranks=False)
    return {
        "uneven": said(lambda: folded(x=x[: 3 - 2 * rank])),
        "one raises": said(lambda: folded(x=x) if rank else folded(y=x)),
        "even": said(lambda: folded(x=x + rank)),
        "one evaluates": said(lambda: folded.train(bool(rank))(x=x)),
        "weights": said(lambda: twice(x=x)),
        "equal weights": said(lambda: same(x=x)),
        "samples": said(lambda: shared(x=x + rank)),
        "later": said(lambda: [later(x=x), later(x=x.roll(rank, 0))]),
        "unchecked": said(lambda: free(x=x + rank)),
    }


def test_ranks_that_disagree_are_named_on_all_of_them():
    first, second = run_distributed(disagree, 2, 1)
    assert first.pop("one raises").startswith("TypeError") and "Rank 0 of 2 raised" in second.pop("one raises")
    assert first == second
    assert not first["even"] and not first["unchecked"]
    assert "Ranks 0 and 1 call the model with other shapes" in first["uneven"] and "[3, 8]" in first["uneven"]
    assert "evaluation" in first["one evaluates"]
    assert "Rank 1 has another up.weight than rank 0" in first["weights"]
    assert "Rank 1 has another down.bias than rank 0" in first["equal weights"]
    for when in ("samples", "later"):
        assert "Rank 1 has other samples in ['x'] than rank 0" in first[when]


def scales_and_losses() -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    x = torch.randn(4, 4, 16, generator=torch.Generator().manual_seed(1))
    plain = Gated()
    folded = foldcc.parallelize(copy.deepcopy(plain), foldcc.FoldedMesh.parse("tp=2", "cpu"), example_inputs=(x,))

    def trained(model: nn.Module, overflow: Callable[[], Any]) -> list[tuple[float, float]]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler, found = torch.amp.GradScaler("cpu", init_scale=1024.0), []
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = model(x).float().square().mean()
            scaler.scale(loss).backward()
            if step == 1:
                overflow()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            found.append((scaler.get_scale(), loss.item()))
        return found

    return (
        trained(plain, lambda: plain.up.grad[3, 3].fill_(torch.inf)),
        trained(folded, lambda: dist.get_rank() == 1 and folded.up.grad.to_local()[3, 3].fill_(torch.inf)),
    )


def test_a_step_that_overflows_on_one_rank_is_left_out_on_all_and_halves_the_scale():
    for one, folded in run_distributed(scales_and_losses, 2):
        assert [scale for scale, _ in one] == [1024.0, 512.0, 512.0] == [scale for scale, _ in folded]
        assert [loss for _, loss in folded] == pytest.approx([loss for _, loss in one], rel=1e-3)
        assert folded[1][1] == folded[2][1] != folded[0][1]
