"""The type of a value on one mesh axis, in a differentiated graph, and what an operator makes of its operands' types.

    R     the same number on every rank               after differentiation R and I are one: their gradients are written
    V     an own part on each rank; which dimension is divided, if that is known
    P     a term of a sum
    V|P   one of the two: a masked lookup is both, and only what reads it says which
    0     zero: every type at once
    ?     neither: V on some of the other view's axes and R on others

    class of operator                  operands                     result
    linear: view, cat, sum, neg, add   P, all that are added        P
    bilinear: mul, mm, grouped_linear  P and R                      P
                                       V and V, or V and R          V, P where the divided dimension is summed
    any other                          P                            an error
    any                                R                            R
                                       V                            V

A rule says which dimensions are the same; a dimension that it does not follow makes V into V|P.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from foldcc.layout import PARTIAL, REPLICATED, VARYING, Shard, State
from foldcc.rules.joint import UNIT
from foldcc.rules.notation import Pattern, Rule

EITHER, ZERO, MIXED = "V|P", "0", "?"


class Type(NamedTuple):
    """A type on one axis.

    Attributes:
        letter: R, V, P, V|P, 0 or ?.
        dims: of V, those of which one is divided; of R, those along which, or along a factor of which, all numbers are
            equal, so that they may be read as divided.
        loose: of V, whether what is left of the divided factor may have size 1: a view does not show where it is, and
            differentiation writes no sum over it. Of R, whether equal numbers were summed, one by one or many. Either
            may also be P.
    """

    letter: str
    dims: frozenset[int] = frozenset()
    loose: bool = False

    @property
    def may_be_partial(self) -> bool:
        return self.letter in (PARTIAL, EITHER, ZERO) or self.loose


SAME, TERM, UNKNOWN = Type(REPLICATED), Type(PARTIAL), Type(EITHER)


class Illegal(Exception):
    """An operator is not legal for the types of its operands; says why, in words that follow the operator's name."""


def of_state(state: State, loose: bool) -> Type:
    """The type of a value of a known layout."""
    if isinstance(state, Shard):
        return Type(VARYING, frozenset({state.dim}), loose)
    return {REPLICATED: SAME, PARTIAL: TERM, VARYING: UNKNOWN}.get(state, SAME)


def fits(found: Type, state: State) -> bool:
    """Whether a value of a type may stand where a layout has a state."""
    if found.letter == ZERO:
        return True
    if isinstance(state, Shard):
        if found.letter == REPLICATED:
            return state.dim in found.dims
        return found.letter == EITHER or (found.letter == VARYING and state.dim in found.dims)
    if state == PARTIAL:
        return found.may_be_partial
    if state == VARYING:
        return found.letter in (VARYING, EITHER)
    return found.letter == REPLICATED


def read_across(types: Sequence[Type]) -> Type:
    """The type on an axis whose ranks differ in these axes of the other view: free where all of them agree."""
    kept = [t for t in types if t.letter != ZERO]
    letters = {t.letter for t in kept}
    if len(letters) == 1:
        (letter,) = letters
        joined = frozenset.union if letter == VARYING else frozenset.intersection
        return Type(letter, joined(*(t.dims for t in kept)), any(t.loose for t in kept))
    if not letters:
        return Type(ZERO)
    return UNKNOWN if letters in ({VARYING, EITHER}, {PARTIAL, EITHER}) else Type(MIXED)


def through(rule: Rule, types: Mapping[int, Type], counts: frozenset[int], results: int) -> tuple[Type, ...]:
    """The types of an operator's results.

    Args:
        types: of each operand that there is, by position.
        counts: the operands that are indices or masks; what they do to a sum is not followed.
        results: how many there are.

    Raises:
        Illegal: the operator is not linear in what is partial, or joins it with what is not.
    """
    letters = {t.letter for t in types.values()}
    if MIXED in letters:
        return (Type(MIXED),) * results
    added = {i: t for i, t in types.items() if i in rule.add and t.letter != ZERO}
    if added:
        return _joined(rule, types, added, counts, results)
    if any(all(types[i].letter == ZERO for i in group if i in types) for group in rule.linear if group & set(types)):
        return (Type(ZERO),) * results
    if PARTIAL in letters:
        _check_linear(rule, types, counts)
        return (TERM,) * results
    patterns = [*rule.results, *[None for _ in range(results)]][:results]
    if letters & {VARYING, EITHER}:
        return _varying(rule, types, counts, patterns)
    return tuple(_same(rule, types, p) for p in patterns)


def _joined(
    rule: Rule, types: Mapping[int, Type], added: Mapping[int, Type], counts: frozenset[int], results: int
) -> tuple[Type, ...]:
    """A product to which something is added, such as a bias: as terms of a sum, both or neither."""
    product = {i: t for i, t in types.items() if i not in rule.add}
    rest = through(replace(rule, add=frozenset()), product, counts, results)
    letters = {t.letter for t in added.values()}
    if rest[0].letter == PARTIAL:
        if all(t.may_be_partial for t in added.values()):
            return rest
        raise Illegal("adds to the terms of a sum what is no term of it, once on every rank")
    if PARTIAL in letters:
        if rest[0].may_be_partial:
            return (TERM,) * results
        raise Illegal("adds terms of a sum to what is no term of it")
    return through(replace(rule, add=frozenset()), added if rest[0].letter == ZERO else types, counts, results)


def _check_linear(rule: Rule, types: Mapping[int, Type], counts: frozenset[int]) -> None:
    partial = {i for i, t in types.items() if t.letter == PARTIAL}
    groups = [g for g in rule.linear if partial <= g]
    if not groups:
        raise Illegal("is not linear in terms of a sum")
    for i, t in types.items():
        if i in groups[0] and not t.may_be_partial:
            raise Illegal("joins terms of a sum with what is no term of it")
        known = t.letter in (REPLICATED, ZERO) or (i in counts and t.letter == EITHER)
        if i not in groups[0] and not known:
            raise Illegal("multiplies terms of a sum with what differs from rank to rank")


def _varying(
    rule: Rule, types: Mapping[int, Type], counts: frozenset[int], results: Sequence[Pattern | None]
) -> tuple[Type, ...]:
    """V: where the divided dimension of the operands is in the results; P, where an operator that is linear sums it."""
    divided = {}
    for i, t in types.items():
        pattern = _pattern(rule, i)
        if t.letter == VARYING and pattern is not None:
            letters = {x for d in t.dims if d < len(pattern) for x in pattern[d]} - rule.whole
            divided[i] = {x for x in letters if t.loose or not x.endswith(UNIT)}
    divided = {i: letters for i, letters in divided.items() if letters}
    shared = set.intersection(*divided.values()) if divided else set()
    if not shared and len(divided.keys() - counts) > 1 and not any(t.loose for t in types.values()):
        raise Illegal("joins parts that are divided in different dimensions")
    loose = any(t.loose for t in types.values() if t.letter == VARYING)
    found = []
    for pattern in results:
        kept = shared & {x for dim in pattern or () for x in dim}
        if not shared or pattern is None:
            found.append(UNKNOWN)
        elif kept == shared:
            assert pattern is not None
            found.append(Type(VARYING, frozenset(d for d, dim in enumerate(pattern) if kept & set(dim)), loose))
        else:
            found.append(TERM if rule.linear and not kept else UNKNOWN)
    return tuple(found)


def _same(rule: Rule, types: Mapping[int, Type], result: Pattern | None) -> Type:
    """R: with the dimensions that may be equal throughout, because they are so in every operand that has them."""
    patterns = {i: _pattern(rule, i) for i in types}
    if result is None:
        perhaps = any(t.dims or t.loose for t in types.values())
        return Type(REPLICATED, frozenset(range(8) if perhaps else ()), perhaps)

    def equal(letters: set[str]) -> bool:
        has = {i: [d for d, dim in enumerate(p or ()) if letters & set(dim)] for i, p in patterns.items()}
        has = {i: on for i, on in has.items() if types[i].letter != ZERO}  # which is equal along all of its dimensions
        known = all(types[i].dims if patterns[i] is None else not on or types[i].dims & set(on) for i, on in has.items())
        return bool(letters) and known and not letters & rule.whole

    kept = {x for dim in result for x in dim}
    summed = {x for p in patterns.values() for dim in p or () for x in dim} - kept
    loose = any(t.loose for t in types.values()) or (bool(rule.linear) and any(equal({x}) for x in summed))
    return Type(REPLICATED, frozenset(d for d, dim in enumerate(result) if equal(set(dim))), loose)


def _pattern(rule: Rule, operand: int) -> Pattern | None:
    return rule.operands[operand] if operand < len(rule.operands) else None
