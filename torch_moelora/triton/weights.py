"""Dense weights [E, N, K] as `tiles.grouped_gemm` contracts with them: the host describes one, the kernel
asks for tiles of it.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import configs


class Weight(NamedTuple):
    """data: a tensor, or a descriptor of it. strides: the tensor's three. kind: "" for a tensor, read by its
    strides; for a descriptor the order of its last two dimensions, "NK", or "KN" for the transpose.
    """

    data: Tensor | TensorDescriptor
    strides: tuple[int, ...]
    kind: str


def describe(w: Tensor, config: configs.Gemm) -> Weight:
    """w [E, N, K]: a descriptor where the configuration asks for one and the copy engine can follow the
    strides.
    """
    for kind, t in (("NK", w), ("KN", w.transpose(1, 2))):
        aligned = t.data_ptr() % 16 == 0 and all(s > 0 and s * t.itemsize % 16 == 0 for s in t.stride()[:2])
        if config.descriptor and aligned and t.stride(2) == 1:
            block = (config.block_n, config.block_k) if kind == "NK" else (config.block_k, config.block_n)
            return Weight(TensorDescriptor.from_tensor(t, [1, *block]), w.stride(), kind)
    return Weight(w, w.stride(), "")


@triton.jit
def first_tile(
    w, strides, expert, start, N, KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """What `tile` adds steps to: pointers [BLOCK_K, BLOCK_N] to the columns from `start` on, first BLOCK_K
    steps. 0 for a descriptor, which it reads by indices.
    """
    if KIND == "":
        # Columns past the end wrap around: read without a mask, never stored. A minimum would hide from the
        # compiler that they are contiguous. int64: E·N·K, N·stride and K·stride.
        n = ((start + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
        k = tl.arange(0, BLOCK_K).to(tl.int64)
        e = tl.maximum(expert, 0).to(tl.int64)
        at = w + e * strides[0] + n[None, :] * strides[1] + k[:, None] * strides[2]
    else:
        at = 0
    return at


@triton.jit
def tile(
    w, at, strides, expert, start, done, K, KIND: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Wᵀ [BLOCK_K, BLOCK_N] of the columns from `start` on, from step `done` on; zeros for the steps from K
    on, of which there are none where WHOLE_K. at: what `first_tile` gives.
    """
    if KIND == "NK":
        values = w.load([expert, start, done]).reshape(BLOCK_N, BLOCK_K).T
    elif KIND == "KN":
        values = w.load([expert, done, start]).reshape(BLOCK_K, BLOCK_N)
    elif WHOLE_K:
        values = tl.load(at + tl.cast(done, tl.int64) * strides[2])
    else:
        kept = tl.arange(0, BLOCK_K)[:, None] < K - done
        values = tl.load(at + tl.cast(done, tl.int64) * strides[2], mask=kept, other=0.0)
    return values
