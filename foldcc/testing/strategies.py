"""Hypothesis strategies for what foldcc takes: folded meshes, small models, routings and batches that fit together.

Nothing that is drawn is illegal, so a test needs no `assume`. What fails shrinks towards one layer, few axes and few
tokens, and is reported as the calls that make it again.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any, NamedTuple

from torch import Tensor, nn

from foldcc.errors import FoldError, divisors
from foldcc.mesh import FoldedMesh
from foldcc.testing.batches import decoder_batch, uneven_batch
from foldcc.testing.configs import DecoderConfig, ExpertsConfig
from foldcc.testing.decoder import Decoder
from foldcc.testing.folds import folded_meshes
from foldcc.testing.routing import KINDS, Routing

try:
    from hypothesis import strategies as st
    from hypothesis.strategies import DrawFn, SearchStrategy
except ImportError:
    raise FoldError("The strategies of foldcc.testing need hypothesis.", valid="pip install 'foldcc[testing]'") from None


class Case(NamedTuple):
    """A model, a mesh that it can be folded on, and the keyword arguments of a call with the global batch."""

    model: nn.Module
    mesh: FoldedMesh
    inputs: dict[str, Any]


def meshes(world: int = 8) -> SearchStrategy[FoldedMesh]:
    """The virtual folded meshes of `world` ranks."""
    return st.sampled_from(folded_meshes(world))


def models(mesh: FoldedMesh | str = "dp=1") -> SearchStrategy[Decoder]:
    """Decoders, dense or with experts, that can be folded on a mesh."""
    return dense_models(mesh) | moe_models(mesh)


def dense_models(mesh: FoldedMesh | str = "dp=1") -> SearchStrategy[Decoder]:
    """Decoders without experts that can be folded on a mesh."""
    return st.builds(Decoder, _decoders(_parsed(mesh), routed=False))


def moe_models(mesh: FoldedMesh | str = "dp=1") -> SearchStrategy[Decoder]:
    """Decoders with experts that can be folded on a mesh."""
    return st.builds(Decoder, _decoders(_parsed(mesh), routed=True))


def routings(model: Decoder | None = None, mesh: FoldedMesh | str = "dp=1") -> SearchStrategy[Routing]:
    """Routings: of every kind, or those that a model's experts leave room for on a mesh."""
    all_routings = [Routing(kind=kind, which=which) for which in range(8) for kind in KINDS]
    moe = None if model is None else model.config.moe
    return st.sampled_from([r for r in all_routings if moe is None or r.fits(moe, _parsed(mesh))])


@st.composite
def inputs(
    draw: DrawFn,
    model: nn.Module,
    mesh: FoldedMesh | str,
    *,
    vocab: int | None = None,
    names: tuple[str, str] = ("input_ids", "labels"),
) -> dict[str, Tensor]:
    """Batches with different numbers of valid tokens on the data-parallel ranks, down to none.

    Args:
        vocab: of a model of your own; a `Decoder` says it itself, and gets a routing besides.
        names: of the tokens and the labels among the arguments of a model of your own.
    """
    mesh = _parsed(mesh)
    length = mesh.size("tp") * draw(st.integers(2 if mesh.size("tp") == 1 else 1, 3))
    samples = draw(st.integers(1, 2))
    room = samples * (length - 1)
    # As many numbers on every mesh of a world, so that what fails can shrink to another mesh.
    counts = st.lists(st.integers(0, room), min_size=mesh.world_size, max_size=mesh.world_size)
    valid = draw(counts)[: mesh.data_parallel]
    valid[0] = valid[0] if any(valid) else 1
    given: dict[str, Any] = {"valid": st.just(valid), "samples": st.just(samples), "length": st.just(length), "seed": _SEEDS}
    if not isinstance(model, Decoder):
        if vocab is None:
            raise FoldError(f"{type(model).__name__} does not say how many tokens there are.", valid="inputs(..., vocab=...)")
        return draw(st.builds(uneven_batch, st.just(mesh), vocab=st.just(vocab), names=st.just(names), **given))
    return draw(st.builds(decoder_batch, st.just(model), st.just(mesh), routing=routings(model, mesh), **given))


@st.composite
def programs(
    draw: DrawFn,
    world: int = 8,
    *,
    models: Callable[[FoldedMesh], SearchStrategy[nn.Module]] = models,
    inputs: Callable[[nn.Module, FoldedMesh], SearchStrategy[dict[str, Any]]] = inputs,
) -> Case:
    """A folded mesh of `world` ranks, a model that fits on it, and a batch for both.

    Args:
        models, inputs: strategies in place of the kit's, given the mesh, and the model and the mesh.
    """
    mesh = draw(meshes(world))
    model = draw(models(mesh))
    return draw(st.builds(Case, st.just(model), st.just(mesh), inputs(model, mesh)))


_SEEDS = st.integers(0, 2**16)


def _parsed(mesh: FoldedMesh | str) -> FoldedMesh:
    return FoldedMesh.parse(mesh) if isinstance(mesh, str) else mesh


@st.composite
def _decoders(draw: DrawFn, mesh: FoldedMesh, *, routed: bool) -> DecoderConfig:
    tp, layers = mesh.size("tp"), draw(st.integers(1, 3))
    kv_heads = draw(st.sampled_from(sorted({*divisors(tp), 2 * tp, 3})))
    # tp divides key/value heads first, and then the query heads of each, if it counts further than there are.
    nested = kv_heads % tp == 0 or tp % kv_heads == 0
    group = draw(st.integers(1, 2)) * (tp // gcd(tp, kv_heads) if nested else tp)
    return DecoderConfig(
        layers=layers,
        vocab=draw(_sizes(tp)) * 4,
        hidden=draw(st.sampled_from([10, 14, 22])),  # and no other size is one of these
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 6])),
        width=draw(_sizes(tp)) * 3,
        gated=draw(st.booleans()),
        fused=draw(st.booleans()),
        norm=draw(st.sampled_from(["rms", "layer"])),
        qk_norm=draw(st.booleans()),
        biased=draw(st.booleans()),
        tied=draw(st.booleans()),
        moe=draw(_experts(mesh, layers)) if routed else None,
        seed=draw(_SEEDS),
    )


@st.composite
def _experts(draw: DrawFn, mesh: FoldedMesh, layers: int) -> ExpertsConfig:
    ep = mesh.size("ep")
    experts = ep * draw(st.integers(2 if ep == 1 else 1, 3))
    chosen = draw(st.integers(1, min(experts, 3)))
    gated = draw(st.booleans())
    return ExpertsConfig(
        experts=experts,
        chosen=chosen,
        width=mesh.size("etp") * draw(st.integers(2, 5)),
        gated=gated,
        interleaved=gated and draw(st.booleans()),
        transposed=draw(st.booleans()),
        biased=draw(st.booleans()),
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        normalized=draw(st.booleans()),
        shared=draw(st.just(0) | _sizes(mesh.size("tp"))),
        aux_loss=draw(st.sampled_from([0.0, 0.25])),
        first=draw(st.integers(0, min(1, layers - 1))),
    )


def _sizes(ranks: int) -> SearchStrategy[int]:
    """Sizes that the ranks divide, mostly: one that they do not is legal, and stays whole on every rank."""
    return st.sampled_from([2 * ranks, 3 * ranks, 4 * ranks, 5])
