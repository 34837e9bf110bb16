"""The proof that `parallelize` makes of every program that it compiles: small enough to be made each time.

It is `verify` in one round; of a large program over smaller sizes, and on a mesh of fewer ranks with the same axes. What held
is remembered on disk.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from foldcc.cache import Unkept
from foldcc.errors import FoldError
from foldcc.ir.pipeline import Stages
from foldcc.ir.program import Program
from foldcc.verification import reduce
from foldcc.verification.fewer_ranks import fewer_ranks
from foldcc.verification.field import MERSENNE, Field
from foldcc.verification.origin import Origin, against_a_copy, against_the_module
from foldcc.verification.proof import Proof
from foldcc.verification.prove import from_shard, prove, prove_reduced, too_large
from foldcc.verification.remembered import fingerprint, recall, remember
from foldcc.verification.same import first_unlike

_CALLS = 60_000  # of operators, over all ranks: about what making a program smaller takes
_WORK = 50_000_000  # products of parameters with tokens


def prove_compiled(stages: Stages, buffers: Mapping[str, Tensor], origin: Origin | None) -> Proof:
    """The proof of a program, now or from an earlier time. One that cannot be proved is announced, and says why.

    Args:
        stages: of its compilation, down to operators.
        buffers: of the folded module, by name.
        origin: the module that it was captured from.

    Raises:
        FoldError: the program computes something else than the captured one: after which pass, and where.
    """
    try:
        key = fingerprint(stages, buffers, *(() if origin is None else origin.told()))
    except Unkept:  # of code that was edited since, nothing is known, and nothing is remembered
        key = None
    if key is not None and (known := recall(key)) is not None:
        return known
    program: Program = stages[-1].program
    try:
        proof = _proof(stages, buffers, origin, stages[-1].name)
    except Exception as error:  # whatever fails in a proof, the program is not proved: that is said, and stops nobody
        proof = Proof(
            program=program.name,
            mesh=str(program.mesh),
            stage=stages[-1].name,
            prime=MERSENNE,
            rounds=0,
            bound=1.0,
            proved=(),
            impossible=str(error) if isinstance(error, FoldError) else f"{type(error).__name__}: {error}",
        )
        warnings.warn(str(proof), stacklevel=2)
        return proof
    first_broken(proof, stages, buffers).raise_if_failed()
    if key is not None:
        remember(key, proof)
    return proof


def first_broken(proof: Proof, stages: Stages, buffers: Mapping[str, Tensor]) -> Proof:
    """A proof of the last stage if it holds, else that of the first stage at which it does not: its pass is broken."""
    if proof.difference is None or proof.difference.capture:
        return proof
    earlier = (_proof(stages, buffers, None, s.name) for s in stages[:-1])
    return next((p for p in earlier if not p.ok), proof)


def _proof(stages: Stages, buffers: Mapping[str, Tensor], origin: Origin | None, name: str) -> Proof:
    captured, fields = stages["capture"].program, [Field(seed=0)]
    small = _smaller(stages, name) if _large(stages) else None
    if small is not None:
        proof = prove_reduced(stages, small, buffers, name, fields)
        return against_a_copy(proof, origin, captured, fields) if proof.ok else proof
    proof = prove(stages, buffers, stage=name, fields=fields)
    return against_the_module(proof, origin, captured, buffers, fields) if proof.ok else proof


def _large(stages: Stages) -> bool:
    program: Program = stages["capture"].program
    held: Counter[bool] = Counter()
    for slot, node in zip(program.slots, program.placeholders, strict=True):
        held[slot.kind == "input"] += node.meta["val"].numel()
    return held[True] * held[False] > _WORK or stages[-1].after * program.mesh.world_size > _CALLS


def _smaller(stages: Stages, name: str) -> Stages | None:
    """The program over smaller sizes, and on fewer ranks where it is the same program there.

    None if it cannot be made smaller, and can be run as it is.
    """
    mesh = stages[-1].program.mesh
    fewer = fewer_ranks(mesh)
    if fewer != mesh:
        try:
            small = reduce.reduced(stages, fewer)
        except FoldError:  # a size that fewer ranks do not divide as these do
            small = None
        if small is not None and first_unlike(stages, small, from_shard(stages, name)) is None:
            return small
    needed = too_large(stages)
    try:
        small = reduce.reduced(stages)
    except FoldError:
        if needed:
            raise
        return None
    return small if needed or first_unlike(stages, small, name) is None else None
