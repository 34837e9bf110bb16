"""foldcc's own operators, one record each."""

from foldcc.ops.attention import attention
from foldcc.ops.captured import Captured, captured_record, captured_records
from foldcc.ops.collectives import (
    all_gather,
    all_gather_v,
    all_reduce,
    all_reduce_max,
    all_to_all,
    all_to_all_v,
    axis_index,
    once,
    pad,
    reduce_scatter,
    reduce_scatter_v,
    retype,
    shard,
)
from foldcc.ops.convolution import causal_conv
from foldcc.ops.embedding import embedding
from foldcc.ops.exchange import exchange
from foldcc.ops.experts import (
    by_expert,
    count,
    each_expert,
    experts,
    experts_node,
    experts_record,
    gather_rows,
    grouped_linear,
    permute,
    splits,
    unpermute,
)
from foldcc.ops.halo import halo, halo_sum
from foldcc.ops.loss import token_loss
from foldcc.ops.operator import Operator, record, records
from foldcc.ops.random import random_bits
from foldcc.ops.ring import attend_block, attend_block_backward, either, shift
from foldcc.ops.rows import collected, extended, leading, spread
from foldcc.ops.scan import cumsum, from_ranks_before, of_ranks_behind

__all__ = [
    "Captured",
    "Operator",
    "all_gather",
    "all_gather_v",
    "all_reduce",
    "all_reduce_max",
    "all_to_all",
    "all_to_all_v",
    "attend_block",
    "attend_block_backward",
    "attention",
    "axis_index",
    "by_expert",
    "captured_record",
    "captured_records",
    "causal_conv",
    "collected",
    "count",
    "cumsum",
    "each_expert",
    "embedding",
    "either",
    "exchange",
    "experts",
    "experts_node",
    "experts_record",
    "extended",
    "from_ranks_before",
    "gather_rows",
    "grouped_linear",
    "halo",
    "halo_sum",
    "leading",
    "of_ranks_behind",
    "once",
    "pad",
    "permute",
    "random_bits",
    "record",
    "records",
    "reduce_scatter",
    "reduce_scatter_v",
    "retype",
    "shard",
    "shift",
    "splits",
    "spread",
    "token_loss",
    "unpermute",
]
