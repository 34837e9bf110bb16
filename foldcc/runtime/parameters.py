"""Parameters and buffers in their places: laid out by the first program that uses them, and read as a rank holds them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement
from torch.fx import GraphModule

from foldcc.errors import FoldError, listed
from foldcc.ir.plan import Plan
from foldcc.ir.program import Program
from foldcc.layout import Layout
from foldcc.mesh import FoldedMesh
from foldcc.ops import record
from foldcc.ops.groups import create_groups
from foldcc.runtime.lost import tell_what_is_raised
from foldcc.runtime.placement import filled, own_part, placements
from foldcc.tree import unsaved_buffers


@dataclass
class Places:
    """The layout of each parameter, by its first name, and the placements that it has on a real mesh.

    Attributes:
        plan: what programs have decided of parameters.
    """

    mesh: FoldedMesh
    layouts: dict[str, Layout] = field(default_factory=dict)
    placements: dict[str, tuple[Placement, ...]] = field(default_factory=dict)
    plan: Plan = Plan()

    def __deepcopy__(self, memo: object) -> Places:
        return Places(self.mesh, dict(self.layouts), dict(self.placements), self.plan)

    def take(self, tree: nn.Module, program: Program) -> None:
        """Puts each parameter into its layout, the first time that it has one."""
        for slot, node in zip(program.slots, program.placeholders, strict=True):
            name, layout = slot.names[0], node.meta["layout"]
            if slot.kind != "parameter":
                continue
            there = tuple(placements(layout, self.mesh))
            if self.placements.setdefault(name, there) != there:
                raise FoldError(f"Parameter {name} is held as {self.layouts[name]}, and another program holds it as {layout}.")
            if name in self.layouts:
                continue
            self.layouts[name] = layout
            if not self.mesh.is_virtual:
                self._distribute(tree.get_parameter(name), layout, self.placements[name])
        self.plan = self.plan.with_parameters(program.plan)
        if not self.mesh.is_virtual:
            create_groups(self.mesh, _axes_used(program))
            tell_what_is_raised()

    def _distribute(self, parameter: nn.Parameter, layout: Layout, there: tuple[Placement, ...]) -> None:
        """Leaves this rank its part of a parameter. It stays the same object: optimizers hold it, and hooks are on it."""
        assert isinstance(parameter, DTensor)
        local = own_part(parameter.to_local().detach(), layout, self.mesh, self.mesh.here).clone()
        side = self.mesh.of_tensors[layout.view]
        whole = DTensor.from_local(local, side, there, run_check=False, shape=parameter.shape, stride=parameter.stride())
        hooks, later = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
        torch.utils.swap_tensors(parameter, nn.Parameter(whole, requires_grad=parameter.requires_grad))
        parameter._backward_hooks, parameter._post_accumulate_grad_hooks = hooks, later  # the handles remove from these

    def local(self, name: str, held: Tensor) -> Tensor:
        """What this rank holds of a parameter or buffer, filled up to what its layout says."""
        if held.is_meta:
            raise FoldError(
                f"{name} is on meta and has no values.",
                valid='foldcc.load_pretrained; folded.to_empty(device="cpu"), then load_state_dict or foldcc.init_parameters',
            )
        laid_out = name in self.layouts
        if laid_out and self.mesh.is_virtual == isinstance(held, DTensor):
            raise FoldError(
                f"Parameter {name} was replaced by {'a DTensor' if self.mesh.is_virtual else 'a plain tensor'}.",
                mesh=str(self.mesh),
                valid="copying into it: folded.load_state_dict, or with torch.no_grad(): parameter.copy_(value)",
            )
        if not isinstance(held, DTensor):
            return torch.view_as_real(held) if held.is_complex() else held
        if laid_out and held.placements != self.placements[name]:
            raise FoldError(
                f"Parameter {name} was laid out anew, as {held.placements}.",
                valid=f"{self.placements[name]}, which its programs are compiled for",
            )
        local = held.to_local(grad_placements=held.placements)
        return filled(local, self.layouts[name]) if laid_out else local

    def held(self, tree: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
        """What this rank holds of parameters and buffers of these names."""
        there = dict([*tree.named_parameters(remove_duplicate=False), *tree.named_buffers(remove_duplicate=False)])
        return {n: self.local(n, there[n]) for n in dict.fromkeys(names) if n in there}

    def of(self, tree: nn.Module) -> dict[str, tuple[Tensor, Layout]]:
        """What this rank holds of each parameter that has a layout."""
        held = {n: self.local(n, p) for n, p in tree.named_parameters()}
        return {n: (held[n], layout) for n, layout in self.layouts.items() if n in held}


def _axes_used(program: Program) -> list[str]:
    found = set()
    for graph in program.mains:
        for block in graph.children():
            assert isinstance(block, GraphModule)
            for node in block.graph.nodes:
                known = record(node.target)
                if known is not None and known.simulate is not None:
                    found.add(known.arguments(node.args, dict(node.kwargs))["axes"])
    return sorted(found)


# Buffers that no state dict holds, and that to_empty left without values, by name: each with its version then.
Unset = Mapping[str, tuple[Tensor, int]]


def fill_unsaved(tree: nn.Module, original: nn.Module) -> set[str]:
    """Gives buffers that no state dict holds the original's values. Returns those of which it has none."""
    originals = {n: b for n, b in original.named_buffers(remove_duplicate=False) if not b.is_meta}
    unset = set()
    for name, buffer in unsaved_buffers(tree):
        if name in originals:
            buffer.copy_(originals[name])
        else:
            unset.add(name)
    return unset


def as_unset(tree: nn.Module, names: Collection[str]) -> Unset:
    return {name: (b, b._version) for name, b in unsaved_buffers(tree) if name in names and not b.is_meta}


def still_unset(tree: nn.Module, unset: Unset) -> list[str]:
    now = dict(unsaved_buffers(tree)) if unset else {}
    return [name for name, (b, version) in unset.items() if now.get(name) is b and b._version == version]


def refuse_unset(tree: nn.Module, unset: Unset) -> None:
    if names := still_unset(tree, unset):
        raise FoldError(
            f"Buffer {names[0]} has no values: to_empty left it as it was allocated, and no state dict holds it.",
            valid="folded.get_buffer(name).copy_(value) with the values of a model that was not built on meta",
            buffers=listed(names),
        )
