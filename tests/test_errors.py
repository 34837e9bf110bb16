"""Errors read as one sentence and aligned facts."""

import pickle
import traceback

import pytest

from foldcc.errors import FoldError, divides, divisors


def test_an_error_is_a_sentence_and_its_facts():
    with pytest.raises(FoldError) as caught:
        divides("experts", 60, "ep", 8, at="model.layers.3.mlp.experts", mesh="dp=4,tp=2|ep=8", module=None)
    assert traceback.format_exception_only(caught.value)[-1].splitlines() == [
        "foldcc.FoldError: 60 experts do not divide over ep=8 (60 = 7 * 8 + 4).",
        "  at      model.layers.3.mlp.experts",
        "  mesh    dp=4,tp=2|ep=8",
        "  valid   ep: 1, 2, 3, 4, 5, 6",
    ]
    assert caught.value.facts["valid"] == "ep: 1, 2, 3, 4, 5, 6"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_long_labels_and_facts_stay_aligned():
    assert str(FoldError("No.", at="a\nb", expected="c")) == "No.\n  at       a\n           b\n  expected c"


def test_what_an_interpreter_adds_to_an_error_is_not_shown():
    error = FoldError("No.", at="a")
    error.args = (f"{error.args[0]}\n\nWhile executing %linear",)
    assert str(error) == "No.\n  at      a"


def test_what_divides_yields_the_share_of_a_rank():
    assert divides("heads", 32, "tp", 8) == 4


def test_divisors():
    assert all(divisors(n) == tuple(d for d in range(1, n + 1) if n % d == 0) for n in range(1, 200))
