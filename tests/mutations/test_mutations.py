"""No mutant lives: each is caught, or shown to be no mistake."""

from __future__ import annotations

import pytest

import foldcc
from foldcc.testing.mutate import KINDS, Mutant, equivalent, mutants
from tests.models import tiny_model, token_batch
from tests.mutations.checkers import CHECKERS, FAILURES, PLAIN, exact, numeric
from tests.mutations.programs import MESHES, PROGRAMS, Subject, folded, subject
from tests.mutations.table import run

FOLD = MESHES[0]


@pytest.fixture(scope="module")
def mixtral() -> Subject:
    return subject("mixtral", FOLD)


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_of_every_kind_are_caught_exactly_or_equivalent(mixtral: Subject, kind: str) -> None:
    pairs = [pair for pair in mixtral.pairs() if pair[0].kind == kind]
    for plain, lifted in pairs[1 :: len(pairs) // 2]:
        reason = equivalent(plain)
        if reason is None:
            assert exact(mixtral, plain, lifted), plain
        else:
            assert not numeric(mixtral, plain, lifted), f"{plain}: {reason}"


def test_the_program_without_a_mistake_is_accused_by_no_checker(mixtral: Subject) -> None:
    plain, lifted = (Mutant(m.kind, m.site, "nothing", m.model, lambda graph: None) for m in next(mixtral.pairs()))
    said = {name: checker(mixtral, plain, lifted) for name, checker in (CHECKERS | PLAIN).items()}
    assert not any(said.values()), said


@pytest.mark.parametrize("name", [n for n in (CHECKERS | PLAIN) if n != "types"])
def test_every_checker_that_reads_numbers_finds_a_wrong_factor(mixtral: Subject, name: str) -> None:
    scaled = [pair for pair in mixtral.pairs() if pair[0].kind == "scale"]
    assert any((CHECKERS | PLAIN)[name](mixtral, *pair) for pair in scaled[:8])


@pytest.mark.slow
def test_every_mistake_is_found_where_parameters_are_divided_masks_drawn_and_blocks_computed_again() -> None:
    model = tiny_model("mixtral", num_hidden_layers=1, attention_dropout=0.1).train()
    options = {"example_inputs": token_batch(4, 8), "zero": 3, "recompute": "blocks"}
    folded = foldcc.parallelize(model, "dp=2,tp=2|ep=4", **options)
    assert foldcc.verify(folded, rounds=1).ok
    for mutant in mutants(folded):
        try:
            assert not foldcc.verify(mutant.apply(), rounds=1).ok, mutant
        except FAILURES:
            pass  # nobody trains on


def test_where_axes_form_the_same_groups_only_the_name_changes() -> None:
    model = folded("deepseek_v3", "dp=3,tp=2|ep=2")
    found = [m for m in mutants(model) if m.kind == "other axis"]
    renamed = [m for m in found if m.description.endswith(("over ep instead of tp", "over edp instead of dp"))]
    assert len(renamed) > 10
    for mutant in renamed[::10]:
        assert equivalent(mutant), mutant
    for mutant in [m for m in found if m.description.endswith("over dp instead of tp")][::4]:
        assert equivalent(mutant) is None, mutant


def test_any_number_that_ranks_agree_on_may_be_subtracted_from_the_logits(mixtral: Subject) -> None:
    reasons = {m.kind: equivalent(m) for m in mutants(mixtral.plain) if "all_reduce_max" in m.site.node}
    cancelling = {kind for kind, reason in reasons.items() if reason and "cancels" in reason}
    assert cancelling == {"scale", "other kind"}
    assert reasons["left out"] is None and reasons["other axis"] is None


@pytest.mark.slow
def test_every_mutant_of_every_program_is_caught_exactly_or_equivalent() -> None:
    rows = run()
    assert len(rows) > 300
    assert not [row.mutant for row in rows if row.alive]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mesh"), PROGRAMS)
def test_what_is_called_equivalent_computes_the_same(family: str, mesh: str) -> None:
    where = subject(family, mesh)
    for plain, lifted in where.pairs():
        reason = equivalent(plain)
        assert reason is None or numeric(where, plain, lifted) is None, f"{plain}: {reason}"
