"""What malloc keeps of freed memory while a model is trained."""

import pytest
import torch
from moelora.commands import heap
from torch import nn

if heap.beside() == 0:
    pytest.skip("the C library tells nothing of its heap", allow_module_level=True)


class Layer(nn.Module):
    """Keeps 8 MB for its backward, between blocks of 12 MB that it frees."""

    def forward(self, x):
        before = torch.ones(3 << 20)
        kept = (x * torch.ones(2 << 20, requires_grad=True)).exp()
        assert before.sum() and torch.ones(3 << 20).sum()
        return kept.mean() + x


@pytest.mark.parametrize("watched", [False, True])
def test_freed_memory_goes_back(watched, monkeypatch):
    monkeypatch.setattr(heap, "LIMIT", 32 << 20)
    layers = nn.ModuleList(Layer() for _ in range(24))
    heap.trim()
    least, most = heap.beside(), []
    watch = heap.Watch(layers) if watched else None
    x = torch.zeros(1, requires_grad=True) + 0
    for layer in layers:
        x = layer(x)
        x.register_hook(lambda _: most.append(heap.beside() - least))
    x.backward()
    assert len(most) == len(layers)
    if watch:
        assert max(most) < 100 << 20
        watch.remove()
        assert not any(layer._forward_pre_hooks for layer in layers)
    else:
        assert max(most) > 100 << 20  # most of what was kept
    heap.trim()
