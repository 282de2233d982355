"""Every experts class of the installed transformers on the operators, beside its eager forward and PEFT."""

import re
from pathlib import Path

import moelora
import pytest
import torch
import transformers
from model_tiny import (
    difference,
    fill,
    one_thread,  # noqa: F401  (autouse)
)
from moelora import experts, survey
from moelora.__main__ import main
from peft import LoraConfig, get_peft_model
from torch import nn

CLASSES = survey.classes()
TOKENS, TOP_K = 24, 2


class _Layer(nn.Module):
    """PEFT wraps what is inside a module."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.experts = module

    def forward(self, *arguments):
        return self.experts(*arguments)


def _adapted(cls, dtype: torch.dtype):
    """A layer with random bf16 values in every parameter and LoRA on both projections."""
    module = survey.build(cls)
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape).bfloat16().to(dtype)
    names = [f"experts.{name}" for name in experts.projections(module)]
    config = LoraConfig(r=3, lora_alpha=4, target_modules=[], target_parameters=names)
    layer = get_peft_model(_Layer(module), config)
    fill(layer)
    return layer


def _routing(dtype: torch.dtype):
    """x, ids and gates; one id in eight is a sentinel, as under expert parallelism."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(TOKENS, survey.HIDDEN, generator=generator).bfloat16().to(dtype).requires_grad_()
    routes = torch.rand(TOKENS, survey.EXPERTS, generator=generator).topk(TOP_K)
    elsewhere = torch.rand(routes.indices.shape, generator=generator) < 1 / 8
    gates = routes.values.bfloat16().to(dtype).requires_grad_()
    return x, routes.indices, elsewhere, gates


def _run(cls, dtype: torch.dtype, enabled: bool) -> dict[str, torch.Tensor]:
    """Output and gradients of input, routing weights and adapters."""
    layer = _adapted(cls, dtype)
    x, ids, elsewhere, gates = _routing(dtype)
    if enabled:
        report = moelora.enable(layer)
        assert report.served == report.layers and report.trainable == 2
        ids, weights = ids.masked_fill(elsewhere, survey.EXPERTS), gates
    else:  # a sentinel is a route without weight; not every eager forward takes an id outside the experts
        weights = gates.masked_fill(elsewhere, 0.0)
    y = layer(x, ids, weights)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(dtype)
    names, parameters = zip(*((n, p) for n, p in layer.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(y, [x, gates, *parameters], dy)
    return {"y": y.detach(), **dict(zip(("x", "gates", *names), found, strict=True))}


def test_every_experts_class_is_accounted_for():
    """Either it follows the interface or it stands in the one list of those that do not."""
    sources = Path(transformers.models.__path__[0]).glob("*/modeling_*.py")
    defined = {
        name for path in sources for name in re.findall(r"^class (\w+Experts)\(", path.read_text(), re.M)
    }
    routed = {name for name in defined if "Shared" not in name}
    followers = {cls.__name__ for cls in CLASSES}
    assert len(followers) >= 60
    assert routed - followers <= experts.OUTSIDE.keys() and not followers & experts.OUTSIDE.keys()


def test_enable_names_experts_outside_the_interface():
    outside = type("DbrxExperts", (nn.Linear,), {})
    with pytest.raises(
        moelora.MoeloraError, match="interface; DbrxExperts: all experts in one 2-D parameter"
    ):
        moelora.enable(nn.Sequential(outside(2, 2)))


def test_the_support_matrix_is_current(capsys):
    """Whole where transformers is the version it was made with, else in the classes that both have."""
    assert main(["models"]) == 0
    now = capsys.readouterr().out
    written = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()
    if f"transformers {transformers.__version__} " in written:
        assert written == now, "python -m moelora models > docs/models.md"
    rows, current = ({r.split("|")[2]: r for r in text.splitlines() if "| `" in r} for text in (written, now))
    assert len(rows) >= 60 and all(current.get(name, row) == row for name, row in rows.items())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_class_agrees_with_eager(cls):
    """In fp32 to rounding; in bf16 about as close to fp32 as eager is, which rounds at other places."""
    exact = _run(cls, torch.float32, enabled=False)
    ours = _run(cls, torch.float32, enabled=True)
    assert len(exact) == 7 and all(value.norm() > 0 for value in exact.values())
    for name, expected in exact.items():
        assert difference(ours[name], expected) < 2e-5, name
    eager, ours = (_run(cls, torch.bfloat16, enabled) for enabled in (False, True))
    for name, expected in exact.items():
        assert ours[name].dtype == eager[name].dtype, name
        assert difference(ours[name], expected) < max(1.5 * difference(eager[name], expected), 1e-2), name


_ODD = ("GptOssExperts", "Inkling2Experts", "MuseSparkExperts", "NemotronHExperts")


@pytest.mark.parametrize(
    "cls", [cls for cls in CLASSES if cls.__name__ in _ODD], ids=lambda cls: cls.__name__
)
def test_unusual_class_compiles_into_one_graph(cls):
    """Biases, a gate of its own, a norm after each expert, no gate."""
    layer = _adapted(cls, torch.float32)
    moelora.enable(layer)
    x, ids, _, gates = _routing(torch.float32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(x, ids, gates), layer(x, ids, gates))
