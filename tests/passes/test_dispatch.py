"""Dispatch: tokens go to the ranks of their experts and come back; weights are divided over the ranks that hold experts."""

from __future__ import annotations

import pytest

from foldcc.errors import FoldError
from foldcc.ops.experts import activation
from foldcc.ops.layout import reshard
from foldcc.passes.dispatch import Dispatch
from foldcc.testing import assert_rewrites, program

FACTORS = "factors batch=4 seq=4 hidden=8 width=16 experts=4 gates=2 k=2\n"
AFTER = "factors batch=4 seq=4 hidden=8 width=16 experts=4 gates=2 k=2 tokens=16\n"
ARGUMENTS = """
    %x       : f32[(batch@dp seq@tp), hidden] = argument
    %ids     : i64[(batch@dp seq@tp), k] = argument
    %weights : f32[(batch@dp seq@tp), k] = argument
    %up      : f32[{up}, hidden]{on} = parameter up
    %down    : f32[{down}]{on} = parameter down
"""
ACTIVATION = activation(lambda x: x.chunk(2, -1)[0])
EXPERTS = """
    %y : f32[(batch@dp seq@tp), hidden] = experts(%x, %ids, %weights, %up, %down, None, None, 'half', False, False)
    return [%y]
""".replace("half", ACTIVATION)
WHOLE = {"on": "", "up": "experts, (gates width)", "down": "experts, hidden, width"}


def rewrites(after: str, mesh: str, *, told: str = "", **divided: str) -> None:
    before = FACTORS + ARGUMENTS.format(**WHOLE) + EXPERTS.replace("False, False)", f"False, False{told})")
    assert_rewrites(Dispatch(), before, AFTER + ARGUMENTS.format(**divided) + after.replace("half", ACTIVATION), mesh=mesh)


def test_tokens_go_there_and_back_over_ep_and_etp() -> None:
    rewrites(
        """
        %xm     : f32[tokens@(ep,etp), hidden] = cross_fold(%x)
        %im     : i64[tokens@(ep,etp), k]      = cross_fold(%ids)
        %wm     : f32[tokens@(ep,etp), k]      = cross_fold(%weights)
        %flat   : i64[(tokens@(ep,etp) k)]     = aten.reshape(%im, [-1])
        %order  : i64[(tokens@(ep,etp) k)]     = aten.argsort(%flat, stable=True)
        %rows   : f32[(tokens@(ep,etp) k), hidden] = permute(%xm, %order, 2)
        %counts : i64[experts] V(ep,etp)       = count(%im, 4)
        %each   : i64 = aten.reshape(%counts, [2, 1, -1])
        %many   : i64 = aten.expand(%each, [2, 2, -1])
        %told   : i64 = aten.reshape(%many, [-1])
        %arrive : i64 = all_to_all(%told, ep,etp)
        %place  : i64 = axis_index(etp, cpu)
        %four = splits(%counts, %arrive, 2, 2, %place)
        %sent   : i64 = getitem(%four, 0)
        %got    : i64 = getitem(%four, 1)
        %where   : i64 = getitem(%four, 2)
        %chunks : i64 = getitem(%four, 3)
        %here   : f32[u1, hidden] V(ep,etp)         = all_to_all_v(%rows, %sent, %got, ep)
        %every    : f32[g1, hidden] R(etp) V(ep)      = all_gather_v(%here, %where, etp)
        %pair = by_expert(%every, %chunks, 2)
        %sorted : i64[g1] R(etp) V(ep)              = getitem(%pair, 0)
        %mine   : i64[experts@ep] R(etp)            = getitem(%pair, 1)
        %ready  : f32[g1, hidden] R(etp) V(ep)      = permute(%every, %sorted, 1)
        %wide   : f32[g1, (gates width@etp)] V(ep)  = grouped_linear(%ready, %up, %mine, False)
        %acted  : f32[g1, width@etp] V(ep)          = activate(%wide, 'half')
        %terms  : f32[g1, hidden] P(etp) V(ep)      = grouped_linear(%acted, %down, %mine, False)
        %back   : f32[g1, hidden] P(etp) V(ep)      = gather_rows(%terms, %sorted, 1)
        %summed : f32[u1, hidden] V(ep,etp)         = reduce_scatter_v(%back, %where, etp)
        %home   : f32[(tokens@(ep,etp) k), hidden]  = all_to_all_v(%summed, %got, %sent, ep)
        %ym     : f32[tokens@(ep,etp), hidden]      = unpermute(%home, %order, %wm)
        %y      : f32[(batch@dp seq@tp), hidden]    = cross_fold(%ym)
        return [%y]
        """,
        "dp=2,tp=2|ep=2,etp=2",
        up="experts@ep, (gates width@etp)",
        down="experts@ep, hidden, width@etp",
        on="",
    )


def test_where_every_rank_has_all_experts_nothing_is_sent_and_weights_are_used_as_r() -> None:
    rewrites(
        """
        %ups    : f32[experts, (gates width), hidden] R(edp) = reshard(%up)
        %downs  : f32[experts, hidden, width] R(edp) = reshard(%down)
        %xm     : f32[tokens@edp, hidden]     = cross_fold(%x)
        %im     : i64[tokens@edp, k]          = cross_fold(%ids)
        %wm     : f32[tokens@edp, k]          = cross_fold(%weights)
        %flat   : i64[(tokens@edp k)]         = aten.reshape(%im, [-1])
        %order  : i64[(tokens@edp k)]         = aten.argsort(%flat, stable=True)
        %rows   : f32[(tokens@edp k), hidden] = permute(%xm, %order, 2)
        %counts : i64[experts] V(edp)         = count(%im, 4)
        %wide   : f32[(tokens@edp k), (gates width)] = grouped_linear(%rows, %ups, %counts, False)
        %acted  : f32[(tokens@edp k), width]  = activate(%wide, 'half')
        %found  : f32[(tokens@edp k), hidden] = grouped_linear(%acted, %downs, %counts, False)
        %ym     : f32[tokens@edp, hidden]     = unpermute(%found, %order, %wm)
        %y      : f32[(batch@dp seq@tp), hidden] = cross_fold(%ym)
        return [%y]
        """,
        "dp=2,tp=2",
        up="experts, (gates width)",
        down="experts, hidden, width",
        on=" I(edp)",
    )


def test_choices_of_no_expert_stand_last_and_are_sent_nowhere() -> None:
    rewrites(
        """
        %xm     : f32[tokens@ep, hidden]     = cross_fold(%x)
        %im     : i64[tokens@ep, k]          = cross_fold(%ids)
        %wm     : f32[tokens@ep, k]          = cross_fold(%weights)
        %flat   : i64[(tokens@ep k)]         = aten.reshape(%im, [-1])
        %order  : i64[(tokens@ep k)]         = aten.argsort(%flat, stable=True)
        %all    : f32[(tokens@ep k), hidden] = permute(%xm, %order, 2)
        %more   : i64[n1] V(ep)              = count(%im, 5)
        %counts : i64[experts] V(ep)         = aten.slice(%more, 0, 0, 4)
        %arrive : i64[experts] V(ep)         = all_to_all(%counts, ep)
        %place  : i64 = aten.zeros([], dtype=int64, device=cpu)
        %four = splits(%counts, %arrive, 4, 1, %place)
        %sent   : i64 = getitem(%four, 0)
        %got    : i64 = getitem(%four, 1)
        %chunks : i64 = getitem(%four, 3)
        %rows   : f32[c1, hidden] V(ep)      = leading(%all, %sent)
        %here   : f32[u1, hidden] V(ep)      = all_to_all_v(%rows, %sent, %got, ep)
        %pair = by_expert(%here, %chunks, 1)
        %sorted : i64[u1] V(ep)              = getitem(%pair, 0)
        %mine   : i64[experts@ep]            = getitem(%pair, 1)
        %ready  : f32[u1, hidden] V(ep)      = permute(%here, %sorted, 1)
        %wide   : f32[u1, (gates width)] V(ep) = grouped_linear(%ready, %up, %mine, False)
        %acted  : f32[u1, width] V(ep)       = activate(%wide, 'half')
        %found  : f32[u1, hidden] V(ep)      = grouped_linear(%acted, %down, %mine, False)
        %back   : f32[u1, hidden] V(ep)      = gather_rows(%found, %sorted, 1)
        %home   : f32[c1, hidden] V(ep)      = all_to_all_v(%back, %got, %sent, ep)
        %ends   : f32[(tokens@ep k), hidden] = extended(%home, %sent, 8)
        %ym     : f32[tokens@ep, hidden]     = unpermute(%ends, %order, %wm)
        %y      : f32[(batch@dp seq@tp), hidden] = cross_fold(%ym)
        return [%y]
        """,
        "dp=2,tp=2|ep=4",
        told=", True",
        up="experts@ep, (gates width)",
        down="experts@ep, hidden, width",
        on="",
    )


def test_padded_experts_are_sent_what_a_rank_may_have_for_them() -> None:
    """An expert takes 1 of each group of 4 tokens, which is a sequence, and a rank has a half of 2 of them."""
    rewrites(
        """
        %xm     : f32[tokens@(ep,etp), hidden]     = cross_fold(%x)
        %im     : i64[tokens@(ep,etp), k]          = cross_fold(%ids)
        %wm     : f32[tokens@(ep,etp), k]          = cross_fold(%weights)
        %flat   : i64[(tokens@(ep,etp) k)]         = aten.reshape(%im, [-1])
        %order  : i64[(tokens@(ep,etp) k)]         = aten.argsort(%flat, stable=True)
        %all    : f32[(tokens@(ep,etp) k), hidden] = permute(%xm, %order, 2)
        %more   : i64[n1] V(ep,etp)              = count(%im, 5)
        %counts : i64[experts] V(ep,etp)         = aten.slice(%more, 0, 0, 4)
        %rows   : f32[p1, hidden] V(ep,etp)      = spread(%all, %counts, 2)
        %here   : f32[p1, hidden] V(ep,etp)      = all_to_all(%rows, ep)
        %apart  : f32[p1, hidden] V(ep,etp)      = aten.reshape(%here, [2, 2, 2, 8])
        %turned : f32[p1, hidden] V(ep,etp)      = aten.transpose(%apart, 0, 1)
        %mine   : f32[p1, hidden] V(ep,etp)      = aten.reshape(%turned, [2, 4, 8])
        %every  : f32[p1, hidden] R(etp) V(ep)   = all_gather(%mine, 1, 1, etp, R)
        %ready  : f32[g1, hidden] R(etp) V(ep)   = aten.reshape(%every, [-1, 8])
        %taken  : i64[experts@ep] R(etp)         = aten.full([2], 8, dtype=int64, device=cpu)
        %wide   : f32[g1, (gates width@etp)] V(ep) = grouped_linear(%ready, %up, %taken, False)
        %acted  : f32[g1, width@etp] V(ep)       = activate(%wide, 'half')
        %terms  : f32[g1, hidden] P(etp) V(ep)   = grouped_linear(%acted, %down, %taken, False)
        %blocks : f32[g1, hidden] P(etp) V(ep)   = aten.reshape(%terms, [2, -1, 8])
        %summed : f32[p1, hidden] V(ep,etp)      = reduce_scatter(%blocks, 1, 1, etp)
        %split  : f32[p1, hidden] V(ep,etp)      = aten.reshape(%summed, [2, 2, 2, 8])
        %back   : f32[p1, hidden] V(ep,etp)      = aten.transpose(%split, 0, 1)
        %joined : f32[p1, hidden] V(ep,etp)      = aten.reshape(%back, [2, 4, 8])
        %sent   : f32[p1, hidden] V(ep,etp)      = aten.reshape(%joined, [-1, 8])
        %home   : f32[p1, hidden] V(ep,etp)      = all_to_all(%sent, ep)
        %ends   : f32[(tokens@(ep,etp) k), hidden] = collected(%home, %counts, 8)
        %ym     : f32[tokens@(ep,etp), hidden]   = unpermute(%ends, %order, %wm)
        %y      : f32[(batch@dp seq@tp), hidden] = cross_fold(%ym)
        return [%y]
        """,
        "dp=2,tp=2|ep=2,etp=2",
        told=", True, 1, 4",
        up="experts@ep, (gates width@etp)",
        down="experts@ep, hidden, width@etp",
        on="",
    )


def test_weights_without_a_gradient_are_used_as_they_are_held() -> None:
    for frozen in ("", " · frozen"):
        arguments = ARGUMENTS.format(**WHOLE).replace("parameter up", f"parameter up{frozen}")
        left = Dispatch().run(program(FACTORS + arguments + EXPERTS, stage="shard", mesh="dp=2,tp=2"))
        moved = {n.args[0].name for _, n in left.nodes() if n.target is reshard}
        assert moved == ({"down"} if frozen else {"up", "down"})


@pytest.mark.parametrize(
    ("mesh", "says"), [("dp=3|ep=3", "4 experts do not divide over ep=3"), ("tp=3|etp=3", "16 columns of each expert")]
)
def test_experts_that_do_not_divide_are_an_error(mesh: str, says: str) -> None:
    text = FACTORS + ARGUMENTS.format(**WHOLE) + EXPERTS
    text = text.replace("batch=4", "batch=6").replace("seq=4", "seq=6")
    given = program(text, stage="shard", mesh=mesh)
    with pytest.raises(FoldError, match=says):
        Dispatch().run(given)
