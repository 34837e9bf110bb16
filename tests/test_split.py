"""Split: gradients that are not given are zeros where they are joined with others, also of sizes that data decide."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import foldcc
from foldcc.errors import FoldError
from foldcc.passes.split import Split, _zeros
from tests.models import tiny_model, token_batch

aten = torch.ops.aten


def rows_by_data() -> tuple[fx.Graph, fx.Node, fx.Node]:
    """A graph with two values of as many rows as data decide."""
    graph = fx.Graph()
    one, other = graph.placeholder("one"), graph.placeholder("other")
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        assert mode.shape_env is not None
        rows = mode.shape_env.create_unbacked_symint()
        one.meta["val"], other.meta["val"] = torch.empty(rows, 4), torch.empty(rows, 4, dtype=torch.bfloat16)
    return graph, one, other


def test_zeros_of_a_size_that_data_decide_are_like_a_value_that_has_it() -> None:
    graph, one, other = rows_by_data()
    zeros = _zeros(graph, one, {other: other})
    assert zeros.target is aten.zeros_like.default and zeros.args == (other,) and zeros.kwargs["dtype"] == torch.float32
    assert zeros.meta["val"] is one.meta["val"]


def test_zeros_of_a_size_that_nothing_has_are_refused() -> None:
    graph, one, other = rows_by_data()
    other.meta["val"] = other.meta["val"][:, :2]
    with pytest.raises(FoldError, match=r"The gradient one is not given, and nothing else has its size .*u0, 4"):
        _zeros(graph, one, {other: other})


def test_the_stage_before_stays_as_it_is() -> None:
    model = foldcc.parallelize(tiny_model("mixtral", num_hidden_layers=1), "dp=2|ep=2", example_inputs=token_batch(2))
    before = str(model.stages["differentiate"])
    Split().run(model.stages["differentiate"].program)
    assert str(model.stages["differentiate"]) == before and "sym_size" in before
