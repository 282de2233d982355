"""Packed weights through the operators, autograd and modules, beside the dense weight that they stand for."""

import io

import packings
import problems
import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case
from hypothesis import given
from hypothesis import strategies as st
from packings import E4M3, NAMES, Packing

import torch_moelora
from torch_moelora import formats, functional, nn
from torch_moelora.formats import FORMATS, PackedWeight
from torch_moelora.switches import SWITCHES

pytestmark = pytest.mark.operators

ON_CPU = SWITCHES.backend != "triton"
E = 3


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def packing_of(name: str) -> Packing:
    """One of each format, for K a multiple of 64."""
    row = FORMATS[name]
    group = min(64, row.groups.least * 2) if row.groups.kind in ("power", "multiple") else row.groups.least
    return Packing(name, group, row.scale_dtypes[0], rows="block", zero=bool(row.zero))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits, but that every NaN is one."""
    return a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def unit_rows(size: int) -> tuple:
    """(rows, routing) that read every number of every expert's matrix by itself."""
    ids = torch.arange(E).repeat_interleave(size).view(-1, 1)
    return torch.eye(size).repeat(E, 1), (*problems.call("flatten_sort_count", ids, E), 1)


@given(packings.packings(("usual", "subnormal"), most=2), st.integers(0, 99))
def test_the_numbers_themselves(drawn, seed):
    """x of unit vectors picks columns of W, dy rows: exactly `dequantize`, in both directions."""
    packing, n, k = drawn
    packed = packings.build(packing, E, n, k, generator(seed))
    dense = packed.dequantize(FP32)
    x, routing = unit_rows(k)
    y = problems.call(
        "scatter_lora", x, packed.codes, *routing, None, None, 1.0, None, None, False, False, *packed[1:]
    )
    assert torch.equal(y.view(E, k, n).transpose(1, 2), dense)
    dy, routing = unit_rows(n)
    dx, _ = problems.call(
        "scatter_lora_dx",
        dy,
        packed.codes,
        *routing,
        None,
        None,
        1.0,
        None,
        None,
        None,
        False,
        False,
        *packed[1:],
    )
    assert torch.equal(dx.view(E, n, k), dense)


@given(
    packings.packings(("usual", "subnormal", "extreme", "special")),
    st.sampled_from((0, 1, 3, 17, 90)), st.sampled_from((BF16, FP16, FP32)), st.integers(0, 99),
)  # fmt: skip
def test_to_the_bit_of_the_dense_weight(drawn, tokens, dtype, seed):
    packing, n, k = drawn
    case = Case(tokens=tokens, n=n, k=k, dtype=dtype, packing=packing, experts=E, rank=4, seed=seed,
                gates="fp32" if dtype != FP32 else "same")  # fmt: skip
    p = problems.build(case)
    for name, args in (
        ("scatter_lora", p.forward_args()),
        ("scatter_lora_dx", p.dx_args()),
        ("scatter_lora_backward", (*p.backward_args(), True, *p.packed_args)),
    ):
        out, dense = problems.call(name, *args), problems.call(name, *problems.with_dense_weight(name, args))
        outs, denses = (out, dense) if isinstance(out, tuple) else ((out,), (dense,))
        assert all(map(same, outs, denses)), name


@pytest.mark.skipif(not ON_CPU, reason="threads of the CPU's kernels")
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_threads(name):
    p = problems.build(
        Case(tokens=120, n=192, k=64, packing=packing_of(name), experts=5, dtype=BF16, rank=4, gates="fp32")
    )
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = problems.call("scatter_lora", *p.forward_args())
            found.append(
                [y, *problems.call("scatter_lora_backward", *p.backward_args(), True, *p.packed_args)]
            )
    finally:
        torch.set_num_threads(before)
    assert all(same(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_batch_invariant(name):
    """With the switch on, a token's bits are those of the dense weight, and those that it has by itself."""
    row = packing_of(name)
    n, k = (288, 576) if ON_CPU else (96, 64)  # more than the CPU's kernels take in one pass
    packed = packings.build(row, E, n, k, generator())
    dense = packed.dequantize(BF16)
    x, ids = torch.randn(90, k, generator=generator()).to(BF16), torch.arange(90) % E

    def results(weight, tokens: list[int]) -> list[torch.Tensor]:
        routing = functional.flatten_sort_count(ids[tokens].view(-1, 1), E)
        y = functional.scatter_lora(x[tokens], weight, *routing, 1)
        operands = weight.operands() if isinstance(weight, PackedWeight) else {"weight": weight}
        slots, offsets = routing
        dx, _ = torch.ops.moelora.scatter_lora_dx(
            y, sorted_scattered_idxs=slots, expert_offsets=offsets, top_k=1, **operands
        )
        return [y, dx]

    before = torch_moelora.is_batch_invariant()
    torch_moelora.set_batch_invariant(True)
    try:
        whole, alone = results(packed, list(range(90))), results(packed, [7])
        assert all(map(same, whole, results(dense, list(range(90)))))
    finally:
        torch_moelora.set_batch_invariant(before)
    assert all(same(w[7:8], a) for w, a in zip(whole, alone, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_turned(name):
    """A checkpoint's [E, K, N] by the flag is the same product."""
    p = problems.build(Case(n=64, k=64, packing=packing_of(name), experts=E, dtype=BF16))
    packed, dense = p.packed.turned(), p.packed.dequantize(BF16).transpose(1, 2)
    y, want = (functional.scatter_lora(p.x, w, *p.routing) for w in (packed, dense))
    torch.testing.assert_close(y, want, rtol=1e-2, atol=1e-2)
    dy = torch.randn(26, 64, generator=generator()).to(BF16)
    routing = {"sorted_scattered_idxs": p.slots, "expert_offsets": p.offsets, "top_k": 2}
    dx, _ = torch.ops.moelora.scatter_lora_dx(dy, **routing, **packed.operands())
    torch.testing.assert_close(
        dx, torch.ops.moelora.scatter_lora_dx(dy, dense, *p.routing)[0], rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("name", NAMES)
def test_inputs_stay_as_they_are(name):
    """opcheck's test_schema cannot copy float8 tensors."""
    p = problems.build(Case(n=64, k=64, packing=packing_of(name), experts=E, dtype=BF16, gates="fp32"))
    before = [t.view(torch.uint8).clone() for t in p.packed.tensors]
    problems.call("scatter_lora", *p.forward_args())
    problems.call("scatter_lora_dx", *p.dx_args())
    problems.call("scatter_lora_backward", *p.backward_args(), True, *p.packed_args)
    assert all(torch.equal(t.view(torch.uint8), b) for t, b in zip(p.packed.tensors, before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    p = problems.build(
        Case(tokens=5, n=64, k=64, packing=packing_of(name), experts=E, dtype=BF16, gates="fp32")
    )
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if not any(t.dtype == E4M3 for t in p.packed.tensors):
        utils = ("test_schema", *utils)
    torch.library.opcheck(torch.ops.moelora.scatter_lora.default, p.forward_args(), test_utils=utils)


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_scale_stays_in_its_row(name):
    """NaN in one scale: NaN in the columns of y that it belongs to, nowhere else."""
    p = problems.build(Case(tokens=20, n=64, k=64, packing=packing_of(name), experts=E, rank=0, top_k=1))
    clean = problems.call("scatter_lora", *p.forward_args())
    scale = p.packed.scale.clone()
    if scale.dtype == torch.float32:
        scale[1, 0, 0] = torch.nan
    elif scale.dtype == E4M3:
        scale.view(torch.uint8)[1, 0, 0] = 0x7F
    else:
        scale[1, 0, 0] = 255
    p.packed = p.packed._replace(scale=scale)
    y = problems.call("scatter_lora", *p.forward_args())
    rows = (p.slots[p.offsets[0] : p.offsets[1]]).tolist()
    columns = 64 if name == "fp8" else 1
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[rows, :columns] = True
    assert len(rows) and torch.equal(y.isnan(), bad)
    assert torch.equal(y[~bad], clean[~bad])


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("scales", [1, 9])
def test_a_bad_code_stays_in_its_row(rows, turned, scales):
    """E4M3's NaN under each of several scales: in the result of its row of the weight, and in no other."""
    n, k = 9, 640
    codes = torch.randint(0, 0x7E, (1, n, k), dtype=torch.uint8, generator=generator())
    for row, step in ((2, 5), (3, 639), (6, 200), (7, 300)):
        codes[0, row, step] = 0x7F | 0x80 * (row % 2)
    scale = torch.rand(1, scales, k // 128, generator=generator()) + 0.5
    packed = PackedWeight(codes.view(E4M3), scale, format="fp8")
    dense = packed.dequantize(BF16)
    if turned:
        packed, dense = packed.turned(), dense.transpose(1, 2)
    x = torch.randn(rows, n if turned else k, generator=generator()).to(BF16)
    routing = (*problems.call("flatten_sort_count", torch.zeros(rows, 1, dtype=torch.int64), 1), 1)
    plain = (None, None, 1.0, None, None, False, False)
    y = problems.call("scatter_lora", x, packed.codes, *routing, *plain, *packed[1:])
    expected = problems.call("scatter_lora", x, dense, *routing, *plain)
    assert expected.isnan().sum() == rows * 4
    assert same(y, expected) if ON_CPU else torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
def test_sums_in_fp32(dtype):
    """Of a half x the sums over top_k come back before their rounding, and nothing else does."""
    p = problems.build(Case(dtype=dtype, gates="same", tokens=20))
    wide = FP64 if dtype == FP64 else FP32
    y = problems.call("scatter_lora", *p.forward_args())
    y32 = torch.ops.moelora.scatter_lora(*p.forward_args(), sum_fp32=True)
    assert y32.dtype == wide and torch.equal(y32.to(dtype), y)
    dx, _ = problems.call("scatter_lora_dx", *p.dx_args())
    for op, args in (("scatter_lora_dx", p.dx_args()), ("scatter_lora_backward", p.backward_args())):
        dx32 = getattr(torch.ops.moelora, op)(*args, sum_fp32=True)[0]
        assert dx32.dtype == wide and torch.equal(dx32.to(dtype), dx)
    p = problems.build(Case(dtype=dtype, tokens=20, x_grouped=True))
    assert torch.ops.moelora.scatter_lora(*p.forward_args(), sum_fp32=True).dtype == dtype
    assert torch.ops.moelora.scatter_lora_dx(*p.dx_args(), sum_fp32=True)[0].dtype == dtype


def test_gradient_of_a_sum_in_fp32():
    p = problems.build(Case(dtype=BF16, gates="fp32", tokens=20))
    x, gates = p.x.requires_grad_(), p.gates.requires_grad_()
    common = {"lora_a": p.lora_a, "lora_b": p.lora_b, "gates": gates}
    grads = []
    for wide in (False, True):
        y = functional.scatter_lora(x, p.weight, *p.routing, **common, sum_fp32=wide)
        grads.append(torch.autograd.grad(y, (x, gates), p.dy.to(y.dtype)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    x = x.detach().requires_grad_()
    x.grad_dtype = FP32
    y = functional.scatter_lora(x, p.weight, *p.routing, **common, sum_fp32=True)
    (dx,) = torch.autograd.grad(y, x, p.dy.to(FP32))
    assert dx.dtype == FP32 and not torch.equal(dx, dx.bfloat16().float())
    assert torch.equal(dx.bfloat16(), grads[0][0])


def trainable(p: problems.Problem) -> list[torch.Tensor]:
    return [t.requires_grad_() for t in (p.x, p.lora_a, p.lora_b, p.gates, p.bias)]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_dense_weight(name):
    case = Case(
        n=64, k=64, packing=packing_of(name), experts=E, dtype=BF16, gates="fp32", bias="same", lora="fp32"
    )
    p = problems.build(case)
    wanted = trainable(p)
    options = {"lora_a": p.lora_a, "lora_b": p.lora_b, "gates": p.gates, "bias": p.bias}
    grads = []
    for weight in (p.packed, p.packed.dequantize(BF16)):
        y = functional.scatter_lora(p.x, weight, *p.routing, **options)
        grads.append(torch.autograd.grad(y, wanted, p.dy))
    for a, b in zip(*grads, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02 * b.float().abs().max().item())


@pytest.mark.parametrize("argument", ["weight", "weight_scale", "weight_scale2"])
def test_a_packed_weight_has_no_gradient(argument):
    name = {"weight": "fp8", "weight_scale": "nf4", "weight_scale2": "nvfp4"}[argument]
    p = problems.build(Case(n=64, k=64, packing=packing_of(name), experts=E, dtype=BF16))
    operands = p.packed.operands()
    operands[argument] = operands[argument].clone().requires_grad_()
    call = functional.ScatterLora(
        p.x, **operands, sorted_scattered_idxs=p.slots, expert_offsets=p.offsets, top_k=2
    )
    message = f"scatter_lora: {argument} must not require a gradient when weight_format is {name}"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.moelora.scatter_lora(*call)
    h = torch.randn(p.x.shape[0], 128).to(BF16)
    with pytest.raises(RuntimeError, match=message):
        functional.glu_scatter_lora(call._replace(x=h), ("silu", 1.0, None, 0.0, False))
    with torch.no_grad():
        torch.ops.moelora.scatter_lora(*call)


def test_autocast_leaves_scales_alone():
    p = problems.build(Case(n=64, k=64, packing=packing_of("nf4"), experts=E, dtype=FP32))
    with torch.autocast("cpu", dtype=BF16):
        y = functional.scatter_lora(p.x, p.packed, *p.routing, lora_a=p.lora_a, lora_b=p.lora_b)
    want = functional.scatter_lora(p.x.to(BF16), p.packed, *p.routing, lora_a=p.lora_a, lora_b=p.lora_b)
    assert y.dtype == BF16 and torch.equal(y, want)


H, INNER, TOP_K = 64, 32, 2


def experts(name: str, dtype=FP32) -> tuple[nn.LoRAExperts, nn.LoRAExperts]:
    """(with packed weights, with the dense ones that they stand for), the same LoRA."""
    torch.manual_seed(0)
    packing = Packing(name, 32 if name != "nvfp4" else 16, FORMATS[name].scale_dtypes[0], rows="all")
    if name == "fp8":
        packing = Packing(name)
    up, down = (packings.build(packing, E, *size, generator(1)) for size in ((2 * INNER, H), (H, INNER)))
    packed = nn.LoRAExperts(E, H, INNER, rank=2, dtype=dtype, gate_up_weight=up, down_weight=down)
    for target in ("gate_up", "down"):
        torch.nn.init.normal_(getattr(packed, f"{target}_lora_b"), std=0.1)
    dense = nn.LoRAExperts(E, H, INNER, rank=2, dtype=dtype)
    with torch.no_grad():
        for key in ("gate_up_lora_a", "gate_up_lora_b", "down_lora_a", "down_lora_b"):
            getattr(dense, key).copy_(getattr(packed, key))
        dense.gate_up_weight.copy_(up.dequantize(dtype))
        dense.down_weight.copy_(down.dequantize(dtype))
    return packed, dense


def inputs(tokens: int = 9, dtype=FP32) -> tuple:
    gen = generator(tokens)
    x = torch.randn(tokens, H, generator=gen).to(dtype)
    return x, torch.randint(-1, E, (tokens, TOP_K), generator=gen), torch.rand(tokens, TOP_K, generator=gen)


@pytest.mark.parametrize("name", NAMES)
def test_modules(name):
    packed, dense = experts(name)
    x, ids, gates = inputs()
    torch.testing.assert_close(packed(x, ids, gates), dense(x, ids, gates), rtol=1e-4, atol=1e-5)
    for a, b in zip(packed.merged_weights(), dense.merged_weights(), strict=True):
        assert torch.equal(a, b)
    assert not any("weight" in key for key, _ in packed.named_parameters())


def test_state_dict_round_trip():
    packed, _ = experts("nf4")
    state = packed.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other, _ = experts("nf4")
    for t in other.state_dict().values():
        t.zero_()
    other.load_state_dict(torch.load(file))
    args = inputs()
    assert torch.equal(other(*args), packed(*args))
    assert all(isinstance(t, torch.Tensor) for t in state.values())


def test_state_dict_of_another_format_is_refused():
    nf4, _ = experts("nf4")
    fp4, _ = experts("fp4")
    with pytest.raises(RuntimeError, match=r"gate_up_weight\.kind must be nf4, got fp4"):
        nf4.load_state_dict(fp4.state_dict())
    state = nf4.state_dict()
    state["down_weight.scale"] = state["down_weight.scale"].to(BF16)
    with pytest.raises(RuntimeError, match=r"scale must have dtype torch.float32, got torch.bfloat16"):
        nf4.load_state_dict(state)
    del state["down_weight.kind"]
    with pytest.raises(RuntimeError, match=r"down_weight\.kind"):
        nf4.load_state_dict(state)


def test_a_module_keeps_its_packed_weight():
    packed, dense = experts("int4")
    packed.to(BF16)
    assert packed.gate_up_weight.scale.dtype == FP32
    up = dense.gate_up_weight
    dense.gate_up_weight = packed.gate_up_weight.packed
    assert isinstance(dense.gate_up_weight, nn.FrozenWeight)
    assert "gate_up_weight" not in dict(dense.named_parameters())
    dense.gate_up_weight = up
    assert dense.gate_up_weight is up
    assert "int4" in repr(packed)
    with pytest.raises(ValueError, match=r"down_weight must have shape \(3, 64, 32\), got \(3, 64, 64\)"):
        nn.LoRAExperts(E, H, INNER, down_weight=packed.gate_up_weight.packed)


def test_compiled_with_changing_tokens():
    packed, _ = experts("nf4")
    compiled = torch.compile(packed, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 8, 12):
        x, ids, gates = inputs(tokens)
        torch.testing.assert_close(compiled(x, ids, gates), packed(x, ids, gates))


def test_exported_with_a_packed_argument():
    class Product(torch.nn.Module):
        def forward(self, x, packed: PackedWeight, ids):
            slots, offsets = functional.flatten_sort_count(ids, E)
            return functional.scatter_lora(x, packed.turned(), slots, offsets, TOP_K)

    packed = packings.build(Packing("mxfp4", 32, torch.uint8), E, H, INNER, generator())
    x, ids, _ = inputs()
    program = torch.export.export(Product(), (x, packed, ids))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x, packed, ids), Product()(x, packed, ids))


def test_info_lists_the_formats():
    info = torch_moelora.info()
    assert info["formats"] == list(formats.FORMATS)
