"""A small model of any Transformers type, by one rule: the words of a number's name say what it counts.

Widths, heads and sizes of heads are divided each by one factor, so that their ratios and products stay what they were. Of
each kind of layer, the first and the last remain.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

VOCABULARY, LENGTH = 128, 16
SIZES = (32, 128)  # of the hidden width: the second where the first rounds numbers of a type until they do not fit
_HEADS, _EXPERTS, _CHOSEN, _WINDOW, _STATE, _POSITIONS = 4, 8, 2, 8, 8, 64
_LAYERS = re.compile(r"(num_|n_)?(hidden_|encoder_|decoder_)?(layers?|blocks)(_per_stack)?")


@dataclass(frozen=True)
class _Scale:
    """By what widths, heads and sizes of heads are divided, and which layers remain."""

    width: float
    heads: float
    layers: tuple[int, ...]

    def of_width(self, n: int) -> int:
        return _multiple(n / self.width, 8)

    def of_heads(self, n: int) -> int:
        return n if n <= 1 else max(2, round(n / self.heads))

    def of_head(self, n: int) -> int:
        return _multiple(n * self.heads / self.width, 2)


# What a configuration may leave to whoever writes it, and a model needs.
_UNSET = {
    "head_dim": SIZES[0] // _HEADS,
    "num_key_value_heads": _HEADS,
    "num_experts_per_tok": _CHOSEN,
    "n_routed_experts": _EXPERTS,
    "n_shared_experts": 1,
}
# What the words of a name say, the first that fits: how the number becomes smaller.
_RULES: tuple[tuple[str, Callable[[int, _Scale], int]], ...] = (
    (r".*vocab.*", lambda n, _: min(n, VOCABULARY)),
    (r".*(_id|_ids|_index)", lambda n, _: n % VOCABULARY if n > 0 else n),
    (r".*(period|interval|every|sparse_step|pattern|group_size).*", lambda n, _: min(n, 2)),
    (r".*(offset|first_k|dense_layers|shared_layers|window_layers|start_index|end_index).*", lambda n, _: min(n, 1)),
    (r".*(per_tok|per_token|experts_top|moe_k|moe_topk|moe_top_k|topk_group)", lambda n, _: min(n, _CHOSEN)),
    (r".*shared_experts|.*nextn.*", lambda n, _: min(n, 1)),
    (r"(n_group|num_expert_group|.*n_?groups)", lambda n, _: min(n, _HEADS)),
    (r"(?!.*(size|dim|width|rank)).*expert.*", lambda n, _: min(n, _EXPERTS)),
    (r".*(position|seq_len|context_length|model_max_length|n_ctx).*", lambda n, _: min(n, _POSITIONS)),
    (r".*(window|chunk|local_attention|block_size|topk|top_k).*", lambda n, _: min(n, _WINDOW)),
    (r".*state(_size)?", lambda n, _: min(n, _STATE)),
    (r".*(head_dim|headdim|head_size|d_head|dim_head|kv_channels|rotary_dim|d_rel)", lambda n, s: s.of_head(n)),
    (r".*(n_head|heads|query_groups)(_per_layer)?", lambda n, s: s.of_heads(n)),
    (r".*(kernel|dim_factor|expand).*", lambda n, _: n),
    (r".*(hidden|model|embd|inner|intermediate|ffn|ff|feed_forward|width|rank|embed|embedding|input|dim|d_ssm).*",
     lambda n, s: s.of_width(n)),
)  # fmt: skip


def small_model(kind: str, hidden: int = SIZES[0]) -> nn.Module:
    """A small random causal language model of a Transformers type, its norms and biases random as well.

    Args:
        kind: a `model_type` of Transformers.
        hidden: its width.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = shrunk(CONFIG_MAPPING[kind](), hidden)
    config.use_cache = False  # training keeps none
    # A loop over the experts, which takes float64 as well.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def shrunk(config: Any, hidden: int) -> Any:
    """A configuration of the same class with small numbers."""
    whole = _numbers(config)
    width, heads = (_size(config, *names) for names in (("hidden_size",), ("num_attention_heads", "num_heads")))
    scale = _Scale((width or hidden) / hidden, (heads or _HEADS) / _HEADS, _kinds_of_layers(config, whole))
    changed = {}
    for name, value in whole.items():
        if hasattr(value, "to_dict"):
            changed[name] = shrunk(value, hidden)
        else:
            changed[name] = _smaller(name, value, scale, _size(config, "num_hidden_layers"))
    return type(config)(**changed)


def holds_experts(config: Any) -> bool:
    """Whether a configuration counts more than one expert."""
    whole = _numbers(config)
    counts = [x for name, x in whole.items() if re.fullmatch(r"(n|num|moe_num)_(routed_|local_)?experts", name)]
    inner = [x for x in whole.values() if hasattr(x, "to_dict")]
    return any(isinstance(n, int) and n > 1 for n in counts) or any(map(holds_experts, inner))


def _numbers(config: Any) -> dict[str, Any]:
    """What a configuration was made of: what it says of itself, and the configurations of its parts."""
    config.allow_global_per_layer_attribute_access = True  # what differs by layer may be asked for as a whole
    left_out = {"transformers_version", "model_type", "architectures", "dtype", "allow_global_per_layer_attribute_access"}
    return {name: vars(config).get(name, x) for name, x in config.to_dict().items() if name not in left_out}


def _smaller(name: str, value: Any, scale: _Scale, layers: int | None) -> Any:
    if value is None:
        return _UNSET.get(name)
    if isinstance(value, bool) or name.startswith("_"):
        return value
    if isinstance(value, int):
        if _LAYERS.fullmatch(name):
            return len(scale.layers)
        rule = next((f for words, f in _RULES if re.fullmatch(words, name)), None)
        return value if rule is None else rule(value, scale)
    if isinstance(value, (list, tuple)):
        if _of_layers(name, value):
            return [new for new, i in enumerate(scale.layers) if i in value] or [len(scale.layers) - 1][: len(value)]
        if len(value) == layers:
            value = [value[i] for i in scale.layers]
        return [_smaller(name, x, scale, None) for x in value]
    if isinstance(value, Mapping):
        if _by_layer(name, value):
            value = {new: x for new, i in enumerate(scale.layers) for key, x in value.items() if int(key) == i}
        return {key: _smaller(key if isinstance(key, str) else name, x, scale, None) for key, x in value.items()}
    return value


def _kinds_of_layers(config: Any, whole: Mapping[str, Any]) -> tuple[int, ...]:
    """The first and the last layer of each kind, as what is said of single layers tells them apart."""
    count = _size(config, "num_hidden_layers") or 2
    said = [x for name, x in whole.items() if isinstance(x, (list, tuple)) and len(x) == count and not _of_layers(name, x)]
    said += [[i in x for i in range(count)] for name, x in whole.items() if _of_layers(name, x)]
    said += [[x.get(i, x.get(str(i))) for i in range(count)] for name, x in whole.items() if _by_layer(name, x)]
    kinds = [str([x[i] for x in said]) for i in range(count)]
    first, last = ({kind: i for i, kind in order} for order in (reversed([*enumerate(kinds)]), enumerate(kinds)))
    kept = {0, count - 1} if len(first) > count / 2 else {*first.values(), *last.values()}
    return tuple(sorted(kept))


def _of_layers(name: str, value: Any) -> bool:
    """Whether a list holds numbers of layers."""
    ints = isinstance(value, (list, tuple)) and all(type(x) is int for x in value) and len({*value}) == len(value)
    return ints and re.search("layer.*(id|idx|ind)|idx|_layers$", name) is not None


def _by_layer(name: str, value: Any) -> bool:
    """Whether a mapping says something of single layers."""
    return "layer" in name and isinstance(value, Mapping) and all(str(key).isdigit() for key in value)


def _size(config: Any, *names: str) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((n for n in found if type(n) is int and n > 0), None)


def _multiple(size: float, of: int) -> int:
    return max(1, round(size / of)) * of
