"""What a `Decoder` is: a model of the kit as a value, which prints as what makes it again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from foldcc.errors import FoldError
from foldcc.ops.capacity import Capacity


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A Mixture-of-Experts layer.

    Attributes:
        experts, chosen: how many there are, and how many each token goes to.
        width: of each expert.
        gated: each expert has a gate beside its up projection.
        interleaved: gate and up alternate, instead of standing one after the other.
        transposed: the experts' weights are stored input-major.
        biased: the experts' projections have biases.
        scoring: the router's scores are a softmax over the experts, or a sigmoid of each.
        normalized: the weights of a token's experts are divided by their sum.
        shared: width of an expert that every token goes to besides; 0 for none.
        aux_loss: coefficient of the load-balancing loss in the loss (Switch Transformer, arXiv 2101.03961, equation 4).
        first: the first layer that has experts; those before it are dense.
        capacity: of the experts; without one they take all tokens.
    """

    experts: int = 8
    chosen: int = 2
    width: int = 16
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    biased: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = False
    shared: int = 0
    aux_loss: float = 0.0
    first: int = 0
    capacity: Capacity | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.chosen <= self.experts:
            raise FoldError(f"{self.chosen} of {self.experts} experts are chosen.", valid=f"1 to {self.experts}")
        if self.interleaved and not self.gated:
            raise FoldError("Experts without a gate have nothing to interleave.", valid="gated=True, or interleaved=False")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder.

    Attributes:
        vocab, hidden, layers: sizes.
        heads, kv_heads, head_dim: of attention; every `heads / kv_heads` query heads share a key/value head.
        width: of the MLP in layers without experts.
        gated: the MLP has a gate.
        fused: the MLP's gate and up, and attention's key and value, are one projection each.
        norm: RMSNorm or LayerNorm.
        qk_norm: queries and keys are normalised in each head.
        biased: attention's and the MLP's projections have biases.
        tied: the embedding is the head.
        moe: the experts; None for a dense model.
        seed: of the weights.
    """

    vocab: int = 48
    hidden: int = 16
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 4
    width: int = 24
    gated: bool = True
    fused: bool = False
    norm: Literal["rms", "layer"] = "rms"
    qk_norm: bool = False
    biased: bool = False
    tied: bool = False
    moe: ExpertsConfig | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            valid = f"multiples of {self.kv_heads}"
            raise FoldError(f"{self.heads} heads do not share {self.kv_heads} key/value heads evenly.", valid=valid)
        if self.head_dim % 2:
            raise FoldError(f"Rotary embeddings turn pairs, and head_dim is {self.head_dim}.", valid="even numbers")
