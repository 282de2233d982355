"""torch.compile(fullgraph=True, dynamic=True) and torch.export: no graph breaks, no recompiles over changing
T. And torch.jit.trace.
"""

import pytest
import torch
from cases import BF16, FP32
from torch._dynamo.utils import counters

from torch_moelora import functional, nn

E, H, INNER, R, TOP_K = 4, 16, 12, 3, 2


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many forward graphs were compiled since the test began."""
    return counters["stats"]["unique_graphs"]


def module(dtype=FP32, **options) -> nn.LoRAExperts:
    torch.manual_seed(0)
    experts = nn.LoRAExperts(E, H, INNER, rank=R, dtype=dtype, **options)
    for name, parameter in experts.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    return experts


def inputs(tokens: int, dtype=FP32) -> tuple:
    gen = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, H, generator=gen).to(dtype)
    ids = torch.randint(-1, E, (tokens, TOP_K), generator=gen)
    gates = torch.rand(tokens, TOP_K, generator=gen)
    return x.requires_grad_(), ids, gates.requires_grad_()


def grads_of(experts, tokens, dtype=FP32, run=None):
    x, ids, gates = inputs(tokens, dtype)
    experts.zero_grad()
    y = (experts if run is None else run)(x, ids, gates)
    y.float().square().sum().backward()
    trainable = [p.grad.clone() for p in experts.parameters() if p.requires_grad]
    return [y.detach(), x.grad, gates.grad, *trainable]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("options", [{}, {"bias": True, "target": "down"}, {"gated": False, "act": "relu2"}])
def test_no_recompiles_over_tokens(options, dtype):
    experts = module(dtype, **options)
    compiled = torch.compile(experts, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 8, 33, 12, 7):
        eager = grads_of(experts, tokens, dtype)
        got = grads_of(experts, tokens, dtype, compiled)
        for a, b in zip(eager, got, strict=True):
            torch.testing.assert_close(a, b)
    assert graphs() == 1


def test_automatic_dynamic_compiles_twice_at_most():
    """Without dynamic=True: once for the first T, once for all others."""
    experts = module()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    for tokens in (5, 8, 33, 12):
        grads_of(experts, tokens, run=compiled)
    assert graphs() <= 2


@pytest.mark.slow
def test_inductor():
    experts = module()
    compiled = torch.compile(experts, fullgraph=True, dynamic=True)
    for tokens in (6, 19):
        for a, b in zip(grads_of(experts, tokens), grads_of(experts, tokens, run=compiled), strict=True):
            torch.testing.assert_close(a, b)


def test_without_gradients():
    """Parameters that would be trained, in a call that is not."""
    experts = module()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(*inputs(6)), experts(*inputs(6)))
    assert torch.equal(compiled(*inputs(6)), experts(*inputs(6)))  # and then in one that is


def test_autocast_inside_a_graph():
    experts = module()

    def f(x, ids, gates):
        with torch.autocast("cpu", dtype=BF16):
            return experts(x, ids, gates)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    eager, got = grads_of(experts, 9, run=f), grads_of(experts, 9, run=compiled)
    for a, b in zip(eager, got, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


def test_operators_alone_with_their_own_indices():
    """S and T come in as independent sizes here, tied only by the operator's checks."""
    weight = torch.randn(E, 7, H)

    def f(x, slots, offsets):
        return functional.scatter_lora(x, weight, slots, offsets, TOP_K, y_grouped=True)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9, 6):
        x, ids, _ = inputs(tokens)
        slots, offsets = functional.flatten_sort_count(ids, E)
        torch.testing.assert_close(compiled(x.detach(), slots, offsets), f(x.detach(), slots, offsets))
    assert graphs() == 1


def test_changing_scaling_does_not_break_the_graph():
    weight, a, b = torch.randn(E, 8, H), torch.randn(E, R, H), torch.randn(E, 8, R)
    x, ids, _ = inputs(6)
    slots, offsets = functional.flatten_sort_count(ids, E)

    def f(x, scaling):
        return functional.scatter_lora(x, weight, slots, offsets, TOP_K, lora_a=a, lora_b=b, scaling=scaling)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for scaling in (0.5, 1.0, 2.0):
        torch.testing.assert_close(compiled(x.detach(), scaling), f(x.detach(), scaling))


def test_export():
    experts = module().eval()
    x, ids, gates = (t.detach() for t in inputs(6))
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(experts, (x, ids, gates), dynamic_shapes=[{0: tokens}] * 3)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"moelora.scatter_lora.default", "moelora.flatten_sort_count.default"} <= targets
    other = tuple(t.detach() for t in inputs(15))
    torch.testing.assert_close(program.module()(*other), experts(*other))


def test_rows_chosen_by_data():
    """Their number is known only at run time: the operators' checks must not need it while tracing."""
    weight = torch.randn(E, 8, H)

    def f(x, ids, keep):
        rows = keep.nonzero().flatten()
        slots, offsets = functional.flatten_sort_count(ids[rows], E)
        return functional.scatter_lora(x[rows], weight, slots, offsets, TOP_K)

    x, ids, _ = inputs(8)
    keep = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x.detach(), ids, keep), f(x.detach(), ids, keep))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns of each shape that is compared
@pytest.mark.parametrize("options", [{"bias": True}, {"gated": False, "act": "relu2"}])
def test_traced_by_torch_jit_and_saved(options, tmp_path):
    """The file has no number of tokens in it, and gradients."""
    experts = module(**options)
    torch.jit.save(torch.jit.trace(experts, inputs(5)), tmp_path / "experts.pt")
    loaded = torch.jit.load(tmp_path / "experts.pt")
    for tokens in (5, 9, 1):
        got, expected = grads_of(loaded, tokens), grads_of(experts, tokens)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
