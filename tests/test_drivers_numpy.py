"""Every driver with every kernel set, straight on memory: small blocks, several threads, guarded outputs.

The operator tests cover the drivers as the package uses them; these reach every loop with few rows, and are
what runs under the sanitizers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import glu_range
import numpy as np
import pytest
import torch
from cases import BF16, DTYPES, FP16, FP32, FP64, ROWS, Case, cases
from core import KERNEL_SETS, Output, core, same_bits, to_float
from hypothesis import given
from hypothesis import strategies as st
from packings import BLOCK, U8, Packing, packings
from problems import Problem, assert_close, build, expert_ids, magnitudes, tolerance

from torch_moelora import reference
from torch_moelora.formats import PackedWeight

NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", FP64: "fp64"}


def takes(k, dtype: torch.dtype) -> bool:
    """Whether the set serves tensors of this type without losing precision."""
    return NAMES[dtype] in k.storage and (k.compute != "bf16" or dtype == BF16)


def array(tensor: torch.Tensor | None) -> np.ndarray | None:
    """The same memory, bf16 as uint16."""
    if tensor is None:
        return None
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == BF16 else tensor.numpy()


def tensor(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(values.view(np.int16)).view(BF16) if dtype == BF16 else torch.from_numpy(values)


def arrays(args: tuple) -> tuple:
    return tuple(array(a) if isinstance(a, torch.Tensor) else a for a in args)


@dataclass
class Call:
    """A driver with its arguments, the operator that specifies it, and its outputs' shapes and dtypes."""

    driver: str
    operator: str
    args: tuple
    outputs: list[tuple[tuple, torch.dtype]]

    def run(self, k, threads: int) -> list[np.ndarray]:
        outs = [Output(shape, NAMES[dtype]) for shape, dtype in self.outputs]
        given = [out.array for out in outs]
        if self.driver in ("input_gradient", "input_and_lora_gradient") and len(given) % 2:
            given.insert(1, None)
        getattr(core, self.driver)(k, *given, *arrays(self.args), threads=threads)
        return [out.check() for out in outs]


def calls(p: Problem) -> list[Call]:
    case, e = p.case, p.case.experts
    accumulator = FP64 if case.dtype == FP64 else FP32
    y_rows = case.rows if p.gates is None else case.tokens
    x_rows = case.rows if case.x_grouped else case.tokens
    dx = [((x_rows, case.k), case.dtype)]
    if p.gates is not None:
        dx.append(((case.tokens, case.top_k), accumulator))
    found = [
        Call("forward", "scatter_lora", p.forward_args(), [((y_rows, case.n), case.dtype)]),
        Call("input_gradient", "scatter_lora_dx", p.dx_args(), dx),
        Call("weight_gradient", "scatter_lora_dw", p.dw_args(), [((e, case.n, case.k), case.dtype)]),
        Call("bias_gradient", "scatter_lora_dbias", p.dbias_args(), [((e, case.n), case.dtype)]),
    ]
    if case.rank:
        dtype = p.lora_a.dtype
        outputs = [((e, case.rank, case.k), dtype), ((e, case.n, case.rank), dtype)]
        found.append(Call("lora_gradient", "scatter_lora_dab", p.dab_args(), outputs))
        found.append(
            Call("input_and_lora_gradient", "scatter_lora_backward", p.backward_args(), dx + outputs)
        )
    return found


def check(k, case: Case, threads: int = 1) -> None:
    p = build(case)
    for call in calls(p):
        outs = call.run(k, threads)
        refs = reference.REFERENCE[call.operator](*call.args)
        refs = refs if isinstance(refs, tuple) else (refs,)
        sizes = magnitudes(call.operator, call.args)
        if p.gates is None and call.driver == "input_and_lora_gradient":
            refs, sizes = (t[:1] + t[2:] for t in (refs, sizes))  # no dgates
        for out, (_, dtype), ref, size in zip(outs, call.outputs, refs, sizes, strict=False):
            assert_close(
                tensor(out, dtype), ref, size, tolerance(case, out.size), f"{call.driver} of {k.name}"
            )


every_set = pytest.mark.parametrize("k", KERNEL_SETS, ids=lambda k: k.name)
blockings = st.fixed_dictionaries(
    {
        "row_chunk": st.sampled_from((1, 3, 16, 40)),
        "dot_rows": st.sampled_from((0, 3, 8, 20)),
        "odd_rows": st.sampled_from((0, 1, 7)),
        "dot_depth": st.sampled_from((2, 32, 4096)),
        "few_rows": st.sampled_from((0, 8)),
        "flat_rows": st.sampled_from((0, 2, 30)),
        "flat_bytes": st.sampled_from((1, 1 << 12, 1 << 17)),
        "thin_rows": st.sampled_from((0, 2, 32)),
        "thin_depth": st.sampled_from((2, 32, 64)),
        "thin_strip": st.sampled_from((1, 3)),  # of strip
        "strip": st.sampled_from((1, 2)),  # of the widest tile
        "chain": st.sampled_from(("a pass", 1 << 40)),
        "segment": st.sampled_from((1, 7, 16, 48)),
        "depth": st.sampled_from((2, 16, 32, 128)),
        "outputs": st.sampled_from((2, 24, 64)),
        "combine_bytes": st.sampled_from((0, 1 << 24)),
        "token_chunk": st.sampled_from((1, 5, 64)),
        "outer_rows": st.sampled_from((1, 16, 19)),
        "outer_cols": st.sampled_from((1, 32, 80)),
        "outer_depth": st.sampled_from((1, 2, 9, 64)),
    }
)


def with_blocking(k, blocking: dict):
    """The set with other blocking; strip and thin_strip in units of what they are multiples of."""
    blocking = dict(blocking)
    if "strip" in blocking:
        blocking["strip"] *= k.lanes * k.vecs
        blocking["thin_strip"] *= blocking["strip"]
    if k.compute == "bf16":
        blocking.pop("chain", None)  # the sums of bf16 products are one chain
    elif blocking.get("chain") == "a pass":
        depth = blocking["chain"] = blocking["depth"]
        blocking["thin_depth"] = min(blocking.get("thin_depth", depth), depth)
    return k.with_blocking(**blocking)


@every_set
@pytest.mark.parametrize("case", [row for row in ROWS if row.k * row.n < 1e5], ids=lambda c: c.reason)
def test_named_cases(k, case):
    dtype = case.dtype if takes(k, case.dtype) else next(t for t in DTYPES if takes(k, t))
    lora = "fp32" if case.lora == "fp32" and dtype in (BF16, FP16) else "same"
    same = {name: "same" for name in ("bias", "gates") if getattr(case, name) != "none"}
    check(k, case.with_(dtype=dtype, lora=lora, **same))


@every_set
@given(case=cases(), blocking=blockings, threads=st.sampled_from((1, 2, 5)))
def test_small_blocks(k, case, blocking, threads):
    """Blocks end inside experts, tokens, features and vectors."""
    if not takes(k, case.dtype):
        case = case.with_(dtype={"bf16": BF16, "fp64": FP64}.get(k.compute, FP32), lora="same")
        case = case.with_(**{f: "same" for f in ("bias", "gates") if getattr(case, f) != "none"})
    if k.compute == "bf16":
        # Equal rows round alike: their errors add up instead of averaging out, beyond any tolerance of norms.
        layouts = {f: "contiguous" for f in ("x_layout", "dy_layout") if getattr(case, f) == "expanded"}
        case = case.with_(**layouts)
    check(with_blocking(k, blocking), case, threads)


@every_set
@pytest.mark.parametrize("tokens", [5, 40])
def test_strips_of_several_panels(k, tokens):
    """The gates' gradient is a sum of parts, of which no orientation may write another's."""
    dtype = {"bf16": BF16, "fp64": FP64}.get(k.compute, FP32)
    case = Case(tokens=tokens, top_k=1, experts=1, k=330, n=6, dtype=dtype, gates="same")
    for rows in (0, 64):
        blocking = {"strip": 2, "thin_strip": 1, "thin_rows": rows, "flat_rows": 0, "dot_rows": 0}
        check(with_blocking(k, blocking), case)


@every_set
@given(case=cases().filter(lambda case: case.rank), blocking=blockings, threads=st.sampled_from((1, 3)))
def test_both_gradients_at_once_are_those_of_the_drivers_for_one(k, case, blocking, threads):
    """In every bit: dy · B is computed once, as each of them computes it."""
    dtype = case.dtype if takes(k, case.dtype) else {"bf16": BF16, "fp64": FP64}.get(k.compute, FP32)
    same = {f: "same" for f in ("lora", "bias", "gates") if getattr(case, f) != "none"}
    both = calls(build(case.with_(dtype=dtype, **same)))
    found = {call.driver: call.run(with_blocking(k, blocking), threads) for call in both}
    alone = found["input_gradient"] + found["lora_gradient"]
    for one, other in zip(found["input_and_lora_gradient"], alone, strict=True):
        assert same_bits(one, other)


@every_set
@given(
    tokens=st.integers(33, 200),
    experts=st.sampled_from((2, 8)),
    width=st.sampled_from((127, 128, 200, 256, 330, 512)),
    depth=st.sampled_from((2, 63, 64, 70, 98)),
    blocks=st.fixed_dictionaries(
        {
            "row_chunk": st.sampled_from((5, 40, 192)),
            "thin_rows": st.sampled_from((0, 32)),
            "depth": st.sampled_from((2, 32, 256)),
            "outputs": st.sampled_from((64, 512)),
            "combine_bytes": st.sampled_from((0, 1 << 24)),
        }
    ),
    threads=st.sampled_from((1, 3)),
    seed=st.integers(0, 99),
)
def test_panels_one_after_the_other(k, tokens, experts, width, depth, blocks, threads, seed):
    """Rows enough for several tiles, wide results: weights are packed while others are multiplied."""
    dtype = {"bf16": BF16, "fp64": FP64}.get(k.compute, FP32)
    case = Case(tokens, 1, experts, k=width, n=depth, rank=3, dtype=dtype, seed=seed)
    check(with_blocking(k, blocks | {"chain": "a pass"}), case, threads)


every_unpacking_set = pytest.mark.parametrize(
    "k", [k for k in KERNEL_SETS if k.compute != "fp64"], ids=lambda k: k.name
)
PACKINGS = (
    Packing("nf4", 64),
    Packing("fp4", 32, U8),  # nested: runs of 256 scales cross experts
    Packing("int4", 96, BF16, layout="strided"),
    Packing("int4", 32, FP16, zero=True),
    Packing("mxfp4", 32),
    Packing("nvfp4", 16, parts=2),
    Packing("int8"),
    Packing("int8", 32, FP16, scales="special"),
    Packing("fp8", BLOCK, BF16, rows="block"),
    Packing("fp8", layout="strided"),
)


def packed_arrays(w: PackedWeight) -> object:
    """The same memory for the drivers."""
    codes, *others = (t if t is None or t.itemsize > 1 else t.view(U8) for t in w[:4])
    return core.Packed(array(codes), w.format, *map(array, others), w.transposed)


def assert_packed_is_dense(k, p: Problem, threads: int = 1) -> None:
    """Every driver that reads a weight gives what it gives on the numbers of this one; their zeros may have
    lost their sign.
    """
    dense, packed = p.packed.dequantize(p.case.dtype), packed_arrays(p.packed)
    what = f"{p.case.packing} on {k.name}"
    for call in calls(replace(p, weight=dense, packed=None)):
        args = tuple(packed if a is dense else a for a in call.args)
        if not any(a is packed for a in args):
            continue
        outs = replace(call, args=args).run(k, threads), call.run(k, threads)
        for one, other in zip(*outs, strict=True):
            assert one.dtype == other.dtype
            assert np.array_equal(to_float(one), to_float(other), equal_nan=True), f"{call.driver}: {what}"


def problem_of(rows: list[int], packing: Packing, size: tuple[int, int], dtype: torch.dtype) -> Problem:
    """A problem with so many rows for each expert and a weight of `size` as stored."""
    n, k = packing.sizes(*size)
    case = Case(sum(rows), 1, len(rows), k, n, rank=3, dtype=dtype, gates="same", packing=packing)
    ids = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    slots, offsets = reference.flatten_sort_count(shuffled.unsqueeze(1), case.experts)
    return replace(build(case), slots=slots, offsets=offsets)


@every_unpacking_set
@pytest.mark.parametrize("transposed", [False, True], ids=["as_it_is", "transposed"])
@pytest.mark.parametrize("packing", PACKINGS, ids=lambda p: f"{p.format}-{p.group}-{p.scale_dtype}")
def test_packed_weights_are_dense_ones(k, packing, transposed):
    """One row, few, some, one beyond a vector, and many; sizes that no vector divides, and several blocks."""
    size = 130 if packing.rows == "block" else 38, 201 if packing.group in (0, BLOCK) else 192
    dtype = FP16 if transposed and takes(k, FP16) else BF16
    rows = [1, 5, 0, 10, 17, 37]
    assert_packed_is_dense(k, problem_of(rows, replace(packing, transposed=transposed), size, dtype))


@every_unpacking_set
@pytest.mark.parametrize("transposed", [False, True], ids=["as_it_is", "transposed"])
def test_packed_weights_of_one_row_or_column(k, transposed):
    """The numbers of one output or one step lie in either order: they may be read across the codes."""
    for packing, size in (
        (Packing("nf4", 64), (1, 192)),
        (Packing("int8"), (1, 70)),
        (Packing("int8", layout="strided"), (70, 1)),
        (Packing("fp8", BLOCK, rows="block"), (130, 1)),
    ):
        p = problem_of([2, 11, 20], replace(packing, transposed=transposed), size, BF16)
        assert_packed_is_dense(k, p)


# Passes of packed weights divide chains.
packed_blockings = st.fixed_dictionaries(
    {
        "packed_strips": st.sampled_from((1, 3)),
        "byte_strips": st.sampled_from((1, 2)),
        "packed_depth": st.sampled_from((2, 16, 128)),
        "packed_flat_rows": st.sampled_from((0, 2, 30)),
    }
)


@every_unpacking_set
@given(
    case=cases(),
    packed=packings(("usual", "usual", "subnormal", "extreme", "special")),
    blocking=st.tuples(blockings, packed_blockings).map(lambda parts: parts[0] | parts[1]),
    threads=st.sampled_from((1, 1, 3)),
)
def test_packed_weights_in_small_blocks(k, case, packed, blocking, threads):
    """Blocks end inside groups, parts and runs of scales."""
    packing, n, depth = packed
    dtype = case.dtype if takes(k, case.dtype) else {"bf16": BF16}.get(k.compute, FP32)
    same = {f: "same" for f in ("lora", "bias", "gates") if getattr(case, f) != "none"}
    case = case.with_(dtype=dtype, packing=packing, n=n, k=depth, **same)
    assert_packed_is_dense(with_blocking(k, blocking), build(case), threads)


def test_packed_weights_are_checked():
    k = next(k for k in KERNEL_SETS if k.compute == "fp32")
    codes, scale = np.zeros((2, 5, 32), np.uint8), np.ones((2, 5, 1), np.float32)
    x, y = np.zeros((3, 64), np.float32), np.zeros((3, 5), np.float32)
    good = np.arange(3), np.array([1, 3], np.int32), 1
    core.forward(k, y, x, core.Packed(codes, "nf4", scale), *good)
    for args in (
        (codes, "dense", scale),
        (codes[0], "nf4", scale),
        (codes[:, :, ::2], "nf4", scale),
        (codes.astype(np.int16), "nf4", scale),
        (codes, "nf4", scale[:1]),
        (codes, "nf4", scale[:, :1]),
        (codes, "nf4", scale.astype(np.float64)),
        (codes, "nf4", scale.astype(np.uint8)),
        (codes, "nf4", scale, np.ones((1, 2), np.float32)),
        (codes, "nf4", scale, None, scale.astype(np.uint8)),
        (codes, "mxfp4", scale.astype(np.uint8)),
        (codes, "nvfp4", np.ones((2, 5, 4), np.uint8), np.ones((2, 3), np.float32)),
        (codes, "int4", scale, None, scale),
        (codes, "fp8", np.ones((2, 2, 1), np.float32)),
    ):
        with pytest.raises(ValueError):
            core.Packed(*args)
    for changed in (
        {"weight": core.Packed(codes[:1], "nf4", scale[:1])},
        {"x": x[:, :63]},
        {"k": next(k for k in core.kernel_sets() if k.compute == "fp64")},
    ):
        call = {"k": k, "x": x, "weight": core.Packed(codes, "nf4", scale)} | changed
        with pytest.raises(ValueError):
            core.forward(call["k"], y, call["x"], call["weight"], *good)


@every_set
def test_threads_change_no_bit(k):
    case = Case(
        tokens=61, top_k=3, experts=7, k=70, n=90, rank=5, gates="same", bias="same", routing="sentinels"
    )
    p = build(case.with_(dtype={"bf16": BF16, "fp64": FP64}.get(k.compute, FP32)))
    blocking = {"row_chunk": 8, "segment": 16, "outputs": 24, "token_chunk": 16}
    for combine_bytes in (0, 1 << 24):
        small = k.with_blocking(outer_rows=16, outer_cols=32, combine_bytes=combine_bytes, **blocking)
        for call in calls(p):
            alone = call.run(small, 1)
            for threads in (2, 3, 8):
                for one, many in zip(alone, call.run(small, threads), strict=True):
                    assert same_bits(many, one), call.driver


@given(case=cases())
def test_flatten_sort_count(case):
    ids = expert_ids(case, torch.Generator().manual_seed(case.seed))
    slots, offsets = np.full(case.rows, -1, np.int64), np.full(case.experts, -1, np.int32)
    core.flatten_sort_count(slots, offsets, ids.T.contiguous().T.numpy())
    expected = reference.flatten_sort_count(ids, case.experts)
    assert (slots == expected[0].numpy()).all() and (offsets == expected[1].numpy()).all()


@every_set
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_glu(k, rows):
    dtype = {"bf16": BF16, "fp64": FP64}.get(k.compute, FP32)
    h, dy = torch.randn(rows, 70).to(dtype), torch.randn(rows, 35).to(dtype)
    options = ("gelu", 1.0, 2.0, 0.5, True)
    for driver, args, columns in (("glu", (h,), 35), ("glu_backward", (dy, h), 70)):
        out = Output((rows, columns), NAMES[dtype])
        getattr(core, driver)(k, out.array, *arrays(args), *options, threads=3)
        ref = reference.REFERENCE[driver](*args, *options)
        tol = {BF16: 4e-3, FP32: 1e-6, FP64: 1e-13}[dtype]
        assert_close(tensor(out.check(), dtype), ref, ref.abs() + 1, tol, driver)


@pytest.mark.parametrize("options", glu_range.OPTIONS.values(), ids=glu_range.OPTIONS)
@pytest.mark.parametrize(
    ("k", "dtype"),
    [(k, dtype) for k in KERNEL_SETS for dtype in DTYPES if NAMES[dtype] in k.storage],
    ids=lambda v: NAMES[v] if isinstance(v, torch.dtype) else v.name,
)
def test_glu_over_the_whole_range(k, dtype, options):
    """Subnormal f and f' count, with what makes them normal numbers again."""
    h, dy = glu_range.inputs(dtype, options[4])
    y, dh = Output(dy.shape, NAMES[dtype]), Output(h.shape, NAMES[dtype])
    core.glu(k, y.array, array(h), *options, threads=2)
    core.glu_backward(k, dh.array, array(dy), array(h), *options, threads=2)
    computed = glu_range.COMPUTED[dtype]
    losses = 2.0**-1070 if computed == FP64 else 2.0**-148, glu_range.LAST[computed]
    glu_range.compare(tensor(y.check(), dtype), tensor(dh.check(), dtype), h, dy, options, *losses)


def test_indices_are_checked():
    k = next(k for k in KERNEL_SETS if k.compute == "fp32")
    x, w, y = np.zeros((3, 4), np.float32), np.zeros((2, 5, 4), np.float32), np.zeros((3, 5), np.float32)
    good = np.arange(3), np.array([1, 3], np.int32)
    core.forward(k, y, x, w, *good, 1)
    for slots, offsets, message in (
        ([0, 1, 3], [1, 3], "slots out of range"),
        ([0, 1, 1], [1, 3], "slots hold a value twice"),
        ([0, 1, 2], [2, 1], "offsets decrease"),
        ([0, 1, 2], [1, 4], "offsets out of range"),
        ([0, 1, 2], [1, 2, 3], "weight must have shape"),
        ([0, 1], [1, 2], "x must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            core.forward(k, y, x, w, np.array(slots, np.int64), np.array(offsets, np.int32), 1)
    for bad in (
        {"slots": good[0].astype(np.int32)},
        {"top_k": 2},
        {"out": y[:, ::2]},
        {"x": x.astype(np.float64)},
    ):
        args = {"out": y, "x": x, "weight": w, "slots": good[0], "offsets": good[1], "top_k": 1}
        with pytest.raises(ValueError):
            core.forward(k, **(args | bad))
