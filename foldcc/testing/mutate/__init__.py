"""Planting mistakes in a folded model, to see whether they are found.

    for mutant in mutate.mutants(model):                    every systematic mistake, one at a time
        broken = mutant.apply()                             a model that runs with the mistake; `model` stays as it is
        assert not foldcc.verify(broken).ok or mutate.equivalent(mutant)

    broken = mutate.find(model, kind="left out", module="*.o_proj", direction="forward").apply()
    broken = mutate.drop_reduction(model, parameter="*.gate.weight", axis="tp")
    broken = mutate.rewrite(model, after="localize", edit=...)      any edit, with the passes that follow run again on it

A mutant's program keeps the claims about layouts that were made of the right one, as a broken pass would. That it runs is
not promised: an exception is one way of finding a mistake.

The systematic kinds, each at every place of every distinct block, forward and backward:

    left out          a collective is not there: each rank goes on with what it has
    other axis        it runs over another axis, of either view, that fits
    other kind        another collective that fits stands in its place
    other blocks      a fused dimension is cut or joined as if it were one, or the other way round
    scale             its result is multiplied or divided by the size of an axis
    swap              two ranks of its groups change places
    shift             a slice, a part, an offset or a range starts one further
    sum for mean      a division by a count is left out
    drop reduction    a parameter's gradient is not summed over an axis
    reduce again      a parameter's gradient is summed over an axis once more
    shared            a use of a shared value gives no gradient, or its gradient counts twice
"""

from foldcc.testing.mutate.equivalent import equivalent
from foldcc.testing.mutate.gradients import Gradient, gradients
from foldcc.testing.mutate.mutant import Mutant, Site, rewrite, running
from foldcc.testing.mutate.named import drop_gradient, drop_reduction, reduce_again, scale_gradient
from foldcc.testing.mutate.systematic import KINDS, find, mutants

__all__ = [
    "KINDS",
    "Gradient",
    "Mutant",
    "Site",
    "drop_gradient",
    "drop_reduction",
    "equivalent",
    "find",
    "gradients",
    "mutants",
    "reduce_again",
    "rewrite",
    "running",
    "scale_gradient",
]
