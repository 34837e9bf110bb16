"""Arithmetic over a prime field is exact, and PyTorch's operators keep their laws in it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foldcc.verification.field import MERSENNE, Field
from foldcc.verification.mode import FieldMode, NoMeaning

FIELD = Field(seed=3)
elements = st.integers(0, MERSENNE - 1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return FIELD.random(shape, torch.Generator().manual_seed(seed))


def whole(x: Tensor) -> list[int]:
    return [int(v) for v in x.flatten().tolist()]


@given(elements, elements)
def test_sums_products_and_inverses_are_those_of_the_integers(a: int, b: int) -> None:
    x, y = (torch.tensor([v], dtype=torch.float64) for v in (a, b))
    assert whole(FIELD.add(x, y)) == [(a + b) % MERSENNE]
    assert whole(FIELD.times(x, y)) == [a * b % MERSENNE]
    assert whole(FIELD.negative(x)) == [-a % MERSENNE]
    if a:
        assert whole(FIELD.times(x, FIELD.inverse(x))) == [1]


@given(st.integers(1, 5), st.integers(1, 3000), st.integers(1, 4))
def test_a_product_of_matrices_is_exact_at_every_length(m: int, k: int, n: int) -> None:
    x, y = random(m, k), random(k, n, seed=1)
    x[0] = MERSENNE - 1  # the largest element, so that a sum that overflows shows
    y[:, 0] = MERSENNE - 1
    row, column = whole(x[0]), whole(y[:, 0])
    assert int(FIELD.matmul(x, y)[0, 0]) == sum(a * b for a, b in zip(row, column, strict=True)) % MERSENNE


@pytest.mark.parametrize("number", [0.5, 1 / 3, -0.125, 7, 1e-6, 2 / 7, 10])
def test_a_number_of_a_program_is_a_fraction(number: float) -> None:
    thousandth = FIELD.number(number)
    scaled = round(number * 21_000_000)
    assert thousandth * 21_000_000 % MERSENNE == scaled % MERSENNE


def test_a_number_that_a_kernel_rounds_stays_what_the_program_says() -> None:
    for number in (1e-6, 1e-5, 0.1, 0.7):
        rounded = torch.tensor(number, dtype=torch.float32).item()
        assert rounded != number and FIELD.number(rounded) == FIELD.number(number)


def test_what_was_never_written_and_what_was_divided_by_zero_is_not_lost() -> None:
    x = torch.tensor([math.nan, 1.0], dtype=torch.float64)
    assert FIELD.times(x, x)[0].isnan() and FIELD.add(x, x)[0].isnan() and FIELD.function("sin", x)[0].isnan()
    assert FIELD.matmul(x[None], x[:, None]).isnan().all()
    assert FIELD.inverse(torch.zeros(1, dtype=torch.float64)).isnan().all()
    with FieldMode(FIELD):
        assert torch.empty(2, dtype=torch.float64).isnan().all() and x.new_empty(2).isnan().all()


def test_a_hash_tells_functions_seeds_and_arguments_apart() -> None:
    x = random(1000)
    values = [FIELD.function("sin", x), FIELD.function("cos", x), Field(seed=4).function("sin", x)]
    for i, a in enumerate(values):
        assert len(set(whole(a))) == 1000
        for b in values[i + 1 :]:
            assert not bool((a == b).any())


def test_a_softmax_that_is_split_over_ranks_is_the_whole_one() -> None:
    scores, values = random(4, 32), random(32, 3, seed=1)
    with FieldMode(FIELD):
        weights = [scores[:, :16].exp(), scores[:, 16:].exp()]
        numerator = weights[0] @ values[:16] + weights[1] @ values[16:]
        split = numerator / (weights[0].sum(-1, keepdim=True) + weights[1].sum(-1, keepdim=True))
        assert torch.equal(scores.softmax(-1) @ values, split)


def test_a_masked_score_weighs_nothing() -> None:
    scores = random(2, 6)
    with FieldMode(FIELD):
        mask = torch.tensor([True, False, True, False, True, True])
        masked = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        added = (scores + torch.zeros(6).masked_fill(~mask, torch.finfo(torch.float32).min)).softmax(-1)
        assert torch.equal(masked, added) and torch.equal(masked[:, mask], scores[:, mask].softmax(-1))
        assert not bool(masked[:, ~mask].any())
        assert not bool(torch.full((2,), -math.inf).sigmoid().any())


LATER = torch.ones(4, 4).triu(1) > 0.5


def triangular(x: Tensor, *, unit: bool) -> Tensor:
    """[4, 4], zero above its diagonal, which is one or is not."""
    a = x[:, :4] * x[:, :4] + 1
    return a.tril(-1) + (torch.eye(4, dtype=x.dtype) if unit else a.diag().diag())


# Two ways of computing one thing, which a program and its folded form may take.
IDENTITIES = {
    "silu": (lambda x: F.silu(x), lambda x: x * torch.sigmoid(x)),
    "mean": (lambda x: x.mean(-1), lambda x: x.sum(-1) / x.shape[-1]),
    "rms_norm": (
        lambda x: F.rms_norm(x, (6,), eps=1e-5),
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
    ),
    "layer_norm": (
        lambda x: F.layer_norm(x, (6,), eps=1e-5),
        lambda x: (x - x.mean(-1, True)) * torch.rsqrt((x - x.mean(-1, True)).pow(2).mean(-1, keepdim=True) + 1e-5),
    ),
    "cross_entropy": (
        lambda x: F.cross_entropy(x, torch.arange(4) % 6, reduction="none"),
        lambda x: (x - x.amax(-1, True)).exp().sum(-1).log() - (x - x.amax(-1, True))[torch.arange(4), torch.arange(4) % 6],
    ),
    "shifted softmax": (
        lambda x: x.softmax(-1),
        lambda x: (x - x.amax(-1, True)).exp() / (x - x.amax(-1, True)).exp().sum(-1, keepdim=True),
    ),
    "softmax shifted by max.values": (
        lambda x: x.softmax(-1),
        lambda x: (e := (x - x.max(-1, keepdim=True).values).exp()) / e.sum(-1, keepdim=True),
    ),
    "log_softmax": (lambda x: x.log_softmax(-1), lambda x: x - x.logsumexp(-1, keepdim=True)),
    "exp of log_softmax": (lambda x: x.softmax(-1), lambda x: x.log_softmax(-1).exp()),
    "square of a root": (lambda x: x * x + 1, lambda x: torch.sqrt(x * x + 1) ** 2),
    "rsqrt": (lambda x: x.rsqrt(), lambda x: 1 / x.sqrt()),
    "maximum": (lambda x: F.relu(x), lambda x: torch.maximum(x, torch.zeros_like(x))),
    "largest": (lambda x: x.amax(-1), lambda x: x.max(-1).values),
    "rows of a triangular system": (
        lambda x: x,
        lambda x: (a := triangular(x, unit=True)) @ torch.linalg.solve_triangular(a, x, upper=False, unitriangular=True),
    ),
    "columns of a triangular system": (
        lambda x: x,
        lambda x: (torch.linalg.solve_triangular(a := triangular(x, unit=False).mT, x.mT, upper=True, left=False) @ a).mT,
    ),
    "twice": (lambda x: x + x, lambda x: 2 * x),
    "square": (lambda x: x * x, lambda x: x**2),
    "gelu": (lambda x: F.gelu(x), lambda x: x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))),
    "gelu by tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2) * (2 / math.sqrt(math.pi)) * 0.5 * (x + 0.044715 * x.pow(3)))),
    ),
    "tanh": (lambda x: torch.tanh(x), lambda x: 2 * torch.sigmoid(2 * x) - 1),
    "sigmoid": (lambda x: torch.sigmoid(-x), lambda x: 1 - torch.sigmoid(x)),
    "elu": (lambda x: F.elu(x, 1.5), lambda x: torch.where(x > 0, x, 1.5 * (x.exp() - 1))),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.1), lambda x: torch.where(x > 0, x, 0.1 * x)),
    "softplus": (lambda x: F.softplus(x), lambda x: torch.where(x > 20, x, torch.log1p(torch.exp(x)))),
    "logsigmoid": (lambda x: F.logsigmoid(x), lambda x: torch.sigmoid(x).log()),
    "hardswish": (lambda x: F.hardswish(x), lambda x: x * F.relu6(x + 3) / 6),
    "hardsigmoid": (lambda x: F.hardsigmoid(x), lambda x: F.relu6(x + 3) / 6),
    "frac": (lambda x: torch.frac(x), lambda x: x - torch.trunc(x)),
    "lerp": (lambda x: torch.lerp(x, x * x, 0.25), lambda x: x + 0.25 * (x * x - x)),
    "addcdiv": (lambda x: torch.addcdiv(x, x, x + 2, value=3), lambda x: x + 3 * x / (x + 2)),
    "std": (lambda x: x.std(-1), lambda x: x.var(-1).sqrt()),
    "norm": (lambda x: torch.linalg.vector_norm(x, dim=-1), lambda x: x.square().sum(-1).sqrt()),
    "prod": (lambda x: x.prod(-1), lambda x: x[:, 0] * x[:, 1] * x[:, 2] * x[:, 3] * x[:, 4] * x[:, 5]),
    "softmax": (lambda x: x.softmax(-1), lambda x: x.exp() / x.exp().sum(-1, keepdim=True)),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], scale=0.25, is_causal=True),
        lambda x: ((x @ x.t() / 4).masked_fill(LATER, -torch.inf).softmax(-1) @ x)[None, None],
    ),
    "relu": (lambda x: F.relu(x), lambda x: x.clamp(min=0)),
}  # fmt: skip


@pytest.mark.parametrize("name", IDENTITIES)
def test_two_ways_of_computing_one_thing_agree_with_their_gradients(name: str) -> None:
    results = []
    weight = random(4, 6, seed=2)
    for way in IDENTITIES[name]:
        x = random(4, 6).requires_grad_(True)
        with FieldMode(FIELD):
            y = way(x)
            (gradient,) = torch.autograd.grad(
                y, x, weight[: y.shape[-2], : y.shape[-1]].expand(y.shape) if y.dim() > 1 else weight[:, 0]
            )
        results.append((y.detach(), gradient))
    (first, first_gradient), (second, second_gradient) = results
    assert torch.equal(first, second)
    assert torch.equal(first_gradient, second_gradient)
    assert bool(first_gradient.any())


def test_mish_and_its_derivative_are_what_pytorch_takes_them_apart_into() -> None:
    """Its softplus has a threshold, above which the derivative of a real one is 1, and PyTorch's is a sigmoid still."""
    x, grad = random(4, 6), random(4, 6, seed=2)
    with FieldMode(FIELD):
        assert torch.equal(F.mish(x), x * torch.tanh(F.softplus(x)))
        taken_apart = torch._decomp.decompositions.mish_backward(grad, x)
        assert torch.equal(torch.ops.aten.mish_backward(grad, x), taken_apart)
        assert bool(taken_apart.any())


@pytest.mark.parametrize("operator", [torch.linalg.inv, torch.fft.fft, torch.linalg.det])
def test_an_operator_without_a_meaning_is_named(operator: object) -> None:
    x = random(3, 3)
    with FieldMode(FIELD), pytest.raises(NoMeaning, match="has no meaning over a field"):
        operator(x)  # type: ignore[operator]


def test_randomness_has_no_meaning() -> None:
    x = random(8)
    with FieldMode(FIELD), pytest.raises(NoMeaning, match="is random"):
        F.dropout(x, 0.5)


@pytest.mark.parametrize("how", [(3, 2, 1), (3, 2, 1, False, False), (2, 2, 0, True)])
def test_averages_over_windows_are_as_many_elements_over_their_number(how: tuple[int | bool, ...]) -> None:
    x = torch.full((1, 2, 5, 5), 7.0, dtype=torch.float64)
    divided = F.avg_pool2d(x, *how)  # type: ignore[arg-type]
    size = 36  # which the sizes of windows divide
    with FieldMode(FIELD):
        found = F.avg_pool2d(x, *how)  # type: ignore[arg-type]
    assert torch.equal(FIELD.times(found, float(size)), (divided * size).round())
