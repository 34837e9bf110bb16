"""Split: what results need runs forward, the rest backward; a gradient that is not given is zero, and not computed with."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from foldcc.errors import FoldError
from foldcc.ir.pipeline import Stage
from foldcc.passes.split import Split, _zeros
from foldcc.testing import assert_rewrites, program

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


LINEAR = """
    %x  : f32[4, 8] = argument
    %w  : f32[8, 8] = argument
    %dy : f32[4, 8] = gradient of result 0
    %y  = aten.mm(%x, %w)
    %dx = aten.mm(%dy, aten.t(%w))
    %dw = aten.mm(aten.t(%x), %dy)
    return [[%y], [%dx, %dw]]
"""


def test_what_the_backward_pass_reads_is_saved() -> None:
    assert_rewrites(
        Split(),
        LINEAR,
        """
        block0 forward
          %x : f32[4, 8] = argument
          %w : f32[8, 8] = argument
          %y = aten.mm(%x, %w)
          return [[%y], [%w, %x]]
        block0 backward
          %w  : f32[8, 8] = argument
          %x  : f32[4, 8] = argument
          %dy : f32[4, 8] = gradient of result 0
          %dx = aten.mm(%dy, aten.t(%w))
          %dw = aten.mm(aten.t(%x), %dy)
          return [%dx, %dw]
        """,
    )


GATED = """
    %x  : f32[4, 8] = argument
    %dy : f32[4, 8] = gradient of result 0
    %s  = aten.sigmoid(%x)
    %h  = aten.exp(%s)
    %y  = aten.mul(%h, %h)
    %dh = aten.mul(%dy, %h)
    %dx = aten.mul(%dh, %s)
    return [[%y], [%dx]]
"""


@pytest.mark.parametrize(
    ("kept", "saved", "again"),
    [
        ("", "%h, %s", ""),
        ("keep [%s, %h]", "%s, %h", ""),
        ("keep [%s]", "%s", "%h = aten.exp(%s)  # again"),
        ("keep [%x]", "%x", "%s = aten.sigmoid(%x)  # again\n%h = aten.exp(%s)  # again"),
    ],
)
def test_what_is_not_kept_is_computed_again(kept: str, saved: str, again: str) -> None:
    arguments = "\n".join(f"{name} : f32[4, 8] = argument" for name in saved.split(", "))
    assert_rewrites(
        Split(),
        GATED + kept,
        f"""
block0 forward
  %x : f32[4, 8] = argument
  %s = aten.sigmoid(%x)
  %h = aten.exp(%s)
  %y = aten.mul(%h, %h)
  return [[%y], [{saved}]]
block0 backward
  {arguments}
  %dy : f32[4, 8] = gradient of result 0
  {again}
  %dh = aten.mul(%dy, %h)
  %dx = aten.mul(%dh, %s)
  return [%dx]
        """,
    )


TWO = """
wanted {wanted} of 0,1

block0
  %x  : f32[4] = argument
  %da : f32[4] = gradient of result 0
  %db : f32[4] = gradient of result 1
  %a  = aten.neg(%x)
  %b  = aten.exp(%x)
  %one = aten.neg(%da)
  %other = aten.mul(%db, %b)
  %dx = {joined}
  return [[%a : f32[4], %b : f32[4]], [%dx]]

main
  %x : f32[4] = input x · gradient
  %call = block0(%x)
  %a : f32[4] = getitem(%call, 0)
  %b : f32[4] = getitem(%call, 1)
  return [%a, %b]
"""


@pytest.mark.parametrize(
    ("wanted", "given", "body"),
    [
        ("0", "block0_1", "%da : f32[4] = gradient of result 0\n%one = aten.neg(%da)\nreturn [%one]"),
        ("1", "block0_0", "%db : f32[4] = gradient of result 1\n%other = aten.mul(%db, %b)\nreturn [%other]"),
    ],
)
def test_a_sum_with_a_gradient_that_is_not_given_is_the_other_term(wanted: str, given: str, body: str) -> None:
    text = TWO.format(wanted=wanted, joined="aten.add(%one, %other)")
    assert_rewrites(Split(), text, f"{given} backward\n%b : f32[4] = argument\n{body}")


def test_elsewhere_a_gradient_that_is_not_given_is_zeros() -> None:
    text = TWO.format(wanted="0", joined="aten.maximum(%one, %other)")
    body = "%one = aten.neg(%da)\n%zeros = aten.zeros([4], dtype=float32, device=cpu)\n%dx = aten.maximum(%one, %zeros)"
    assert_rewrites(
        Split(), text, f"block0_1 backward\n%b : f32[4] = argument\n%da : f32[4] = gradient of result 0\n{body}\nreturn [%dx]"
    )


def test_gradients_of_one_value_are_added_in_the_main_graph() -> None:
    text = (
        f"block0\n{LINEAR}"
        + """
    main
      %x : f32[4, 8] = input x · gradient
      %w : f32[8, 8] = parameter w
      %one = block0(%x, %w)
      %a : f32[4, 8] = getitem(%one, 0)
      %two = block0(%a, %w)
      %b : f32[4, 8] = getitem(%two, 0)
      return [%b]
    """
    )
    split = Split().run(program(text, stage="differentiate")).with_property("differentiated")
    main = str(Stage("split", 0, 0, 0, split)).split("main backward")[1]
    assert main.count("aten.add(") == 1 and main.count(" = block0(") == 2


def test_without_gradients_there_is_no_backward_pass() -> None:
    text = """
    block0
      %x : f32[4] = argument
      %y = aten.neg(%x)
      return [[%y], [None]]
    main
      %x : f32[4] = input x
      %call = block0(%x)
      %y : f32[4] = getitem(%call, 0)
      return [%y]
    """
    assert Split().run(program(text, stage="differentiate")).backward is None
    assert_rewrites(Split(), text, "block0\n%x : f32[4] = argument\n%y = aten.neg(%x)\nreturn [%y]")


def test_the_stage_before_stays_as_it_is() -> None:
    before = program(LINEAR, stage="differentiate")
    told = str(Stage("differentiate", 0, 0, 0, before))
    Split().run(before)
    assert str(Stage("differentiate", 0, 0, 0, before)) == told
