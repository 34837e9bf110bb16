"""The captured program over a field, in one process, with the gradients that autograd gives it.

Captured nodes are what their records define: experts are a sum over all experts of what each makes of its tokens, weighted
by the router, so that no code of dispatch is on both sides of a proof.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from foldcc.errors import FoldError
from foldcc.ir.program import Program, where
from foldcc.ops.captured import captured_record
from foldcc.rules.kinds import is_view
from foldcc.verification.field import Field
from foldcc.verification.lockstep import leaves
from foldcc.verification.mode import FieldMode, NoMeaning


class Undefined(FoldError):
    """The captured program has no value on the inputs that were drawn."""


class Reference:
    """A captured program, run forward on given inputs; any gradient can be asked for.

    Attributes:
        inputs: of every slot, whole tensors.
        values: of every node, by its name.
        outputs: of the main graph, in order.
        tangents: the gradient that each output is given, None for one without a gradient.
    """

    def __init__(self, program: Program, field: Field, inputs: Mapping[str, Tensor], generator: torch.Generator):
        self.field, self.inputs = field, inputs
        self.values: dict[str, Any] = {}
        trained = {slot.name for slot in program.slots if slot.grad}
        with FieldMode(field):
            given = [inputs[s.name].clone().requires_grad_(s.name in trained) for s in program.slots]
            self.outputs: list[Tensor] = leaves(_Defined(program.graph, self.values, noted=field).run(*given))
        for x in self.outputs:
            if bool(x.detach().isnan().any()):
                raise self._undefined()
        self.tangents = [field.random(x.shape, generator) if x.requires_grad else None for x in self.outputs]

    def _undefined(self) -> FoldError:
        """The error for an output that divides by zero or reads memory that nobody wrote."""
        name = next(n for n, x in self.values.items() if isinstance(x, Tensor) and bool(x.detach().isnan().any()))
        return Undefined(
            f"The captured program divides by zero, or reads what was never written, at {name}.",
            prime=str(self.field.prime),
            valid="another seed, if the divisor is data",
        )

    def objectives(self) -> list[tuple[bool, ...]]:
        """For which outputs a gradient is given: for all, and for those without dimensions, the losses, alone."""
        every = tuple(t is not None for t in self.tangents)
        losses = tuple(there and x.dim() == 0 for x, there in zip(self.outputs, every, strict=True))
        return [every, losses] if any(losses) and losses != every else [every]

    def gradients(self, names: Sequence[str], given: Sequence[bool]) -> dict[str, Tensor]:
        """The gradients, with respect to values, of the sum of all products of an output with its tangent.

        Args:
            names: of values that may have a gradient.
            given: for each output, whether it is in the sum.
        """
        known = {n: self.values.get(n) for n in names}
        wanted = [n for n, x in known.items() if isinstance(x, Tensor) and x.requires_grad]
        each = zip(self.outputs, self.tangents, given, strict=True)
        pairs = [(x, t) for x, t, there in each if there and t is not None]
        if not pairs or not wanted:
            return {}
        with FieldMode(self.field):
            found = torch.autograd.grad(
                [x for x, _ in pairs],
                [self.values[n] for n in wanted],
                [t for _, t in pairs],
                allow_unused=True,
                retain_graph=True,
            )
        return {n: g for n, g in zip(wanted, found, strict=True) if g is not None}


_BOUNDS = {getattr(torch.ops.aten, x) for x in ("clamp", "clamp_min", "clamp_max", "maximum", "minimum")}


class _Defined(fx.Interpreter):
    """Runs a graph with the definitions of our own nodes, and keeps every value under its captured name."""

    def __init__(
        self, graph: fx.GraphModule, values: dict[str, Any], names: Mapping[str, str] | None = None, noted: Field | None = None
    ):
        super().__init__(graph)
        self.kept, self.names, self.noted = values, names, noted

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            block = self.module.get_submodule(str(n.target))
            inside = [x.name for x in block.graph.nodes if x.op == "call_function"]
            run = _Defined(block, self.kept, dict(zip(inside, n.meta["nodes"], strict=True)), self.noted)
            given: Any = self.map_nodes_to_values(n.args, n)
            return run.run(*given)
        name = n.name if self.names is None else self.names.get(n.name)
        at = self.noted.at if self.noted is not None else []
        at.append(" ".join(x for x in (f"{name} = {n.target}", _place(n) or "") if x))
        try:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            result = call(n, args, kwargs) if n.op == "call_function" else super().run_node(n)
        except NoMeaning as error:
            raise FoldError(str(error), at=_place(n), valid="a program without it, or check_equivalence in float64") from None
        except (RuntimeError, IndexError) as error:
            raise Undefined(f"The captured program does not run at {n.name} = {n.target}: {error}", at=_place(n)) from None
        if n.op == "call_function" and self.noted is not None and isinstance(result, Tensor):
            if result.dtype == torch.bool and not is_view(n.target):
                self.noted.decisions.pop(at[-1], None)  # how it came about is nobody's branch
                self.noted.decided(result)
            elif not result.is_floating_point() and getattr(n.target, "overloadpacket", None) in _BOUNDS:
                self.noted.decided(result == args[0])  # of integers; elements of the field note their own
        at.pop()
        if name is not None:
            self.kept[name] = result
        return result


def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """A node's result by its definition, where it has one of ours; what its type decides is decided by its real type."""
    if node.target is torch.ops.aten.rms_norm.default and (len(args) < 4 or args[3] is None):
        args = (*args[:2], args[2] if len(args) > 2 else None, least(node.meta["val"].dtype))
    return (captured_record(node.target).defined or node.target)(*args, **kwargs)


def least(dtype: torch.dtype) -> float:
    """What a norm that is given no epsilon adds: that of the type in which it computes."""
    return torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps


def _place(node: fx.Node) -> str | None:
    return " ".join(str(x) for x in (where(node), node.meta.get("source")) if x) or None
