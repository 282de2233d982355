"""Routing on the device: the counting sort of the expert ids, and lists of row tiles of which none straddles
experts.

Every size that a kernel meets as data (what stands in expert_idxs, expert_offsets, sorted_scattered_idxs) is
clamped before it becomes an address: wrong contents give wrong values, never an access outside a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import checks
from ..batch_invariance import is_batch_invariant
from ..calls import FlattenSortCount
from . import configs


@triton.jit
def load_keys(ids, position, stride_t, stride_j, S, E, top_k):
    """ids [T, top_k] at slots `position` → expert, or E for sentinels and for slots past the end. int32."""
    # int64: T·stride passes 2³¹ for an expanded or sliced tensor.
    offset = (position // top_k).to(tl.int64) * stride_t + (position % top_k).to(tl.int64) * stride_j
    ids = tl.load(ids + offset, mask=position < S, other=-1)
    # Compared before any narrowing, so that 2³² + 1 does not come back as expert 1.
    return tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)


@triton.jit(do_not_specialize=["S", "E", "top_k", "blocks"])
def count_keys(ids, counts, stride_t, stride_j, S, E, top_k, blocks, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """Grid: (blocks,). How often each expert occurs in each block of slots.

    ids     [T, top_k]
    counts  [E + 1, blocks]; the last row is the sentinels'
    """
    block = tl.program_id(0)
    position = block * BLOCK + tl.arange(0, BLOCK)
    key = load_keys(ids, position, stride_t, stride_j, S, E, top_k)  # [BLOCK]
    for base in range(0, E + 1, KEYS):
        candidate = base + tl.arange(0, KEYS)
        hit = (key[None, :] == candidate[:, None]) & (position[None, :] < S)  # [KEYS, BLOCK]
        # int64: E·blocks passes 2³¹ for 2²³ slots and more experts than that leaves.
        place = counts + candidate.to(tl.int64) * blocks + block
        tl.store(place, tl.sum(hit.to(tl.int32), axis=1), mask=candidate <= E)


@triton.jit(do_not_specialize=["S", "E", "top_k", "blocks"])
def place_slots(
    ids, counts, ends, slots, offsets, stride_t, stride_j, S, E, top_k, blocks,
    BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks,). Each slot goes behind all lower keys and behind its own key's earlier slots.

    ids     [T, top_k]
    counts  [E + 1, blocks]
    ends    [E + 1, blocks]: running sum of counts, expert by expert
    slots   [S] int64, written
    offsets [E] int32, written by block 0
    """
    block = tl.program_id(0)
    local = tl.arange(0, BLOCK)
    position = block * BLOCK + local
    key = load_keys(ids, position, stride_t, stride_j, S, E, top_k)  # [BLOCK]
    earlier = (key[None, :] == key[:, None]) & (local[None, :] < local[:, None])  # [BLOCK, BLOCK]
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    cell = key.to(tl.int64) * blocks + block  # int64: as in count_keys
    start = tl.load(ends + cell) - tl.load(counts + cell)
    tl.store(slots + start + rank, position.to(tl.int64), mask=position < S)
    if block == 0:
        for base in range(0, E, KEYS):
            expert = base + tl.arange(0, KEYS)
            last = (expert.to(tl.int64) + 1) * blocks - 1  # int64: as in count_keys
            tl.store(offsets + expert, tl.load(ends + last, mask=expert < E), mask=expert < E)


def flatten_sort_count(call: FlattenSortCount) -> tuple[Tensor, Tensor]:
    """Stable counting sort: count per block, scan, place. No synchronisation, no atomics."""
    checks.flatten_sort_count(call)
    expert_idxs, num_experts = call
    top_k = expert_idxs.shape[1]
    rows = expert_idxs.shape[0] * top_k
    slots = expert_idxs.new_empty(rows, dtype=torch.int64)
    if rows == 0:
        return slots, expert_idxs.new_zeros(num_experts, dtype=torch.int32)
    offsets = expert_idxs.new_empty(num_experts, dtype=torch.int32)
    block = configs.sort_block(configs.machine(expert_idxs.device))
    blocks = configs.cdiv(rows, block)
    counts = expert_idxs.new_empty((num_experts + 1) * blocks, dtype=torch.int32)
    sizes = (*expert_idxs.stride(), rows, num_experts, top_k, blocks)
    shape = {"BLOCK": block, "KEYS": 64}
    count_keys[(blocks,)](expert_idxs, counts, *sizes, **shape)
    ends = counts.cumsum(0, dtype=torch.int32)
    place_slots[(blocks,)](expert_idxs, counts, ends, slots, offsets, *sizes, **shape)
    return slots, offsets


@triton.jit
def edge(offsets, expert, S, E):
    """One past the last row of `expert`: 0 for -1, S for E (the sentinels). Always in [0, S]."""
    end = tl.load(offsets + expert, mask=(expert >= 0) & (expert < E), other=0)
    return tl.where(expert < E, tl.minimum(tl.maximum(end, 0), S), S)


@triton.jit(do_not_specialize=["S", "E", "bound", "block_rows"])
def list_tiles(offsets, tiles, starts, S, E, bound, block_rows, BLOCK: tl.constexpr):
    """Grid: (E + 1,). Cuts each expert's rows into tiles; program E does the rows of sentinels.

    offsets [E]
    tiles   [3, bound]: expert (-1 for sentinels), first row, one past the last row
    starts  [E + 2]: number of tiles before each expert, before the sentinels' and in all
    """
    expert = tl.program_id(0)
    before = tl.zeros((), tl.int64)  # int64: offsets that decrease can bring this sum to E·S
    for base in range(0, expert, BLOCK):
        other = base + tl.arange(0, BLOCK)
        rows = tl.maximum(edge(offsets, other, S, E) - edge(offsets, other - 1, S, E), 0)
        rows = tl.where(other < expert, rows, 0)
        before += tl.sum(tl.cdiv(rows, block_rows).to(tl.int64), axis=0)
    first = tl.minimum(before, bound).to(tl.int32)
    low = edge(offsets, expert - 1, S, E)
    high = edge(offsets, expert, S, E)
    count = tl.minimum(tl.cdiv(tl.maximum(high - low, 0), block_rows), bound - first)
    for base in range(0, count, BLOCK):
        i = base + tl.arange(0, BLOCK)
        row = low + i * block_rows
        tl.store(tiles + first + i, tl.where(expert < E, expert, -1), mask=i < count)
        tl.store(tiles + bound + first + i, row, mask=i < count)
        tl.store(tiles + 2 * bound + first + i, tl.minimum(row + block_rows, high), mask=i < count)
    tl.store(starts + expert, first)
    if expert == E:
        tl.store(starts + E + 1, first + count)


class Tiles(NamedTuple):
    """Tiles of at most `rows` rows: `map` [3, bound] and `starts` [E + 2], as `list_tiles` writes them."""

    map: Tensor
    starts: Tensor
    bound: int
    rows: int


# Rows an expert that configurations go by where results must not depend on the batch: tiles of 128 rows.
INVARIANT_ROWS = 128


@dataclass(frozen=True)
class Routing:
    """slots [S] int64 and offsets [E] int32, contiguous, as every kernel takes them. invariant: whether a
    row's results may not depend on S and on what else is in the batch.
    """

    slots: Tensor
    offsets: Tensor
    top_k: int
    invariant: bool = False
    _made: dict[int, Tiles] = field(default_factory=dict, repr=False)

    @property
    def rows(self) -> int:
        """S."""
        return self.slots.shape[0]

    @property
    def experts(self) -> int:
        """E."""
        return self.offsets.shape[0]

    @property
    def per_expert(self) -> int:
        """Rows an expert, as configurations are chosen by."""
        return INVARIANT_ROWS if self.invariant else self.rows // self.experts

    def tiles(self, rows: int) -> Tiles:
        """Tiles of at most `rows` rows, listed once. Their number is known on the device only; the bound is
        static.
        """
        if rows not in self._made:
            self._made[rows] = self._list(rows)
        return self._made[rows]

    def _list(self, rows: int) -> Tiles:
        bound = min(configs.cdiv(self.rows, rows) + self.experts + 1, self.rows)
        tiles = self.offsets.new_empty(3 * bound)
        starts = self.offsets.new_empty(self.experts + 2)
        sizes = (self.rows, self.experts, bound, rows)
        list_tiles[(self.experts + 1,)](self.offsets, tiles, starts, *sizes, BLOCK=256)
        return Tiles(tiles, starts, bound, rows)


def routing(call: NamedTuple) -> Routing:
    """The index tensors of a call, made contiguous if they are not, and what is set now."""
    slots, offsets = call.sorted_scattered_idxs.contiguous(), call.expert_offsets.contiguous()
    return Routing(slots, offsets, call.top_k, is_batch_invariant())
