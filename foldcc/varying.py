"""Calls that differ in sizes alone: one program is compiled for all of them, from the second size on.

input_ids [2, 16]    a program
input_ids [2, 24]    a second one, over sizes as symbols, and compared with the first: they may differ in sizes alone
input_ids [2, 40]    the same, with other numbers: nothing is compiled
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import gcd

import sympy

from foldcc.call import Call
from foldcc.capture.varying import Granted, Names
from foldcc.ir.pipeline import Stages
from foldcc.ir.resize import Between, Sizes, Unlike
from foldcc.mesh import FoldedMesh

BATCH, SEQ = "batch", "seq"
# Prime factors of a batch and of a length are above these: the bytes of what attention makes fit 63 bits.
_PRIMES = (4096, 32768)


Shapes = Mapping[str, tuple[int, ...]]  # of the inputs, over all ranks, by path


@dataclass(frozen=True)
class Varied:
    """The program of all calls that differ in sizes alone.

    Attributes:
        names: of the sizes of each input.
        granted: what the model takes for granted of them.
        between: two of the programs.
        shapes: of one of them.
        ranks: that samples are divided over.
        odd: of sizes that the mesh does not divide evenly, what they have in common with a number; the others have that too.
    """

    names: Names
    granted: Granted
    between: Between
    shapes: Shapes
    ranks: int
    odd: Mapping[str, tuple[int, int]]

    def at(self, shapes: Shapes) -> Stages:
        """The stages for inputs of these shapes.

        Raises:
            Unlike: it is not for them.
        """
        for path, each in self.names.items():
            for dim, (name, size, there) in enumerate(zip(each, shapes[path], self.shapes[path], strict=True)):
                if name is None and size != there:
                    raise Unlike(f"the model is specialised to size {dim} of {path}, {there}")
        sizes = sizes_of(self.names, shapes)
        if single := [name for name, n in sizes.items() if n < 2 * (self.ranks if name == BATCH else 1)]:
            raise Unlike(f"{single[0]} is one on a rank")
        self.granted.check(sizes)
        for name, (step, most) in self.odd.items():
            if gcd(sizes[name], most) != step:
                raise Unlike(f"{name}={sizes[name]} is divided otherwise than {name}={self.between.sizes[name]}")
        return self.between.at(sizes)


def shapes_of(call: Call, mesh: FoldedMesh, batch_dims: Mapping[str, int | None]) -> dict[str, tuple[int, ...]]:
    """The shapes of a call's tensors, over all ranks."""
    ranks = 1 if mesh.is_virtual else mesh.data_parallel
    return {n: tuple(s * ranks if d == batch_dims[n] else s for d, s in enumerate(x.shape)) for n, x in call.tensors().items()}


def named(first: Shapes, second: Shapes, batch_dims: Mapping[str, int | None], ranks: int, dynamic: Collection[str]) -> Names:
    """A name for each size of each input, and the same one for those that are the same in both calls; None for one that stays.

    A size that is 1 on a rank stays: what else has size 1 there is taken for the same.

    Args:
        ranks: that samples are divided over.

    Raises:
        Unlike: one that varies must stay.
    """
    known: dict[tuple[int, int], str] = {}
    found: dict[str, list[str | None]] = {}
    for path, shape in second.items():
        found[path] = []
        for dim, pair in enumerate(zip(first[path], shape, strict=True)):
            kind = BATCH if dim == batch_dims[path] else SEQ
            single = min(pair) < 2 * (ranks if kind == BATCH else 1)
            if pair[0] != pair[1] and (single or kind not in dynamic):
                why = "one on a rank stays one" if single else f"{kind} is not dynamic"
                raise Unlike(f"size {dim} of {path} is {pair[0]}, then {pair[1]}, and {why}")
            name = BATCH if kind == BATCH else known.setdefault(pair, SEQ if not known else f"{SEQ}{len(known) + 1}")
            found[path].append(None if single or kind not in dynamic else name)
    return found


def sizes_of(names: Names, shapes: Shapes) -> dict[str, int]:
    """The sizes of a call by name.

    Raises:
        Unlike: two sizes of one name differ.
    """
    found: dict[str, int] = {}
    for path, each in names.items():
        for name, size in zip(each, shapes[path], strict=True):
            if name is not None and found.setdefault(name, size) != size:
                raise Unlike(f"{name} is {found[name]} and {size}")
    return found


def parts(mesh: FoldedMesh, name: str) -> int:
    """How many parts ranks make of a batch, or of a length: in zig-zag, a rank of cp has two."""
    length = mesh.size("tp") * mesh.size("cp") * (2 if mesh.size("cp") > 1 else 1)
    return mesh.data_parallel if name == BATCH else length


def marked(sizes: Sizes, steps: Sizes) -> dict[str, int]:
    """Sizes with large prime factors, which are divided as these are: each is a multiple of its step."""
    found, prime = {}, 0
    for name in sizes:
        prime = int(sympy.nextprime(max(_PRIMES[name != BATCH], prime * 5 // 4)))
        found[name] = steps[name] * prime
    return found
