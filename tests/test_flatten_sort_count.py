"""flatten_sort_count against the reference: exact, stable, sentinels last."""

import problems
import pytest
import torch
from cases import ROUTINGS, Case
from hypothesis import given
from hypothesis import strategies as st

from torch_moelora import reference

pytestmark = pytest.mark.operators


def check(expert_idxs: torch.Tensor, num_experts: int) -> None:
    slots, offsets = problems.call("flatten_sort_count", expert_idxs, num_experts)
    ref_slots, ref_offsets = reference.flatten_sort_count(expert_idxs, num_experts)
    assert slots.dtype == torch.int64 and offsets.dtype == torch.int32
    assert torch.equal(offsets, ref_offsets)
    assert torch.equal(slots, ref_slots)


@pytest.mark.parametrize(
    ("ids", "num_experts", "slots", "offsets"),
    [
        ([[1, 0], [0, 1]], 2, [1, 2, 0, 3], [2, 4]),
        ([[2, -1], [0, 3]], 3, [2, 0, 1, 3], [1, 1, 2]),
        ([[9], [9]], 2, [0, 1], [0, 0]),
        ([[1, 1, 1]], 2, [0, 1, 2], [0, 3]),
    ],
    ids=["two experts", "sentinels below and above", "only sentinels", "the same expert three times"],
)
def test_by_hand(ids, num_experts, slots, offsets):
    got = problems.call("flatten_sort_count", torch.tensor(ids), num_experts)
    assert [t.tolist() for t in got] == [slots, offsets]


@given(
    st.sampled_from((0, 1, 2, 7, 64, 1000)),
    st.integers(1, 9),
    st.sampled_from((1, 2, 3, 8, 128, 300)),
    st.sampled_from(ROUTINGS),
    st.sampled_from((torch.int32, torch.int64)),
    st.integers(0, 2**20),
)
def test_matches_reference(tokens, top_k, experts, routing, dtype, seed):
    case = Case(tokens=tokens, top_k=top_k, experts=experts, routing=routing, index_dtype=dtype)
    check(problems.expert_ids(case, torch.Generator().manual_seed(seed)), experts)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_any_strides(dtype):
    ids = torch.arange(60, dtype=dtype).view(6, 10) % 7
    check(ids.T, 5)
    check(ids[::2, 1::3], 7)
    check(ids[:, :1].expand(6, 4), 7)


def test_extreme_ids_are_sentinels():
    """An id that does not survive a narrowing to 32 bits must not come back as a valid one."""
    ids = torch.tensor([[2**32, 1], [-(2**63), 2**63 - 1], [0, 2**32 + 1]])
    check(ids, 3)


def test_more_rows_than_one_thread_takes():
    ids = torch.randint(-1, 129, (20_000, 8), generator=torch.Generator().manual_seed(0))
    check(ids, 128)


@pytest.mark.long_interpreted
def test_a_million_experts():
    ids = torch.randint(0, 2**20, (50, 2), generator=torch.Generator().manual_seed(0))
    check(ids, 2**20)
