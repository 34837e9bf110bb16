"""Mistakes that training frameworks made, planted, caught, and found in the right place.

docs/mutations.md lists them with their sources, and those that the language cannot express.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

import foldcc
from foldcc import ops
from foldcc.ir.program import Program
from foldcc.module import FoldedModule
from foldcc.testing import mutate
from foldcc.testing.mutate.edits import before, feed, instead, wrap
from foldcc.verification.proof import Proof
from tests.mutations.programs import folded

aten = torch.ops.aten
FOLD, NARROW = "dp=2,tp=4|ep=4,etp=2", "dp=3,tp=2|ep=2"


def caught(broken: FoldedModule, *words: str) -> Proof:
    """The proof that fails, and says so with these words."""
    proof = foldcc.verify(broken)
    assert not proof.ok
    for word in words:
        assert word in str(proof), str(proof)
    return proof


def nodes(program: Program, target: object, module: str = "") -> Iterator[fx.Node]:
    """The calls of an operator that come from a module, by the end of its path."""
    for _, node in program.nodes():
        stack = node.meta.get("nn_module_stack") or {"": ("",)}
        if node.target == getattr(target, "overload", target) and list(stack.values())[-1][0].endswith(module):
            yield node


# --- scale --------------------------------------------------------------------------------------------------------------


def test_expert_gradients_scaled_by_one_over_ep_are_caught() -> None:
    broken = mutate.scale_gradient(folded("mixtral", FOLD), parameter="*.experts.*", factor=1 / 4)
    assert "mlp.experts" in caught(broken, "1/4 times").parameter


def test_expert_gradients_that_are_ep_times_too_large_are_caught() -> None:
    broken = mutate.scale_gradient(folded("mixtral", FOLD), parameter="*.experts.gate_up_proj", factor=4)
    assert caught(broken, "4 times").parameter.endswith("mlp.experts.gate_up_proj")


def test_a_gradient_that_is_averaged_where_its_loss_was_already_is_caught() -> None:
    broken = mutate.scale_gradient(folded("deepseek_v3", NARROW), parameter="*.shared_experts.*", factor=1 / 3)
    assert "shared_experts" in caught(broken, "1/3 times").parameter


def test_an_attention_gradient_divided_by_the_size_of_the_wrong_group_is_caught() -> None:
    model = folded("mixtral", FOLD)
    mistake = mutate.find(model, kind="scale", direction="backward", module="*.self_attn", description="*divided by 2")
    assert "self_attn" in caught(mistake.apply()).parameter


# --- group --------------------------------------------------------------------------------------------------------------


def test_expert_gradients_reduced_over_the_dense_data_parallel_group_are_caught() -> None:
    model = folded("mixtral", "dp=4,tp=2|ep=1,etp=4")
    mistake = mutate.find(model, kind="other axis", direction="backward", description="all_reduce over dp instead of edp")
    assert "experts" in caught(mistake.apply()).parameter


def test_a_group_of_the_same_size_is_not_the_same_group() -> None:
    mistake = mutate.find(folded("mixtral", FOLD), kind="other axis", description="reduce_scatter over ep instead of tp")
    assert mutate.equivalent(mistake) is None
    caught(mistake.apply())


# --- missing or extra reductions in the backward pass; the forward pass is right ------------------------------------------


def test_a_router_gradient_that_is_not_reduced_over_tp_is_caught() -> None:
    model = folded("mixtral", "dp=2,tp=2|ep=4", num_hidden_layers=1)
    broken = mutate.drop_reduction(model, parameter="*.gate.weight", axis="tp")
    proof = foldcc.verify(broken)
    assert not proof.ok and proof.parameter == "model.layers.0.mlp.gate.weight" and "tp" in str(proof)


def test_a_partial_gradient_that_is_taken_for_a_whole_one_is_caught() -> None:
    model = folded("deepseek_v3", NARROW)
    mistake = mutate.find(model, kind="left out", direction="backward", module="*q_a_layernorm", description="all_reduce *")
    assert "self_attn.q_a" in caught(mistake.apply()).parameter


def test_a_bias_that_is_added_on_every_rank_is_caught() -> None:
    model = folded("gpt_oss", "dp=2,tp=2|ep=2,etp=2", num_hidden_layers=1)
    for module in ("*.o_proj", "*.experts"):
        mistake = mutate.find(model, stage="localize", kind="left out", module=module, description="once*")
        caught(mistake.apply())


def test_a_complete_gradient_that_is_reduced_again_is_caught() -> None:
    broken = mutate.reduce_again(folded("mixtral", FOLD), parameter="*.q_proj.weight", axis="dp")
    assert caught(broken, "2 times").parameter.endswith("self_attn.q_proj.weight")


def test_a_norm_gradient_without_the_sum_over_its_sequence_shards_is_caught() -> None:
    broken = mutate.drop_reduction(folded("mixtral", FOLD), parameter="model.norm.weight", axis="tp")
    assert caught(broken, "tp").parameter == "model.norm.weight"


def test_key_and_value_gradients_of_repeated_heads_that_are_not_reduced_are_caught() -> None:
    model = folded("mixtral", FOLD)  # two key/value heads on four ranks of tp
    found = [m for m in mutate.mutants(model) if m.kind == "left out" and m.site.direction == "backward"]
    found = [m for m in found if m.site.module.endswith("self_attn") and m.description.startswith("reduce_scatter")]
    places = {caught(mistake.apply()).parameter.removeprefix("model.layers.1.self_attn.") for mistake in found}
    assert places == {"k_proj.weight", "v_proj.weight"}


def test_a_gather_whose_gradient_is_a_slice_is_caught() -> None:
    model = folded("mixtral", FOLD)
    mistake = mutate.find(model, kind="left out", direction="backward", module="*.input_layernorm", description="reduce_s*")
    assert caught(mistake.apply()).parameter.endswith("input_layernorm.weight")


# --- losses -------------------------------------------------------------------------------------------------------------


def test_an_auxiliary_loss_that_is_tp_times_too_large_is_caught() -> None:
    def edit(program: Program) -> None:
        (coefficient,) = (n for n in nodes(program, aten.mul.Tensor) if n.args[1] == 0.001)
        wrap(coefficient, aten.mul.Tensor, 4)

    caught(mutate.rewrite(folded("mixtral", FOLD), after="localize", edit=edit), "Output")


def test_a_loss_that_is_normalised_by_local_token_counts_is_caught() -> None:
    def edit(program: Program) -> None:
        (count,) = (n for n in nodes(program, ops.all_reduce) if n.meta["val"].dtype == torch.int64)
        instead(count, before(count, aten.mul.Tensor, count.args[0], program.mesh.size("dp")))

    caught(mutate.rewrite(folded("mixtral", FOLD), after="localize", edit=edit), "aten.div")


def test_a_partial_of_the_vocabulary_parallel_loss_that_is_taken_for_the_whole_is_caught() -> None:
    mistake = mutate.find(
        folded("mixtral", FOLD), stage="localize", kind="left out", block="block2", description="all_reduce over tp*"
    )
    caught(mistake.apply())


# --- routing ------------------------------------------------------------------------------------------------------------


def test_global_expert_ids_that_are_taken_for_local_ones_are_caught() -> None:
    def edit(program: Program) -> None:
        (count,) = nodes(program, ops.count)
        feed(count, aten.remainder.Scalar, 2)  # two experts on a rank

    caught(mutate.rewrite(folded("mixtral", FOLD), after="localize", edit=edit))


def test_a_combine_index_that_is_right_for_one_sample_only_is_caught() -> None:
    def edit(program: Program) -> None:
        (unpermute,) = nodes(program, ops.unpermute)
        rows, order, weights = unpermute.args
        wrong = before(unpermute, aten.roll.default, order, [order.meta["val"].shape[0] // 2], [0])
        unpermute.args = (rows, wrong, weights)

    caught(mutate.rewrite(folded("mixtral", FOLD), after="localize", edit=edit))


def test_expert_weights_without_a_gradient_are_caught() -> None:
    broken = mutate.drop_gradient(folded("mixtral", FOLD), parameter="*.experts.down_proj")
    assert caught(broken, "missing").parameter.endswith("experts.down_proj")


def test_routing_weights_applied_before_the_experts_are_caught() -> None:
    def edit(program: Program) -> None:
        (unpermute,) = nodes(program, ops.unpermute)
        rows, order, weights = unpermute.args
        unpermute.args = (rows, order, before(unpermute, aten.ones_like.default, weights))
        (permute,) = (n for n in order.users if n.target is ops.permute.overload)
        by_row = before(permute, aten.index_select.default, before(permute, aten.reshape.default, weights, [-1]), 0, order)
        column = before(permute, aten.unsqueeze.default, by_row, 1)
        wrap(permute, aten.mul.Tensor, column)

    caught(mutate.rewrite(folded("mixtral", FOLD), after="localize", edit=edit))


# --- positions, sharing -------------------------------------------------------------------------------------------------


def test_rotary_embeddings_without_the_offset_of_a_sequence_shard_are_caught() -> None:
    def edit(program: Program) -> None:
        for shard in list(nodes(program, ops.shard, "self_attn")):
            x, dim = shard.args[:2]
            instead(shard, before(shard, aten.slice.Tensor, x, dim, 0, shard.meta["layout"].shape[dim]))

    caught(mutate.rewrite(folded("deepseek_v3", NARROW), after="localize", edit=edit), "self_attn")


def test_a_gather_of_another_dimension_is_caught() -> None:
    def edit(program: Program) -> None:
        gather = next(nodes(program, ops.all_gather, "self_attn"))
        wanted = list(gather.meta["layout"].shape)
        gather.update_arg(1, 2)
        wrap(gather, aten.reshape.default, wanted)

    caught(mutate.rewrite(folded("mixtral", FOLD), after="localize", edit=edit), "self_attn")


def test_a_tied_weight_whose_gradient_counts_twice_is_caught() -> None:
    model = folded("mixtral", FOLD)
    mistake = mutate.find(model, kind="shared", description="*embed_tokens.weight counts twice")
    assert caught(mistake.apply()).parameter == "model.embed_tokens.weight"


def test_tied_weights_of_which_one_use_is_forgotten_are_caught() -> None:
    model = folded("mixtral", FOLD)
    mistake = mutate.find(model, kind="shared", description="*embed_tokens.weight gives no gradient")
    assert caught(mistake.apply()).parameter == "model.embed_tokens.weight"
