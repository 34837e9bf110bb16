"""Random numbers are those of one process on every fold: functions of a key and of where an element stands."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import tiny_model, token_batch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import foldcc
from foldcc.capture import normalize
from foldcc.ops.random import everywhere, random_bits
from foldcc.passes import Pass
from foldcc.testing import check_equivalence, drawing_alike, in_float64, program, run_distributed

aten = torch.ops.aten
FOLDS = ["dp=1", "dp=2,tp=2", "dp=2,cp=4"]


def bits_of(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    return random_bits(key, everywhere(shape, key.device))


class Dropping(nn.Module):
    """Two layers that drop out in between and at their ends: [b, s, 8] -> what is left, and a loss."""

    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.ModuleList(nn.Linear(8, 32) for _ in "ab"), nn.ModuleList(nn.Linear(32, 8) for _ in "ab")
        self.drop, self.checkpointed = nn.Dropout(0.1), checkpointed

    def layer(self, i: int, x: Tensor) -> Tensor:
        return x + self.drop(self.down[i](self.drop(torch.tanh(self.up[i](x)))))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for i in range(2):
            x = checkpoint(self.layer, i, x, use_reentrant=False) if self.checkpointed else self.layer(i, x)
        return {"left": F.dropout(torch.ones_like(x), 0.3, self.training), "loss": x.square().mean()}


def activations(batch: int = 4, length: int = 8, *, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


class Everything(nn.Module):
    """Draws with every operator that a program draws with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.alpha, self.rows = nn.Linear(8, 8), nn.AlphaDropout(0.1), nn.Dropout1d(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y = F.dropout(y.clone(), 0.2, inplace=True) * torch.empty_like(y).uniform_(0.9, 1.1)
        y = y + torch.rand_like(y) + torch.randn_like(y) + torch.rand(8, dtype=y.dtype) + torch.rand((), dtype=y.dtype)
        y = y + torch.bernoulli(y.sigmoid()) + torch.empty_like(y).bernoulli_(0.3) + torch.normal(y, 0.5)
        y = y + torch.empty_like(y).normal_(1, 2) + torch.empty_like(y).exponential_(3)
        y = y + torch.randint(3, (8,)) + torch.randint(2, 9, (8,)) + torch.randint_like(y, 5)
        y = self.rows(y) + self.alpha(y) + F.gumbel_softmax(y, dim=-1) + F.dropout(y, 1.0) + F.dropout(y, 0.0)
        order, chosen = torch.randperm(8), torch.multinomial(y.exp().flatten(0, 1), 3).view(*y.shape[:-1], 3)
        y = y[..., order] + y[torch.randperm(len(y))] + y[:, torch.randperm(y.shape[1])]
        y = y + y.gather(-1, chosen).sum(-1, keepdim=True)
        y = y * torch.multinomial(y.detach()[0, 0].exp(), 8, replacement=True)
        q = y.unflatten(-1, (4, 2)).transpose(1, 2)
        k, mask = q[:, ::2], torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        a = F.scaled_dot_product_attention(q, k, k, dropout_p=0.1, is_causal=True, enable_gqa=True)
        b = F.scaled_dot_product_attention(q, k, k, mask, dropout_p=0.2, enable_gqa=True)
        c = F.scaled_dot_product_attention(q, q, q, mask.to(q.dtype), dropout_p=1.0)
        return y + (a + b + c).transpose(1, 2).flatten(2)


# --- the numbers ---


@pytest.mark.parametrize(
    ("draw", "mean", "variance"),
    [
        (lambda x: torch.rand_like(x), 0.5, 1 / 12),
        (lambda x: torch.empty_like(x).uniform_(-1, 3), 1.0, 16 / 12),
        (lambda x: torch.randn_like(x), 0.0, 1.0),
        (lambda x: torch.empty_like(x).normal_(2, 3), 2.0, 9.0),
        (lambda x: torch.empty_like(x).exponential_(2), 0.5, 0.25),
        (lambda x: torch.empty_like(x).bernoulli_(0.3), 0.3, 0.21),
        (lambda x: torch.randint_like(x, 10), 4.5, 99 / 12),
        (lambda x: F.dropout(x + 1, 0.2), 1.0, 0.25),
    ],
)
def test_numbers_have_the_mean_and_the_variance_of_their_distribution(
    draw: Callable[[Tensor], Tensor], mean: float, variance: float
) -> None:
    torch.manual_seed(0)
    with drawing_alike():
        x = draw(torch.zeros(400, 1000, dtype=torch.float64))
    bound = 5 / math.sqrt(x.numel())  # standard deviations
    assert abs(float(x.mean()) - mean) < bound * math.sqrt(variance)
    assert abs(float(x.var()) / variance - 1) < 4 * bound


def test_bits_are_even_and_neighbours_are_independent() -> None:
    bits = bits_of(torch.tensor(3), (500, 400))
    each = torch.stack([(bits >> i & 1).double() for i in range(24)])
    assert bits.dtype == torch.int32 and int(bits.max()) < 2**24
    assert float((each.mean((1, 2)) - 0.5).abs().max()) < 0.006  # 5 standard deviations
    other = bits_of(torch.tensor(4), (500, 400))
    for neighbour in (bits.roll(1, 0), bits.roll(1, 1), bits.t().reshape(500, 400), other):
        assert abs(float(torch.corrcoef(torch.stack([bits.flatten(), neighbour.flatten()]).double())[0, 1])) < 0.012


def test_bits_do_not_depend_on_how_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(), (5,), (0, 3), (3, 5), (2, 3, 5)]
    wanted = [bits_of(torch.tensor(3), shape) for shape in shapes]
    assert [x.shape for x in wanted] == shapes
    monkeypatch.setattr("foldcc.ops.random._AT_ONCE", 7)
    for shape, bits in zip(shapes, wanted, strict=True):
        assert torch.equal(bits_of(torch.tensor(3), shape), bits)
        for start in (1, 3) if len(shape) == 2 else ():  # a part of the columns
            own = [torch.arange(shape[0]), torch.arange(start, shape[1])]
            assert torch.equal(random_bits(torch.tensor(3), own), bits[:, start:])


def test_orders_and_choices_are_as_likely_as_they_should_be() -> None:
    chances, draws = torch.tensor([0.1, 0.4, 0.0, 0.2, 0.3]), 20_000
    torch.manual_seed(0)
    with drawing_alike():
        orders = torch.stack([torch.randperm(5) for _ in range(2000)])
        alone, several = (torch.multinomial(chances.expand(draws, 5), 3, replacement) for replacement in (False, True))
    assert torch.equal(orders.sort(-1).values, torch.arange(5).expand(2000, 5)) and alone.dtype == torch.int64
    stands = torch.stack([(orders == i).double().mean(0) for i in range(5)])
    assert float((stands - 0.2).abs().max()) < 5 * math.sqrt(0.16 / 2000)  # standard deviations
    assert bool((alone.sort(-1).values.diff(dim=-1) > 0).all())  # none twice
    second = sum(p * chances / (1 - p) * (torch.arange(5) != i) for i, p in enumerate(chances))  # what is left is chosen of
    for found, wanted in [(alone[:, 0], chances), (alone[:, 1], second), *((several[:, i], chances) for i in range(3))]:
        shares = torch.bincount(found, minlength=5) / draws
        assert float((shares - wanted).abs().max()) < 5 * math.sqrt(0.25 / draws) and int(shares[2]) == 0
    both = (several[:, 0] == 1) & (several[:, 1] == 1)
    assert abs(float(both.double().mean()) - 0.16) < 5 * math.sqrt(0.16 / draws)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_number_is_rounded_up_to_1(dtype: torch.dtype) -> None:
    with drawing_alike():
        assert float(torch.rand(300_000, dtype=dtype).max()) < 1


# --- on every fold ---


def test_masks_are_the_same_on_every_fold_bit_for_bit_and_others_in_each_call() -> None:
    masks = []
    for mesh in FOLDS:
        folded = foldcc.parallelize(Dropping(), mesh, example_inputs=(activations(),))
        torch.manual_seed(5)
        masks.append([folded(activations())["left"] for _ in range(2)])
    model = Dropping()
    torch.manual_seed(5)
    with drawing_alike():
        first, second = (model(activations())["left"] for _ in range(2))
    assert not torch.equal(first, second) and 0.5 < float((first != 0).float().mean()) < 0.9
    for found in masks:
        torch.testing.assert_close(found, [first, second], rtol=1e-6, atol=0)  # of the division by 0.7


def test_training_goes_on_alike_from_one_seed_whenever_programs_are_compiled() -> None:
    losses = []
    for ahead in (True, False):
        folded = foldcc.parallelize(Dropping(), "dp=2,tp=2", example_inputs=(activations(),) if ahead else None)
        torch.manual_seed(5)
        for batch in (4, 8, 4):
            losses.append(float(folded(activations(batch))["loss"].detach()))
        losses.append(float(torch.rand(())))
    assert losses[:4] == losses[4:] and len(set(losses)) == 4
    model = Dropping()
    torch.manual_seed(5)
    with drawing_alike():
        assert [float(model(activations(batch))["loss"].detach()) for batch in (4, 8, 4)] == pytest.approx(losses[:3])
    assert float(torch.rand(())) == losses[3]


def test_every_operator_that_draws_draws_what_it_draws_in_one_process() -> None:
    check_equivalence(Everything(), "dp=2,tp=2", (activations(),))


@pytest.mark.parametrize("options", [{}, {"zero": 3, "recompute": "blocks"}, {"recompute": "selective", "capture": "dynamo"}])
def test_a_module_that_drops_out_is_itself_in_one_process(options: dict[str, Any]) -> None:
    check_equivalence(Dropping(), "dp=2,cp=2,tp=2", (activations(),), **options)


@pytest.mark.parametrize("mesh", ["dp=2,tp=2|ep=4", pytest.param("dp=3,tp=2|ep=2", marks=pytest.mark.slow)])
def test_attention_that_drops_out_and_a_router_with_jitter_are_themselves_in_one_process(mesh: str) -> None:
    model = tiny_model("mixtral", num_hidden_layers=1, attention_dropout=0.1, router_jitter_noise=0.1).train()
    check_equivalence(model, mesh, kwargs=token_batch(6 if "3" in mesh else 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mesh", "options"),
    [
        ("mixtral", "dp=4|ep=2", {"zero": 3, "recompute": "blocks"}),
        ("mixtral", "cp=2,tp=2|ep=4", {"recompute": 0.7}),
        ("llama", "dp=2,tp=4", {}),  # fewer key/value heads than ranks
        ("llama", "dp=2,cp=2,tp=2", {"zero": 1}),
        ("gpt_oss", "dp=2,tp=2|ep=4", {"zero": 2}),  # with sinks
    ],
)
def test_families_that_drop_out_are_themselves_in_one_process(family: str, mesh: str, options: dict[str, Any]) -> None:
    jitter = {"router_jitter_noise": 0.1} if family == "mixtral" else {}
    model = tiny_model(family, attention_dropout=0.1, **jitter).train()
    check_equivalence(model, mesh, kwargs=token_batch(4), **options)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "dp=2,cp=2"])
def test_gpt2_drops_out_of_embeddings_attention_and_residuals(mesh: str) -> None:
    import transformers

    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=128, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    check_equivalence(transformers.GPT2LMHeadModel(config).train(), mesh, kwargs=token_batch(4))


def test_a_checkpoint_of_the_models_own_drops_out_alike_in_its_backward_pass() -> None:
    check_equivalence(Dropping(checkpointed=True), "dp=2,tp=2", (activations(),))


def test_kernels_draw_what_operators_draw() -> None:
    model, found = Dropping(), []
    for kernels in ("triton", "aten"):
        folded = foldcc.parallelize(model, "tp=2", example_inputs=(activations(2),), kernels=kernels)
        torch.manual_seed(3)
        folded(activations(2))["loss"].backward()
        found.append(folded.up[0].weight.grad)
    torch.testing.assert_close(*found)


def test_evaluation_draws_nothing_and_leaves_the_generator_alone() -> None:
    folded = foldcc.parallelize(Dropping(), "dp=2,tp=2").eval()
    before = torch.get_rng_state()
    with torch.no_grad():
        assert bool((folded(activations())["left"] == 1).all())
    assert not any(s.kind == "key" for s in folded.program.slots)
    assert torch.equal(torch.get_rng_state(), before)


def test_autocast_and_bfloat16_drop_the_same_elements() -> None:
    folded = foldcc.parallelize(Dropping(), "tp=2")
    masks = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            result = folded.to(dtype)(activations(dtype=dtype))
        result["loss"].backward()
        masks.append(result["left"] == 0)
    assert torch.equal(*masks)


def test_without_gradients_the_same_is_drawn() -> None:
    model = Dropping()
    folded = foldcc.parallelize(model, "tp=2")
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            torch.manual_seed(2)
            found = folded(activations())
            torch.manual_seed(2)
            with drawing_alike():
                torch.testing.assert_close(found, model(activations()))


def test_hooks_are_given_what_was_dropped() -> None:
    seen: list[Tensor] = []
    model = Dropping()
    folded = foldcc.parallelize(model, "dp=2,tp=2")
    folded.drop.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model.drop.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    torch.manual_seed(4)
    folded(activations())
    torch.manual_seed(4)
    with drawing_alike():
        model(activations())
    for found, wanted in zip(seen[:4], seen[4:], strict=True):
        torch.testing.assert_close(found, wanted)
        assert torch.equal(found == 0, wanted == 0)


def test_a_program_that_draws_is_read_back_from_its_text() -> None:
    folded = foldcc.parallelize(Dropping(), "dp=2,tp=2", example_inputs=(activations(),))
    for stage in ("shard", "localize", "bucket"):
        text = str(folded.stages[stage])
        assert " = key 0" in text
        assert str(folded.stages[stage]).splitlines()[1:] == text.splitlines()[1:]
        assert [s for s in program(text).slots if s.kind == "key"] == [s for s in folded.program.slots if s.kind == "key"]


def trained(dtype: torch.dtype) -> dict[str, Any]:
    """Two steps on this rank, whose generator was given a seed of its own but for the first rank's."""
    import torch.distributed as dist

    with in_float64():
        model = Dropping().to(dtype)
        mesh = foldcc.init_folded_mesh("cpu", attention={"dp": 2, "tp": 2})
        folded = foldcc.parallelize(model, mesh, zero=3, recompute="blocks")
        torch.manual_seed(7 + dist.get_rank())
        own = activations(dtype=dtype).chunk(2)[mesh.coordinate(dist.get_rank(), "dp")]
        losses = []
        for _ in range(2):
            folded.zero_grad()
            result = folded(own)
            result["loss"].backward()
            losses.append(float(result["loss"].detach()))
        return {"losses": losses, "grad": folded.up[0].weight.grad.full_tensor(), "rank": dist.get_rank()}


def test_processes_draw_by_the_first_ranks_seed_what_one_process_draws() -> None:
    results = run_distributed(trained, 4, torch.float64)
    model = Dropping().double()
    torch.manual_seed(7)
    with drawing_alike():
        for step in range(2):
            model.zero_grad()
            loss = model(activations(dtype=torch.float64))["loss"]
            loss.backward()
            for found in results:
                assert found["losses"][step] == pytest.approx(float(loss.detach()), rel=1e-10)
    for found in results:
        torch.testing.assert_close(found["grad"], model.up[0].weight.grad, rtol=1e-10, atol=1e-12)


# --- mistakes are found ---


@dataclass(frozen=True, kw_only=True)
class Mistaken(Pass):
    """Changes every call of an operator, in the forward graphs and in the backward ones."""

    requires = frozenset({"bucketed"})
    target: Any
    change: Callable[[torch.fx.Node], Any]

    def run(self, program: foldcc.ir.program.Program) -> foldcc.ir.program.Program:
        for main in program.mains:
            for block in main.children():
                for node in block.graph.find_nodes(op="call_function", target=self.target):
                    self.change(node)
                block.recompile()
        return replace(program)


def _by_local_position(node: torch.fx.Node) -> None:
    """Each rank counts its own positions, as with one seed on every rank."""
    for x in node.args[1]:
        with node.graph.inserting_before(node):
            own = node.graph.call_function(aten.remainder.Scalar, (x, x.meta["val"].shape[0]))
        own.meta = dict(x.meta)
        node.replace_input_with(x, own)


def _not_scaled(node: torch.fx.Node) -> None:
    if isinstance(node.args[1], float) and node.args[1] > 1:
        node.replace_all_uses_with(node.args[0])


def _twice(node: torch.fx.Node) -> None:
    """Draws the mask again with a key of another draw, as a backward pass would that draws its own."""
    with node.graph.inserting_before(node):
        key = node.graph.call_function(aten.add.Tensor, (node.args[0], 1))
    key.meta = dict(node.args[0].meta)
    node.replace_input_with(node.args[0], key)


@pytest.mark.parametrize(
    ("target", "change"),
    [(random_bits.overload, _by_local_position), (aten.mul.Tensor, _not_scaled), (random_bits.overload, _twice)],
)
def test_a_mask_that_is_drawn_otherwise_is_found(target: Any, change: Callable[[torch.fx.Node], Any]) -> None:
    folded = foldcc.parallelize(Dropping(), "dp=2,cp=2", example_inputs=(activations(),))
    assert foldcc.verify(folded, rounds=1).ok
    broken = folded.with_passes(Mistaken(target=target, change=change))
    proof = foldcc.verify(broken, rounds=1)
    assert not proof.ok
    torch.manual_seed(0)
    right = folded(activations())["loss"]
    torch.manual_seed(0)
    assert not torch.allclose(right, broken(activations())["loss"])


def test_a_capture_that_does_not_scale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalize, "gain", lambda dropout: 1.0)
    proof = foldcc.verify(foldcc.parallelize(Dropping(), "dp=2", example_inputs=(activations(),)), rounds=1)
    assert not proof.ok and "The capture is wrong" in str(proof)


def test_the_proof_begins_at_the_module_that_draws() -> None:
    folded = foldcc.parallelize(Dropping(checkpointed=True), "dp=2,tp=2", example_inputs=(activations(),))
    proof = foldcc.verify(folded, rounds=1)
    assert "those of the module itself" in str(proof) and not proof.missing


class Unread(Dropping):
    """Draws what nothing reads; and writes, if told to, into a part of what it reads."""

    def __init__(self, writes: bool):
        super().__init__()
        self.writes = writes

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.drop(x)
        if self.writes:
            x = x.clone()
            x[:1].mul_(2.0)
        return super().forward(x)


def test_a_draw_that_nothing_reads_takes_a_key_as_in_one_process() -> None:
    proof = foldcc.verify(foldcc.parallelize(Unread(writes=False), "dp=2", example_inputs=(activations(),)), rounds=1)
    assert proof.ok and not proof.missing


def test_a_draw_that_a_second_trace_leaves_out_is_said_to_be_no_part_of_the_proof() -> None:
    proof = foldcc.verify(foldcc.parallelize(Unread(writes=True), "dp=2", example_inputs=(activations(),)), rounds=1)
    assert "draws random numbers 6 times, of which 5 are read" in str(proof)
