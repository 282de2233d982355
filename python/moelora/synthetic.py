"""Random weights of a model's exact shape, of a scale that keeps its activations sane.

What is drawn depends on the seed, the tensor's name and the place in it, never on threads. Codes of packed
weights are drawn as they are: nothing is quantised.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from moelora import packed_layout
from moelora.checkpoint_reader import natural
from moelora.checkpoint_writer import Item
from moelora.model_names import Names, oriented
from moelora.packed_layout import Choice, Layout
from moelora.shards import ShardFile, Spec
from torch_moelora.formats import E4M3, FORMATS, MIDDLE

PIECE = 1 << 22  # numbers drawn at once
_SPREAD = 0.25  # scales are within so much of their mean


def seed_of(seed: int, *place: Any) -> int:
    """A seed for what is at `place`."""
    return xxhash.xxh3_64_intdigest(repr((seed, *place)).encode())


def _generator(seed: int, *place: Any) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(seed_of(seed, *place)))


def _bytes(rng: np.random.Generator, count: int) -> np.ndarray:
    words = rng.integers(0, 2**64 - 1, -(-count // 8), dtype=np.uint64, endpoint=True)
    return words.view(np.uint8)[:count]


class Drawn:
    """Tensors of which each piece is drawn by a function of (generator, numbers)."""

    def __init__(self, specs: dict[str, Spec], seed: int, draw: dict[str, Callable[[Any, int], Tensor]]):
        self.specs = specs
        self._seed, self._draw = seed, draw

    def write(self, file: ShardFile, pool: Executor) -> None:
        """Piece by piece, in any order."""
        places = [
            (name, start, min(PIECE, count - start))
            for name, spec in self.specs.items()
            for count in [math.prod(spec.shape)]
            for start in range(0, count, PIECE)
        ]
        for _ in pool.map(lambda place: self._piece(file, *place), places):
            pass

    def _piece(self, file: ShardFile, name: str, start: int, count: int) -> None:
        rng = _generator(self._seed, name, start)
        file.write(name, start, self._draw[name](rng, count))


class Initialised:
    """The small tensors of a module, as the model itself initialises them."""

    def __init__(self, names: dict[str, str], module: nn.Module, model: nn.Module, seed: int):
        """names: of the module's own tensors on disk → in the module."""
        self._names, self._module, self._model, self._seed = names, module, model, seed
        state = module.state_dict(keep_vars=True)
        self.specs = {disk: Spec(state[own].dtype, tuple(state[own].shape)) for disk, own in names.items()}

    def write(self, file: ShardFile, pool: Executor) -> None:
        """Draws with torch's own generator, which is as before afterwards."""
        module = copy.deepcopy(self._module)
        module.to_empty(device="cpu", recurse=False)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self._seed)
            for tensor in module.state_dict().values():
                tensor.zero_()  # what the model's rule does not know
            self._model._init_weights(module)
        state = module.state_dict()
        for disk, own in self._names.items():
            file.write(disk, 0, state[own])


def items(names: Names, layout: Layout | None, seed: int) -> list[Item]:
    """What a checkpoint of the model consists of: dense, or packed in a layout."""
    own = names.own()
    std = min(getattr(names.model.config.get_text_config(), "initializer_range", None) or 0.02, 0.1)
    experts = names.experts()
    packed: dict[str, Choice] = {}
    if layout is not None:
        packed |= dict.fromkeys(experts, layout.experts)
    if layout is not None and layout.linears is not None:
        packed |= dict.fromkeys(names.linears(), layout.linears)
    dense = {name: tensor for name, tensor in own.items() if name not in packed}
    modules = dict(names.model.named_modules())
    found: list[tuple[str, Item]] = []
    small: dict[str, dict[str, str]] = {}
    for disk, tensor in names.on_disk(dense).items():
        name = names.model_name(disk)[0]
        module, _, last = name.rpartition(".")
        if name in experts or (last == "weight" and isinstance(modules[module], nn.Linear | nn.Embedding)):
            found.append((name, _dense(disk, tensor, std, seed)))
        elif f"{module}.down_proj" in experts:
            found.append((name, _dense(disk, tensor, std, seed)))  # biases of experts
        else:
            small.setdefault(module, {})[disk] = last
    for module, inside in small.items():
        item = Initialised(inside, modules[module], names.model, seed_of(seed, module))
        found.append((module, item))
    for name, choice in packed.items():
        shape = _shape(own[name], experts.get(name))
        found.append((name, _packed(name, choice, shape, std, seed)))
    return [item for _, item in sorted(found, key=lambda pair: natural(pair[0]))]


def _shape(weight: Tensor, module: nn.Module | None) -> tuple[int, int, int]:
    """[E, N, K] of a parameter."""
    return (1, *weight.shape) if module is None else tuple(oriented(module, weight).shape)


def _dense(disk: str, tensor: Tensor, std: float, seed: int) -> Drawn:
    dtype = tensor.dtype

    def draw(rng: np.random.Generator, count: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(count, dtype=np.float32)).mul_(std).to(dtype)

    return Drawn({disk: Spec(dtype, tuple(tensor.shape))}, seed, {disk: draw})


def _packed(name: str, choice: Choice, shape: tuple[int, int, int], std: float, seed: int) -> Drawn:
    specs = {f"{name}.{part}": Spec(*spec) for part, spec in packed_layout.specs(choice, shape).items()}
    draw = {f"{name}.{part}": rule for part, rule in _rules(choice, std)}
    return Drawn(specs, seed, draw)


def _rules(choice: Choice, std: float) -> Iterator[tuple[str, Callable[[Any, int], Tensor]]]:
    """How the tensors of a packed weight are drawn: codes evenly, scales so that the weight has `std`."""
    row = FORMATS[choice.format]
    if row.bits == 4:
        yield "codes", lambda rng, n: torch.from_numpy(_bytes(rng, n))
        values = torch.tensor(row.codes, dtype=torch.float32) - (MIDDLE if row.zero else 0)
    elif row.storage == torch.int8:
        yield "codes", _int8
        values = torch.arange(-127, 128, dtype=torch.float32)
    else:
        yield "codes", _e4m3
        values = _e4m3(_generator(0), PIECE).float()
    base = std / values.square().mean().sqrt().item() / math.sqrt(1 + _SPREAD**2 / 3)
    if choice.nested:
        yield "scale", lambda rng, n: torch.from_numpy(_bytes(rng, n))
        run = torch.tensor([base * _SPREAD, base], dtype=torch.float32)
        yield "scale2", lambda rng, n: run.repeat(n // 2)
    elif row.scale2 == "parts":
        middle = 1.4  # of the E4M3 below
        yield "scale", lambda rng, n: torch.from_numpy(_bytes(rng, n) & 0x07 | 0x38).view(E4M3)  # 1 … 1.875
        yield "scale2", lambda rng, n: torch.full((n,), base / middle, dtype=torch.float32)
    elif row.scale_dtypes[0] == torch.uint8:
        exponent = 127 + math.floor(math.log2(base))
        yield "scale", lambda rng, n: torch.from_numpy((_bytes(rng, n) & 1) + np.uint8(exponent))
    else:
        yield "scale", lambda rng, n: torch.from_numpy(_around(rng, n, base))


def _around(rng: np.random.Generator, count: int, base: float) -> np.ndarray:
    u = rng.random(count, dtype=np.float32)
    return (u * np.float32(2 * _SPREAD) + np.float32(1 - _SPREAD)) * np.float32(base)


def _int8(rng: np.random.Generator, count: int) -> Tensor:
    """-127 … 127."""
    return torch.from_numpy(_bytes(rng, count).view(np.int8)).clamp_(min=-127)


def _e4m3(rng: np.random.Generator, count: int) -> Tensor:
    """Of both signs, from 2 to 30: no NaN, and spread over four powers of two."""
    return torch.from_numpy(_bytes(rng, count) & 0x9F | 0x40).view(E4M3)
