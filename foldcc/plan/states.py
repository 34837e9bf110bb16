"""States: what a mesh axis may divide, and so the states of values that enter the main graph or pass between blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

from foldcc.errors import FoldError, divides
from foldcc.ir.program import Program
from foldcc.layout import INVARIANT, Shard, State, Symbol
from foldcc.mesh import SAMPLES
from foldcc.ops.captured import captured_record
from foldcc.plan import roles
from foldcc.plan.choice import Choice
from foldcc.plan.strategies import Strategist, runs


def takes(program: Program, axis: str) -> set[Symbol | None]:
    """The factors that an axis may divide: samples, or sequences for cp, and what tp takes is a question of cost."""
    batch, ranks = roles.batch(program), program.mesh.size(axis)
    if axis in SAMPLES:
        return {batch}
    if axis != "cp":
        return roles.factors(program) - {batch}
    found = roles.sequences(program) - {batch}
    if not found:
        raise FoldError(
            f"No input has a sequence that cp={ranks} could divide.",
            mesh=str(program.mesh),
            valid="cp=1; or inputs with a dimension beside that of their samples which no product with a weight sums over",
        )
    sizes = sorted({program.sizes[f] for f in found})
    if all(n % ranks for n in sizes):
        divides("positions", sizes[-1], "cp", ranks, mesh=str(program.mesh), valid=f"multiples of {ranks}")
    return found


def zigzags(program: Program, axis: str) -> set[Symbol]:
    """The factors that ranks of an axis may have zig-zag: sequences of which operators then compute less."""
    ranks, found = program.mesh.size(axis), set()
    strategist = Strategist(axis, program.sizes, ranks, {}, set())
    for _, node in program.nodes():
        for d in captured_record(node.target).divisions:
            if d.zigzag and d.letters[0] in node.meta.get("letters", ()) and not strategist.unfit(node, d):
                found.update(node.meta["letters"][d.letters[0]])
    return {f for f in found if program.sizes[f] % (2 * ranks) == 0}


def instead(program: Program, axis: str, divisible: set[Symbol | None]) -> set[Symbol]:
    """What cp may divide where an operator needs a sequence whole, and has no way for it: heads, as of a state along it.

    That are factors of such operators over which nothing sums but products with parameters.
    """
    found: set[Symbol] = set()
    mixed: set[Symbol | None] = {roles.batch(program), *divisible}
    for _, node in program.nodes() if axis == "cp" else ():
        rule, letters = node.meta.get("rule"), node.meta.get("letters", {})
        if rule is None:
            continue
        stuck = rule.whole - {x for d in captured_record(node.target).divisions for x in (*d.letters, *d.beside)}
        if any(divisible.intersection(letters.get(x, ())) for x in stuck):
            free = (x for p in rule.results for dim in p or () for x in dim if x not in rule.whole)
            found.update(f for x in free for f in letters.get(x, ()))
        if not roles.summed_over_parameter(node):
            mixed.update(f for x in rule.letters() if rule.summed(x) and x not in rule.whole for f in letters.get(x, ()))
    return {f for f in found - mixed if program.sizes[f] % program.mesh.size(axis) == 0}


def between_blocks(
    program: Program,
    axis: str,
    slot: fx.Node,
    chosen: Mapping[str, Choice],
    divisible: set[Symbol | None],
    zigzag: Collection[Symbol],
) -> list[State]:
    """The states on an axis of a value that enters the main graph or passes between blocks.

    Args:
        chosen: what was chosen on the axes before.
        divisible: the factors that the axis may divide.
        zigzag: those that ranks may have zig-zag.
    """
    kind, batch, ranks = None, roles.batch(program), program.mesh.size(axis)
    if slot.op == "placeholder" and slot.graph is program.graph.graph:
        kind = program.slot(slot.name).kind
        kind = None if kind == "tap" else kind  # laid out as what it is added to
    if axis in SAMPLES:
        samples = kind == "input" or (kind is None and any(batch in dim for dim in slot.meta["dims"]))
        return [_by_samples(program, slot, batch)] if samples else [INVARIANT]
    if kind not in (None, "parameter"):
        return [INVARIANT]
    found: list[State] = [INVARIANT]
    for d, dim in enumerate(slot.meta["dims"]):
        sizes = [program.sizes[f] for f in dim]
        for before, choice in chosen.items():
            state = choice.slots.get(slot)
            if isinstance(state, Shard) and state.dim == d:
                left = program.mesh.size(before)
                for i in range(state.start, state.stop):
                    share = min(left, sizes[i])
                    sizes[i], left = sizes[i] // share, left // share
        found += [Shard(d, a, b) for a, b in runs(sizes, ranks) if divisible.issuperset(dim[a:b])]
        found += [Shard(d, i, i + 1, zigzag=True) for i, f in enumerate(dim) if f in zigzag and sizes[i] == program.sizes[f]]
    return found


def _by_samples(program: Program, node: fx.Node, batch: Symbol | None) -> State:
    for d, dim in enumerate(node.meta["dims"]):
        if batch in dim:
            at, mesh = dim.index(batch), program.mesh
            divides("samples", program.sizes[batch], "*".join(mesh.samples), mesh.data_parallel, mesh=str(mesh))
            return Shard(d, at, at + 1)
    return INVARIANT
