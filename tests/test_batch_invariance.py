"""With batch invariance on, a token's results are the same bits whatever else is in the batch."""

import contextlib
import ctypes
import os
import subprocess
import sys
import threading
from dataclasses import dataclass

import problems
import pytest
import torch
from cases import BF16, FP16, FP32, FP64, HALVES, Case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import torch_moelora
from torch_moelora import _C, batch_invariance, functional, switches

INTERPRETED = switches.SWITCHES.backend == "triton"


@contextlib.contextmanager
def invariant(on: bool = True):
    before = torch_moelora.is_batch_invariant()
    torch_moelora.set_batch_invariant(on)
    try:
        yield
    finally:
        torch_moelora.set_batch_invariant(before)


@dataclass
class Batch:
    """All tokens of a case, and some of them in some order. Per-slot tensors are [T, top_k, ·]."""

    case: Case
    chosen: list[int]


@st.composite
def batches(draw) -> Batch:
    """Sizes around vector and tile edges, with enough rows for kernels of many rows, and few chosen."""
    dtype = draw(st.sampled_from((BF16, BF16, FP16, FP32, FP64)))
    kinds = ("same", "fp32") if dtype in HALVES else ("same",)
    case = Case(
        tokens=draw(st.sampled_from((2, 5, 9, 33, 70) if INTERPRETED else (2, 5, 9, 33, 70, 200))),
        top_k=draw(st.integers(1, 3)),
        experts=draw(st.sampled_from((1, 2, 5))),
        k=draw(st.sampled_from((1, 17, 32, 100, 300))),
        n=draw(st.sampled_from((1, 16, 31, 80, 130))) * 2,
        rank=draw(st.sampled_from((0, 1, 8, 16, 33))),
        dtype=dtype,
        lora=draw(st.sampled_from(kinds)),
        bias=draw(st.sampled_from(("none", *kinds))),
        gates=draw(st.sampled_from(kinds)),
        weight_layout=draw(st.sampled_from(("contiguous", "transposed", "strided"))),
        lora_layout=draw(st.sampled_from(("contiguous", "peft"))),
        routing=draw(st.sampled_from(("random", "one_expert", "sentinels"))),
        seed=draw(st.integers(0, 2**20)),
    )
    tokens = st.integers(0, case.tokens - 1)
    count = draw(st.sampled_from((1, 2, 7, 40)))
    return Batch(case, draw(st.lists(tokens, min_size=1, max_size=count, unique=True)))


def by_token(rows: Tensor, slots: Tensor, top_k: int) -> Tensor:
    """[S, ·] in grouped order → [T, top_k, ·]."""
    return torch.empty_like(rows).index_copy_(0, slots, rows).view(-1, top_k, rows.shape[1])


def results(batch: Batch, tokens: list[int]) -> dict[str, Tensor]:
    """What the operators give for these tokens, each [len(tokens), ·]."""
    case, ops = batch.case, torch.ops.moelora
    p = problems.build(case)
    gen = torch.Generator().manual_seed(case.seed)
    ids = problems.expert_ids(case, gen)[tokens]
    x, gates = p.x[tokens], p.gates[tokens]
    per_slot = torch.randn(case.tokens, case.top_k, max(case.k, case.n), generator=gen).to(case.dtype)[tokens]
    slots, offsets = functional.flatten_sort_count(ids, case.experts)
    routing = (slots, offsets, case.top_k)
    lora = {"lora_a": p.lora_a, "lora_b": p.lora_b, "scaling": case.scaling}
    forward = {**lora, "bias": p.bias}
    grouped_x = per_slot[..., : case.k].flatten(0, 1)[slots]
    dy, slot_dy = p.dy[tokens], per_slot[..., : case.n].flatten(0, 1)
    found = {
        "by slot": ops.scatter_lora(x, p.weight, *routing, **forward).view(len(tokens), -1),
        "gates": ops.scatter_lora(x, p.weight, *routing, **forward, gates=gates),
        "grouped x": ops.scatter_lora(grouped_x, p.weight, *routing, **forward, gates=gates, x_grouped=True),
        "grouped y": by_token(
            ops.scatter_lora(x, p.weight, *routing, **forward, y_grouped=True), slots, case.top_k
        ),
        "dx": ops.scatter_lora_dx(slot_dy, p.weight, *routing, **lora)[0],
        "dx of gates": ops.scatter_lora_dx(dy, p.weight, *routing, **lora, gates=gates, x=x)[0],
        "dx of grouped x": by_token(
            ops.scatter_lora_dx(dy, p.weight, *routing, **lora, gates=gates, x_grouped=True)[0],
            slots,
            case.top_k,
        ),
    }
    if case.rank:
        lora["bias"] = p.bias
        found["dx of all"] = ops.scatter_lora_backward(dy, x, p.weight, *routing, **lora, gates=gates)[0]
        found["dx of all, by slot"] = ops.scatter_lora_backward(slot_dy, x, p.weight, *routing, **lora)[0]
    return found | mlp(batch, p, x, ids, gates)


def mlp(batch: Batch, p: problems.Problem, x: Tensor, ids: Tensor, gates: Tensor) -> dict[str, Tensor]:
    """moe_mlp and its dX, with the case's weight as gate_up."""
    case = batch.case
    gen = torch.Generator().manual_seed(case.seed)
    down = torch.randn(case.experts, case.k, case.n // 2, generator=gen).to(case.dtype)
    x = x.clone().requires_grad_()
    y = functional.moe_mlp(
        x, ids, gates, p.weight, down, gate_up_lora_a=p.lora_a, gate_up_lora_b=p.lora_b, gate_up_bias=p.bias
    )
    (dx,) = torch.autograd.grad(y.sum(), x)
    found = {"moe_mlp": y.detach(), "dx of moe_mlp": dx}
    for act in ("silu", "gelu_tanh"):
        plain = functional.moe_mlp(x, ids, gates, p.weight, p.weight.mT, act=act, gated=False)
        (dx,) = torch.autograd.grad(plain.sum(), x)
        found |= {f"moe_mlp of {act}": plain.detach(), f"dx of moe_mlp of {act}": dx}
    return found


def differing(batch: Batch, whole: dict[str, Tensor] | None = None) -> list[str]:
    """The results of which the chosen tokens' rows are other bits than in the whole batch's, `whole`."""
    whole, part = whole or in_whole(batch.case), results(batch, batch.chosen)
    return [
        name
        for name, rows in part.items()
        if not torch.equal(rows.contiguous().view(torch.uint8), whole[name][batch.chosen].view(torch.uint8))
    ]


def in_whole(case: Case) -> dict[str, Tensor]:
    return results(Batch(case, []), list(range(case.tokens)))


@pytest.mark.operators
@given(batches())
def test_a_token_does_not_depend_on_its_batch(batch):
    with invariant():
        assert not differing(batch)


@pytest.mark.operators
@pytest.mark.parametrize("dtype", (BF16,) if INTERPRETED else (BF16, FP16, FP32))
def test_a_token_alone_and_among_many(dtype):
    """Where tuned kernels do differ: one row, a few, and more than any block."""
    tokens, k = (200, 130) if INTERPRETED else (500, 700)
    case = Case(tokens=tokens, top_k=1, experts=1, k=k, n=200, rank=16, dtype=dtype, gates="same")
    with invariant():
        whole = in_whole(case)
        for chosen in ([7], [tokens - 1, 0, 3], list(range(100, 130)), list(range(0, tokens, 2))):
            assert not differing(Batch(case, chosen), whole), f"{len(chosen)} tokens"


@pytest.mark.operators
@pytest.mark.skipif(INTERPRETED, reason="Triton's kernels sum alike whatever the size")
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_sums_of_a_large_batch(dtype):
    """More rows, and wider ones, than the CPU's drivers keep apart, on other threads than a few of them."""
    wide, chosen = 3200, [3, 519, 77]
    case = Case(tokens=520, top_k=4, experts=6, k=wide, n=40, rank=8, dtype=dtype, gates="same")
    kept_apart = max(kernels.blocking["combine_bytes"] for kernels in _C.kernel_sets())
    assert case.rows * wide * torch.float32.itemsize > kept_apart
    p = problems.build(case)
    ids = problems.expert_ids(case, torch.Generator().manual_seed(case.seed))

    def sums(tokens: list[int], threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        lora, gates = {"lora_a": p.lora_a, "lora_b": p.lora_b, "scaling": case.scaling}, p.gates[tokens]
        routing = *functional.flatten_sort_count(ids[tokens], case.experts), case.top_k
        dx, _ = torch.ops.moelora.scatter_lora_dx(p.dy[tokens], p.weight, *routing, **lora, gates=gates)
        turned = {"lora_a": p.lora_b.mT, "lora_b": p.lora_a.mT, "scaling": case.scaling}
        y = torch.ops.moelora.scatter_lora(p.dy[tokens], p.weight.mT, *routing, **turned, gates=gates)
        return [dx, y]

    before = torch.get_num_threads()
    try:
        with invariant():
            whole, part = sums(list(range(case.tokens)), 3), sums(chosen, 1)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(w[chosen], part_) for w, part_ in zip(whole, part, strict=True))


@dataclass
class Library:
    """What is told to the operators' library. Not a CDLL: its functions are here or are not."""

    told: list[tuple[str, int]]
    names: tuple[str, ...] = ("moelora_set_batch_invariant", "moelora_override_batch_invariant")

    def __getattr__(self, name: str):
        if name not in self.names:
            raise AttributeError(name)
        return lambda value: self.told.append((name.split("_")[1], value.value))


@pytest.fixture
def library(monkeypatch) -> Library:
    """In place of the real one; the flag is put back."""
    stub = Library([])
    monkeypatch.setattr(batch_invariance, "_library", lambda: stub)
    monkeypatch.setitem(batch_invariance._PROCESS, "on", False)
    return stub


def test_a_library_without_the_flag_says_what_to_do(library):
    library.names = ()
    message = r"libmoelora_ops.so must have the function moelora_set_batch_invariant, got a build without it"
    with pytest.raises(AttributeError, match=message + r".*make setup"):
        torch_moelora.set_batch_invariant(True)
    assert not torch_moelora.is_batch_invariant()


@pytest.mark.parametrize("value", [1, None, "1"])
def test_only_a_bool(value, library):
    with pytest.raises(TypeError, match=f"on must be a bool, got {value!r}"):
        torch_moelora.set_batch_invariant(value)
    assert not library.told


def scatter_lora_of(x: Tensor) -> Tensor:
    weight, ids = torch.ones(2, 3, 4), torch.tensor([[0], [1]])
    slots, offsets = functional.flatten_sort_count(ids, 2)
    return functional.scatter_lora(x, weight, slots, offsets, 1)


def mlp_of(x: Tensor) -> Tensor:
    ids = torch.tensor([[0], [1]])
    return functional.moe_mlp(x, ids, torch.ones(2, 1), torch.ones(2, 6, 4), torch.ones(2, 4, 3))


@pytest.mark.parametrize("forward", [scatter_lora_of, mlp_of])
@pytest.mark.parametrize("on", [False, True])
def test_a_backward_goes_by_its_forwards_flag(on, forward, library):
    torch_moelora.set_batch_invariant(on)
    y = forward(torch.ones(2, 4, requires_grad=True)).sum()
    library.told.clear()
    y.backward(retain_graph=True)
    assert library.told == [], "nothing to override"
    torch_moelora.set_batch_invariant(not on)
    library.told.clear()
    y.backward()
    told = [("override", int(on)), ("override", batch_invariance.NO_OVERRIDE)]
    assert library.told == told * (len(library.told) // 2) and library.told
    assert torch_moelora.is_batch_invariant() is not on


def test_an_override_is_its_threads_own(library):
    seen = {}
    torch_moelora.set_batch_invariant(True)
    with batch_invariance.as_in_forward(False):
        thread = threading.Thread(target=lambda: seen.update(other=torch_moelora.is_batch_invariant()))
        thread.start()
        thread.join()
        seen["own"] = torch_moelora.is_batch_invariant()
        with batch_invariance.as_in_forward(True):
            seen["inner"] = torch_moelora.is_batch_invariant()
        with pytest.raises(ValueError), batch_invariance.as_in_forward(True):
            raise ValueError
        assert not torch_moelora.is_batch_invariant()
    assert seen == {"other": True, "own": False, "inner": True}
    assert [value for name, value in library.told if name == "override"] == [0, 1, 0, 1, 0, -1]


def test_info(library):
    for on in (True, False):
        torch_moelora.set_batch_invariant(on)
        assert torch_moelora.info()["batch_invariant"] is on


@pytest.mark.skipif(not INTERPRETED, reason="asks which configuration a Triton kernel has")
def test_compiled_graphs_read_the_flag_when_they_run(monkeypatch):
    from torch_moelora.triton import configs

    seen, choose = [], configs.choose

    def recording(*args, search=True):
        seen.append(not search)
        return choose(*args, search=search)

    monkeypatch.setattr(configs, "choose", recording)
    compiled = torch.compile(mlp_of, fullgraph=True, backend="aot_eager")
    for on in (False, True, False):
        with invariant(on):
            compiled(torch.ones(2, 4, requires_grad=True)).sum().backward()
        assert set(seen) == {on}
        seen.clear()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_the_operators_library_has_the_functions():
    library = batch_invariance._library()
    assert (library is None) == INTERPRETED
    for name in Library([]).names:
        assert library is None or isinstance(getattr(library, name), ctypes._CFuncPtr)


def test_the_switch():
    """Here without the compiled operators, which are told at import."""
    assert switches.read({"MOELORA_BATCH_INVARIANT": "1"}).batch_invariant
    with pytest.raises(ImportError, match="MOELORA_BATCH_INVARIANT must be 0, 1 or unset, got on"):
        switches.read({"MOELORA_BATCH_INVARIANT": "on"})
    code = "import torch_moelora; print(torch_moelora.info()['batch_invariant'])"
    environ = {"MOELORA_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    for value, printed in (("0", "False"), ("1", "True")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | environ | {"MOELORA_BATCH_INVARIANT": value},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == printed, done.stderr
