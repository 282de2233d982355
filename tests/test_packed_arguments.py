"""Packed weights gone wrong: no crash, no accepted nonsense. And what is not needed is not read."""

import subprocess
import sys
import textwrap
from functools import partial

import packings
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from packings import BF16, E4M3, FP32, U8, Packing
from problems import call, on_meta

from torch_moelora import reference
from torch_moelora.formats import FORMATS, PackedWeight
from torch_moelora.switches import SWITCHES

pytestmark = pytest.mark.operators

DTYPES = (U8, torch.int8, E4M3, torch.float8_e8m0fnu, BF16, torch.float16, FP32, torch.float64, torch.int64)
TENSORS = ("weight", "weight_scale", "weight_scale2", "weight_zero")


@st.composite
def changed(draw, t: torch.Tensor | None) -> torch.Tensor | None:
    """Another shape, dtype or stride, or nothing at all."""
    if t is None or t.dim() == 0 or t.numel() == 0:
        shape = draw(st.lists(st.integers(0, 4), min_size=0, max_size=4))
        return torch.zeros(shape, dtype=draw(st.sampled_from(DTYPES)))
    kind = draw(st.sampled_from(("none", "dtype", "cut", "grow", "turn", "expand", "strided", "dims")))
    if kind == "none":
        return None
    if kind == "dtype":
        return torch.zeros(t.shape, dtype=draw(st.sampled_from(DTYPES)))
    if kind == "turn" and t.dim() > 1:
        return t.transpose(-1, -2)
    if kind == "dims":
        return t.flatten() if draw(st.booleans()) else t.unsqueeze(draw(st.integers(0, t.dim())))
    at = draw(st.integers(0, t.dim() - 1))
    size = t.shape[at]
    if kind == "cut":
        return t.narrow(at, 0, draw(st.integers(0, size))).clone()
    if kind == "strided":
        return t.view(U8).repeat_interleave(2, -1)[..., ::2].view(t.dtype) if t.itemsize == 1 else t[..., ::1]
    if kind == "expand":
        return t.narrow(at, 0, min(1, size)).expand([draw(st.integers(1, 5)) if i == at and size else s
                                                     for i, s in enumerate(t.shape)])  # fmt: skip
    shape = list(t.shape)
    shape[at] += draw(st.integers(1, 3))
    return torch.ones(shape, dtype=torch.float32).to(t.dtype)


def outcome(op: str, args: tuple) -> tuple[object, str]:
    try:
        return call(op, *args), ""
    except (RuntimeError, NotImplementedError) as error:
        return None, str(error).split("\n")[0]


@given(packings.packings(("special",), most=2), st.integers(0, 9), st.data())
def test_nonsense_is_refused_alike_or_is_none(drawn, seed, data):
    """One or two arguments are changed. Operator and fake agree on whether they take them, and in words; what
    they take is a weight that `dequantize` reads in the same way.
    """
    packing, n, k = drawn
    experts = 2
    weight = packings.build(packing, experts, n, k, torch.Generator().manual_seed(seed))
    arguments = weight.operands()
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(list(arguments)))
        if name == "weight_format":
            arguments[name] = data.draw(st.sampled_from([*FORMATS, "NF4", ""]))
        elif name == "weight_transposed":
            arguments[name] = not arguments[name]
        else:
            arguments[name] = data.draw(changed(arguments[name]))
    if arguments["weight"] is None:
        return
    codes, scale, scale2, zero, name, turned = arguments.values()
    x = torch.ones(3, k, dtype=BF16)
    routing = (*reference.flatten_sort_count(torch.tensor([[0], [1], [0]]), experts), 1)
    options = list(arguments.values())[1:]
    args = (x, codes, *routing, None, None, 1.0, None, None, False, False, *options)
    y, refusal = outcome("scatter_lora", args)
    without_data = tuple(on_meta(a) if isinstance(a, torch.Tensor) else a for a in args)
    faked, in_fake = outcome("scatter_lora", without_data)
    assert refusal == in_fake
    event("refused" if refusal else "taken")
    if not refusal:
        assert faked.shape == y.shape
        packed = PackedWeight(codes, scale, scale2, zero, name, turned)
        dense = packed.dequantize(BF16) if name != "dense" else codes
        want = reference.scatter_lora(x, dense, *routing, None, None, 1.0)
        assert y.shape == want.shape and torch.equal(y.isnan(), want.isnan())


NEVER_READ = """
    import ctypes, mmap, sys
    import torch
    from torch_moelora import formats, functional as F

    PAGE, E, N, K, IDLE = mmap.PAGESIZE, 4, 512, 256, 2
    libc = ctypes.CDLL(None, use_errno=True)

    def guarded(t):
        '''A copy of t whose idle expert cannot be read.'''
        size = t.nbytes // E
        if size % PAGE:
            return t, 0
        memory = mmap.mmap(-1, t.nbytes)
        copy = torch.frombuffer(memory, dtype=torch.uint8).view(t.dtype).view(t.shape)
        copy.view(torch.uint8).copy_(t.contiguous().view(torch.uint8))
        start = copy.data_ptr() + IDLE * size
        assert libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(size), 0) == 0
        return copy, 1

    kept = []
    for name in sys.argv[1:]:
        packed = formats.quantize(torch.randn(E, N, K), name, 32 if name in ("int4", "int8") else None)
        parts, guards = zip(*((None, 0) if t is None else guarded(t) for t in packed[:4]))
        kept.append(parts)
        assert guards[0]
        ids = torch.tensor([[0], [1], [3], [7], [-1], [3]] * 20)  # 7 and -1: nobody's
        for turned in (False, True):
            mine, theirs = (formats.PackedWeight(*p, name, turned) for p in (parts, packed[:4]))
            for tokens in (3, 60):
                results = []
                for weight in (theirs, mine):
                    x = torch.ones(tokens, N if turned else K, dtype=torch.bfloat16, requires_grad=True)
                    slots, offsets = F.flatten_sort_count(ids[:tokens], E)
                    y = F.scatter_lora(x, weight, slots, offsets, 1)
                    y.sum().backward()
                    results.append((y, x.grad))
                assert all(map(torch.equal, *results))
    print("read nothing")
"""


@pytest.mark.skipif(SWITCHES.backend == "triton", reason="lays memory for the CPU kernels")
def test_experts_without_rows_are_never_read():
    """Their codes, and scales where they fill pages, lie in memory that cannot be read."""
    names = [name for name, row in FORMATS.items() if row.bits is not None]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(NEVER_READ), *names], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "read nothing\n", done.stderr


@pytest.mark.parametrize("argument", ["weight_scale", "weight_scale2", "weight_zero"])
def test_a_scale_elsewhere_is_refused(argument):
    """By the CPU operator itself, past the dispatcher, which would have called another."""
    packing = Packing("int4", 32, zero=True) if argument == "weight_zero" else Packing("nvfp4", 16)
    weight = packings.build(packing, 3, 4, 64, torch.Generator().manual_seed(0)).operands()
    weight[argument] = weight[argument].to("meta")
    x = torch.zeros(2, 64, dtype=BF16)
    slots, offsets = torch.arange(2), torch.full((3,), 2, dtype=torch.int32)
    on_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    codes = weight.pop("weight")
    call = partial(torch.ops.moelora.scatter_lora.default.redispatch, on_cpu, x, codes, slots, offsets, 1)
    with pytest.raises(RuntimeError) as caught:
        call(**weight)
    assert f"scatter_lora: {argument} must be on device cpu (that of weight), got meta" in str(caught.value)


def test_groups_of_zero_columns_are_refused():
    weight = packings.build(Packing("int8"), 2, 4, 8, torch.Generator().manual_seed(0))
    empty = weight._replace(scale=weight.scale[:, :, :0])
    slots, offsets = reference.flatten_sort_count(torch.tensor([[0], [1]]), 2)
    with pytest.raises(RuntimeError, match="weight_scale"):
        call("scatter_lora", torch.ones(2, 8), empty.codes, slots, offsets, 1, None, None, 1.0, None, None,
             False, False, *empty[1:])  # fmt: skip
