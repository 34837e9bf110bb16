"""The proof that `parallelize` makes of every program that it compiles: small enough to be made each time.

It is `verify` in one round; of a large mesh, on one of fewer ranks with the same axes. What held is remembered on disk.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor

from foldcc.errors import FoldError
from foldcc.passes.manager import Stages
from foldcc.program import Program
from foldcc.verification import reduce
from foldcc.verification.fewer_ranks import fewer_ranks
from foldcc.verification.field import MERSENNE, Field
from foldcc.verification.proof import Proof
from foldcc.verification.prove import prove, prove_reduced, too_large
from foldcc.verification.remembered import fingerprint, recall, remember
from foldcc.verification.same import first_unlike

_RANKS = 8  # more are proved on fewer, where the programs are alike


def prove_compiled(stages: Stages, buffers: Mapping[str, Tensor]) -> Proof:
    """The proof of a program, now or from an earlier time. One that cannot be proved is announced, and says why.

    Args:
        stages: of its compilation, down to operators.
        buffers: of the folded module, by name.

    Raises:
        FoldError: the program computes something else than the captured one: after which pass, and where.
    """
    key = fingerprint(stages, buffers, _RANKS)
    known = recall(key)
    if known is not None:
        return known
    program: Program = stages[-1].program
    try:
        proof = _proof(stages, buffers, stages[-1].name)
    except FoldError as error:
        told = dict(program=program.name, mesh=str(program.mesh), stage=stages[-1].name, prime=MERSENNE)
        proof = Proof(**told, rounds=0, bound=1.0, proved=(), impossible=str(error))
        warnings.warn(str(proof), stacklevel=2)
        return proof
    if not proof.ok:
        earlier = (_proof(stages, buffers, s.name) for s in stages[:-1])
        next((p for p in earlier if not p.ok), proof).raise_if_failed()
    remember(key, proof)
    return proof


def _proof(stages: Stages, buffers: Mapping[str, Tensor], name: str) -> Proof:
    mesh, fields = stages[-1].program.mesh, [Field(seed=0)]
    fewer = fewer_ranks(mesh)
    if mesh.world_size > _RANKS and fewer != mesh:
        try:
            small = reduce.reduced(stages, fewer)
        except FoldError:  # a size that fewer ranks do not divide as these do
            small = None
        if small is not None and first_unlike(stages, small, name) is None:
            return prove_reduced(stages, small, buffers, name, fields)
    if too_large(stages):
        return prove_reduced(stages, reduce.reduced(stages), buffers, name, fields)
    return prove(stages, buffers, stage=name, fields=fields)
