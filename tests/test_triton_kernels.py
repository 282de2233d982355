"""What the operators' own tests do not reach in the Triton kernels; runs in Triton's interpreter
(TRITON_INTERPRET=1 MOELORA_BACKEND=triton).
"""

import numpy as np
import problems
import pytest
import torch
from cases import FP16, FP32, Case
from packings import Packing

from torch_moelora import reference
from torch_moelora.switches import SWITCHES

if SWITCHES.backend != "triton":
    pytest.skip("needs MOELORA_BACKEND=triton TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl
import triton_interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from torch_moelora.triton import configs, route, tiles, unpack, weights

pytestmark = pytest.mark.operators

EVERYTHING = Case(
    tokens=24, top_k=2, experts=4, k=40, n=48, rank=8, dtype=FP16, bias="same", gates="same", lora="fp32"
)


def tile_list(offsets: list[int], rows: int, block: int) -> list[tuple[int, int, int]]:
    """(expert, first row, one past the last row) of each tile, as they should be."""
    edges = [0, *offsets, rows]
    experts = [*range(len(offsets)), -1]
    return [
        (expert, row, min(row + block, high))
        for expert, low, high in zip(experts, edges, edges[1:], strict=False)
        for row in range(low, high, block)
    ]


@pytest.mark.parametrize(
    ("offsets", "block"),
    [
        ([0], 16),
        ([100], 1),
        ([100], 16),
        ([0, 0, 100], 64),
        ([1, 17, 18, 99], 16),
        ([1, 17, 18, 99], 1000),
        (list(range(0, 96, 16)), 16),
        (list(range(1, 301)), 16),  # more experts than the kernel takes at a time
        ([40] * 300, 16),
    ],
    ids=lambda value: f"{len(value)} experts" if isinstance(value, list) else str(value),
)
def test_tiles(offsets, block):
    """No tile straddles experts, every row is in one, and the list fits its bound."""
    rows = max(100, offsets[-1])
    routing = route.Routing(torch.arange(rows), torch.tensor(offsets, dtype=torch.int32), 1)
    made = routing.tiles(block)
    expected = tile_list(offsets, rows, block)
    assert len(expected) <= made.bound
    assert made.starts[-1] == len(expected)
    assert made.map.view(3, -1)[:, : len(expected)].T.tolist() == [list(tile) for tile in expected]
    before = [sum(expert < e for expert, _, _ in expected if expert >= 0) for e in range(len(offsets) + 1)]
    assert made.starts[:-1].tolist() == before


def calls(p: problems.Problem) -> dict[str, tuple]:
    return {
        "scatter_lora": p.forward_args(),
        "scatter_lora_dx": p.dx_args(),
        "scatter_lora_dab": p.dab_args(),
        "scatter_lora_backward": p.backward_args(),
        "scatter_lora_dw": p.dw_args(),
        "scatter_lora_dbias": p.dbias_args(),
    }


MALFORMED = {
    "offsets beyond S": lambda slots, offsets: (slots, offsets + 10_000),
    "negative offsets": lambda slots, offsets: (slots, offsets - 1000),
    "offsets that fall": lambda slots, offsets: (slots, offsets.flip(0)),
    "offsets up and down, more tiles than the bound": lambda slots, offsets: (
        slots,
        torch.tensor([0, slots.numel()] * (offsets.numel() // 2), dtype=torch.int32),
    ),
    "slots beyond S": lambda slots, offsets: (slots + 7, offsets),
    "negative slots": lambda slots, offsets: (-slots, offsets),
    "slots beyond 32 bits": lambda slots, offsets: (slots + (1 << 32) + 1, offsets),
    "every slot the same": lambda slots, offsets: (slots * 0, offsets),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_malformed_indices_stay_inside_the_workspace(change, monkeypatch):
    """Of packed experts that are made dense one at a time; its rows are read through pointers, which are
    checked.
    """
    monkeypatch.setattr(unpack, "WORKSPACE", 1)
    p = problems.build(EVERYTHING.with_(k=66, n=48, packing=Packing("int4")))
    p.slots, p.offsets = change(p.slots, p.offsets)
    problems.call("scatter_lora", *p.forward_args())
    problems.call("scatter_lora_backward", *p.backward_args(), True, *p.packed_args)


@pytest.mark.parametrize("grouped", [False, True], ids=["by token", "grouped"])
@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_malformed_indices_stay_inside(change, grouped):
    """Their results mean nothing, but every access is checked against the tensors' storages."""
    p = problems.build(EVERYTHING.with_(x_grouped=grouped, gates="none" if grouped else "same"))
    p.slots, p.offsets = change(p.slots, p.offsets)
    for name, args in calls(p).items():
        problems.call(name, *args)


def test_the_check_of_accesses_sees_one():
    """An assertion that has never failed proves little."""
    bounds = triton_interpreter.Bounds()
    t = torch.zeros(4)
    bounds.enter([t, 3])
    inside = np.array([t.data_ptr(), t.data_ptr() + 12], np.uint64)
    bounds.check("load", inside, np.array([True, True]), 4)
    for outside in (inside - np.uint64(4), inside + np.uint64(4)):
        with pytest.raises(AssertionError, match="outside of the kernel's tensors"):
            bounds.check("load", outside, np.array([True, True]), 4)
    bounds.check("load", inside + np.uint64(4), np.array([True, False]), 4)


def described(weight: torch.Tensor) -> str:
    config = configs.Gemm(16, 64, 64, warps=1, stages=1, descriptor=True)
    described = weights.describe(weight, config)
    assert isinstance(described.data, TensorDescriptor) == (described.kind != "")
    return described.kind


def test_descriptors_where_legal():
    """16-byte strides and base, one contiguous dimension; everything else goes by pointers."""
    w = torch.zeros(4, 64, 96, dtype=FP16)
    assert described(w) == "NK"
    assert described(w.transpose(1, 2)) == "KN"
    assert described(w[:, ::2]) == "NK"
    assert described(w[:, :, 8:40]) == "NK"
    assert described(w[:, :, 4:40]) == "", "base"
    assert described(torch.zeros(4, 64, 33, dtype=FP16)) == "", "row stride"
    assert described(w[:1].expand(4, 64, 96)) == "", "stride of 0"
    assert described(w[:, :, ::2]) == "", "no contiguous dimension"
    assert weights.describe(w, configs.Gemm(16, 64, 64, warps=1, stages=1)).kind == "", "not asked for"


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_descriptors_and_pointers_agree(layout, monkeypatch):
    """To the bit, with column and K tails on both."""
    case = EVERYTHING.with_(k=72, n=88, weight_layout=layout)
    results = {}
    for descriptor in (False, True):
        config = configs.Gemm(16, 64, 64, warps=1, stages=1, descriptor=descriptor)
        monkeypatch.setattr(configs, "choose", lambda *args, config=config, **_: config)
        p = problems.build(case)
        p.lora_a, p.lora_b = p.lora_a.to(FP16), p.lora_b.to(FP16)
        results[descriptor] = [problems.call("scatter_lora", *p.forward_args())]
        results[descriptor] += problems.call("scatter_lora_dx", *p.dx_args())
    for a, b in zip(results[False], results[True], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rank", [1, 16, 20, 32, 100])
def test_padded_ranks(rank):
    """Ranks that are no multiple of a matrix instruction's step, with an Inf that meets the padding."""
    p = problems.build(EVERYTHING.with_(rank=rank, gates="none", bias="none"))
    clean = problems.call("scatter_lora", *p.forward_args())
    p.x[3, 5] = float("inf")
    out = problems.call("scatter_lora", *p.forward_args())
    ref = reference.scatter_lora(*p.forward_args())
    others = torch.arange(p.case.rows) // p.case.top_k != 3
    assert torch.equal(out[others], clean[others])
    assert torch.equal(out[~others].isnan(), ref[~others].isnan())


def far_apart(t: torch.Tensor, dim: int) -> torch.Tensor:
    """The same values with 2³⁰ elements from one index of `dim` to the next, in memory hardly touched."""
    strides = list(t.stride())
    strides[dim] = 2**30
    return torch.empty_strided(t.shape, strides, dtype=t.dtype).copy_(t)


@pytest.fixture
def checked_sums():
    """Integer sums that overflow raise."""
    triton_interpreter.check_sums(True)
    yield
    triton_interpreter.check_sums(False)


@pytest.mark.parametrize(("layout", "k"), [("contiguous", 25), ("transposed", 24)], ids=["pointer", "copied"])
def test_offsets_beyond_32_bits(layout, k, checked_sums):
    """Experts and rows whose offsets pass 2³¹ elements."""
    case = Case(tokens=3, top_k=2, experts=3, k=k, n=32, rank=4, dtype=FP16, gates="same")
    case = case.with_(weight_layout=layout)
    p = problems.build(case)
    near = {name: problems.call(name, *args) for name, args in calls(p).items()}
    p.x, p.weight, p.dy = far_apart(p.x, 0), far_apart(p.weight, 0), far_apart(p.dy, 0)
    for name, args in calls(p).items():
        far = problems.call(name, *args)
        pairs = zip(near[name], far, strict=True) if isinstance(far, tuple) else [(near[name], far)]
        assert all(torch.equal(a, b) for a, b in pairs), name


def test_packed_lora_is_in_place_where_it_can_be():
    a = torch.zeros(3, 16, 40, dtype=FP16)
    assert tiles.packed(a, FP16, 1) is a
    for other, dtype in ((a[:, :12], FP16), (a.float(), FP16), (a[:, :, ::2], FP16)):
        out = tiles.packed(other, dtype, 1)
        assert out.is_contiguous() and out.shape == (3, 16, other.shape[2])
    assert torch.count_nonzero(tiles.packed(torch.ones(3, 12, 40), FP32, 1)[:, 12:]) == 0


@pytest.mark.parametrize("tokens", [1, 100, 700])
def test_chunks_cover_an_expert_in_order(tokens):
    """More rows than a chunk: the second pass adds up several."""
    case = Case(tokens=tokens, top_k=1, experts=1, k=24, n=40, rank=4, dtype=FP32, bias="same", gates="same")
    p = problems.build(case)
    for name in ("scatter_lora_dab", "scatter_lora_dbias"):
        dtypes = (FP32, FP32) if name == "scatter_lora_dab" else (FP32,)
        problems.check(name, calls(p)[name], case.with_(rank=0 if "bias" in name else 4), dtypes)


def test_interpreted_bf16():
    """The helper of these tests against torch."""
    values = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, float("inf"), 3.4e38, 1.00390625])])
    bits = triton_interpreter.narrow(values.numpy())
    assert torch.equal(torch.from_numpy(bits.view("int16")), values.bfloat16().view(torch.int16))
    assert torch.equal(torch.from_numpy(triton_interpreter.widen(bits)), values.bfloat16().float())
    assert tl.bfloat16.primitive_bitwidth == 16


@pytest.mark.parametrize("transposed", [False, True], ids=["as_it_is", "turned"])
@pytest.mark.parametrize("routing", ["random", "one_expert", "sentinels"])
def test_unpacked_a_few_experts_at_a_time(routing, transposed, monkeypatch):
    """The workspace's size changes no bit."""
    packing = Packing("nf4", 64, transposed=transposed)
    p = problems.build(EVERYTHING.with_(experts=5, k=128, n=64, packing=packing, routing=routing))

    def results() -> list[torch.Tensor]:
        found = problems.call("scatter_lora_backward", *p.backward_args(), True, *p.packed_args)
        return [problems.call("scatter_lora", *p.forward_args()), *found]

    whole = results()
    for experts in (1, 2, 3):
        monkeypatch.setattr(unpack, "WORKSPACE", experts * 128 * 64 * 2)
        assert all(torch.equal(a, b) for a, b in zip(whole, results(), strict=True)), experts
