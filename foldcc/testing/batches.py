"""Batches of tokens in which data-parallel ranks have different numbers of valid ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foldcc.errors import FoldError
from foldcc.mesh import FoldedMesh
from foldcc.testing.decoder import Decoder
from foldcc.testing.routing import Routing


def uneven_batch(
    mesh: FoldedMesh,
    *,
    vocab: int,
    valid: Sequence[int],
    samples: int = 1,
    length: int = 8,
    names: tuple[str, str] = ("ids", "labels"),
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random tokens of the global batch and their labels, each [dp * samples, length].

    Args:
        valid: for each data-parallel rank, how many of its labels are not -100: 0 to `samples * (length - 1)`. A
            sample's first label never counts, so that the numbers hold for models that shift labels themselves.
        names: of the two inputs.

    Raises:
        FoldError: a number of valid tokens is out of range, or there is none at all, of which no mean can be taken.
    """
    dp, room = mesh.data_parallel, samples * (length - 1)
    if len(valid) != dp or not all(0 <= count <= room for count in valid) or not any(valid):
        raise FoldError(f"{list(valid)} valid tokens on dp={dp}.", valid=f"{dp} numbers of 0 to {room}, not all of them 0")
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (dp * samples, length), generator=random)
    labels = torch.randint(vocab, (dp, samples, length), generator=random)
    labels[..., 0] = -100
    for own, count in zip(labels, valid, strict=True):
        ignored = torch.randperm(room, generator=random)[count:]
        own[ignored // (length - 1), 1 + ignored % (length - 1)] = -100
    return dict(zip(names, (ids, labels.flatten(0, 1)), strict=True))


def decoder_batch(
    model: Decoder,
    mesh: FoldedMesh,
    *,
    valid: Sequence[int],
    samples: int = 1,
    length: int = 8,
    routing: Routing | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The inputs of a `Decoder`: an `uneven_batch`, and where its experts' tokens go, unless its router says that."""
    batch = uneven_batch(mesh, vocab=model.config.vocab, valid=valid, samples=samples, length=length, seed=seed)
    if model.config.moe is not None and routing is not None:
        preferences = routing.preferences(model.config.moe, mesh, *batch["ids"].shape)
        if preferences is not None:
            batch["routing"] = preferences
    return batch
