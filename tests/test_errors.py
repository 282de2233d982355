"""Every message of every operator, on the real implementation and on the fake, word for word."""

import ast
import inspect
import math
import re
import traceback
from collections.abc import Callable
from typing import NamedTuple

import problems
import pytest
import torch
from cases import BF16, FP16, FP32, FP64, Case
from packed_errors import SCALE, SCALE2, U8, ZERO, packed, packed_weight

from torch_moelora import checks, functional, nn
from torch_moelora.calls import ScatterLora
from torch_moelora.schemas import SCHEMAS

# T=6, top_k=2, S=12, E=3, K=8, N=5, R=4, everything bf16.
BASE = Case(
    tokens=6, top_k=2, experts=3, k=8, n=5, rank=4, dtype=BF16, lora="same", bias="same", gates="same"
)


def arguments(op: str) -> dict:
    """Valid arguments of `op`, by the schema's names."""
    p = problems.build(BASE)
    given = {
        "x": p.x, "dy": p.dy, "weight": p.weight,
        "sorted_scattered_idxs": p.slots, "expert_offsets": p.offsets, "top_k": 2,
        "lora_a": p.lora_a, "lora_b": p.lora_b, "scaling": 0.5, "bias": p.bias, "gates": p.gates,
        "x_grouped": False, "y_grouped": False, "with_dgates": True,
        "expert_idxs": torch.tensor([[0, 1], [2, 0]]), "num_experts": 3,
        "h": torch.randn(4, 6).to(BF16), "act": "silu", "alpha": 1.0, "limit": None, "up_shift": 0.0,
        "interleaved": False,
        "weight_scale": None, "weight_scale2": None, "weight_zero": None, "weight_format": "dense",
        "weight_transposed": False, "sum_fp32": False,
    }  # fmt: skip
    if op == "glu_backward":
        given["dy"] = torch.randn(4, 3).to(BF16)
    schema = getattr(torch.ops.moelora, op).default._schema
    return {argument.name: given[argument.name] for argument in schema.arguments}


class Row(NamedTuple):
    """`change` maps argument names to new values, or to functions of the old ones."""

    op: str
    change: dict
    message: str

    def call(self, device: str = "cpu") -> None:
        args = arguments(self.op)
        for name, value in self.change.items():
            args[name] = value(args[name]) if isinstance(value, Callable) else value
        if device == "meta":
            args = {n: problems.on_meta(a) if isinstance(a, torch.Tensor) else a for n, a in args.items()}
        getattr(torch.ops.moelora, self.op)(*args.values())


def e(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def to(dtype: torch.dtype) -> Callable:
    return lambda t: t.to(dtype)


ALL_FLOATS = "torch.bfloat16, torch.float16, torch.float32 or torch.float64"
LONG, INT = torch.int64, torch.int32
NAN, INF = math.nan, math.inf


def routing(lead: str) -> list[tuple[dict, str]]:
    idxs, offsets = "sorted_scattered_idxs", "expert_offsets"
    return [
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": -2}, "top_k must be at least 1, got -2"),
        ({idxs: e(6, 2, dtype=LONG)}, f"{idxs} must be a 1-D tensor [S], got shape [6, 2]"),
        ({idxs: to(INT)}, f"{idxs} must have dtype torch.int64, got torch.int32"),
        ({idxs: to(FP32)}, f"{idxs} must have dtype torch.int64, got torch.float32"),
        ({idxs: e(13, dtype=LONG)}, f"{idxs} must have a length that is a multiple of top_k=2, got 13"),
        (
            {idxs: torch.zeros(1, dtype=LONG).expand(2**31)},  # one element of memory
            f"{idxs} must have a length of at most 2147483647, got 2147483648",
        ),
        ({offsets: e(3, 1, dtype=INT)}, f"{offsets} must be a 1-D tensor [E], got shape [3, 1]"),
        ({offsets: to(LONG)}, f"{offsets} must have dtype torch.int32, got torch.int64"),
        ({offsets: e(0, dtype=INT)}, f"{offsets} must have a length of at least 1, got 0"),
    ]


X_ROWS = [
    ({"x": e(6)}, "x must be a 2-D tensor [T, K], got shape [6]"),
    ({"x": e(6, 8, 1)}, "x must be a 2-D tensor [T, K], got shape [6, 8, 1]"),
    ({"x": e(6), "x_grouped": True}, "x must be a 2-D tensor [S, K], got shape [6]"),
    ({"x": e(5, 8)}, "x must have 6 rows (T, because x_grouped is False), got shape [5, 8]"),
    ({"x_grouped": True}, "x must have 12 rows (S, because x_grouped is True), got shape [6, 8]"),
]
DY_ROWS = [
    ({"dy": e(6)}, "dy must be a 2-D tensor [T, N], got shape [6]"),
    ({"dy": e(12), "gates": None}, "dy must be a 2-D tensor [S, N], got shape [12]"),
    ({"dy": e(12, 5)}, "dy must have 6 rows (T, because gates is given), got shape [12, 5]"),
    ({"gates": None}, "dy must have 12 rows (S, because gates is None), got shape [6, 5]"),
    ({"dy": to(INT)}, f"dy must have dtype {ALL_FLOATS}, got torch.int32"),
]


def weight(lead: str) -> list[tuple[dict, str]]:
    return [
        ({"weight": e(5, 8)}, "weight must be a 3-D tensor [E, N, K], got shape [5, 8]"),
        ({"weight": to(FP32)}, f"weight must have dtype torch.bfloat16 (that of {lead}), got torch.float32"),
        (
            {"weight": e(4, 5, 8)},
            "weight must have 3 experts (the length of expert_offsets), got shape [4, 5, 8]",
        ),
        ({"weight": e(3, 0, 8)}, "weight must have N and K of at least 1, got shape [3, 0, 8]"),
        ({"weight": e(3, 5, 0)}, "weight must have N and K of at least 1, got shape [3, 5, 0]"),
    ]


def lora(lead: str) -> list[tuple[dict, str]]:
    half = f"must have dtype torch.bfloat16 (that of {lead}) or torch.float32, got"
    return [
        ({"lora_a": e(3, 8)}, "lora_a must have shape [3, R, 8] (E=3, K=8), got [3, 8]"),
        ({"lora_a": e(2, 4, 8)}, "lora_a must have shape [3, R, 8] (E=3, K=8), got [2, 4, 8]"),
        ({"lora_a": e(3, 8, 4)}, "lora_a must have shape [3, R, 8] (E=3, K=8), got [3, 8, 4]"),
        ({"lora_a": e(3, 0, 8)}, "lora_a must have a rank R of at least 1, got shape [3, 0, 8]"),
        ({"lora_a": to(FP16), "lora_b": to(FP16)}, f"lora_a {half} torch.float16"),
        ({"lora_a": to(FP64), "lora_b": to(FP64)}, f"lora_a {half} torch.float64"),
        (
            {"lora_b": e(3, 4, 5)},
            "lora_b must have shape [3, 5, 4] (E=3, N=5, R=4 of lora_a), got [3, 4, 5]",
        ),
        ({"lora_b": to(FP32)}, "lora_b must have dtype torch.bfloat16 (that of lora_a), got torch.float32"),
        ({"scaling": NAN}, "scaling must be finite, got nan"),
        ({"scaling": INF}, "scaling must be finite, got inf"),
        ({"scaling": -INF}, "scaling must be finite, got -inf"),
    ]


PAIR_ROWS = [
    ({"lora_b": None}, "lora_a and lora_b must be given together, got only lora_a"),
    ({"lora_a": None}, "lora_a and lora_b must be given together, got only lora_b"),
]


def bias(lead: str) -> list[tuple[dict, str]]:
    half = f"must have dtype torch.bfloat16 (that of {lead}) or torch.float32, got"
    return [
        ({"bias": e(5)}, "bias must have shape [3, 5] (E=3, N=5), got [5]"),
        ({"bias": e(3, 8)}, "bias must have shape [3, 5] (E=3, N=5), got [3, 8]"),
        ({"bias": to(FP64)}, f"bias {half} torch.float64"),
    ]


def gates(lead: str) -> list[tuple[dict, str]]:
    half = f"must have dtype torch.bfloat16 (that of {lead}) or torch.float32, got"
    shape = "gates must have shape [6, 2] (T=S/top_k, top_k), got"
    return [
        ({"y_grouped": True}, "gates must be None when y_grouped is True, got shape [6, 2]"),
        ({"gates": e(12)}, f"{shape} [12]"),
        ({"gates": e(4, 3)}, f"{shape} [4, 3]"),
        ({"gates": e(5, 2)}, f"{shape} [5, 2]"),
        ({"gates": to(FP16)}, f"gates {half} torch.float16"),
    ]


X_LIKE_DY = [({"x": to(FP32)}, "x must have dtype torch.bfloat16 (that of dy), got torch.float32")]

GLU_ROWS = [
    ({"h": e(6)}, "h must be a 2-D tensor [rows, 2I], got shape [6]"),
    ({"h": to(INT)}, f"h must have dtype {ALL_FLOATS}, got torch.int32"),
    ({"h": e(4, 5)}, "h must have an even number of columns, at least 2, got shape [4, 5]"),
    ({"h": e(4, 0)}, "h must have an even number of columns, at least 2, got shape [4, 0]"),
    ({"act": "relu"}, "act must be silu, gelu or gelu_tanh, got relu"),
    ({"act": ""}, "act must be silu, gelu or gelu_tanh, got "),
    ({"alpha": INF}, "alpha must be finite, got inf"),
    ({"alpha": 1.702, "act": "gelu"}, "alpha must be 1 when act is gelu, got 1.702"),
    ({"limit": 0.0}, "limit must be None or greater than 0, got 0"),
    ({"limit": -7.0}, "limit must be None or greater than 0, got -7"),
    ({"limit": NAN}, "limit must be None or greater than 0, got nan"),
    ({"up_shift": NAN}, "up_shift must be finite, got nan"),
]

TABLE: dict[str, list[tuple[dict, str]]] = {
    "flatten_sort_count": [
        ({"expert_idxs": e(4, dtype=LONG)}, "expert_idxs must be a 2-D tensor [T, top_k], got shape [4]"),
        (
            {"expert_idxs": to(torch.int16)},
            "expert_idxs must have dtype torch.int32 or torch.int64, got torch.int16",
        ),
        (
            {"expert_idxs": to(torch.bool)},
            "expert_idxs must have dtype torch.int32 or torch.int64, got torch.bool",
        ),
        ({"expert_idxs": e(4, 0, dtype=LONG)}, "expert_idxs must have at least 1 column, got shape [4, 0]"),
        (
            {"expert_idxs": torch.zeros(1, 2, dtype=LONG).expand(2**30, 2)},
            "expert_idxs must have at most 2147483647 elements, got 2147483648",
        ),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_experts": 2**24 + 1}, "num_experts must be at most 16777216, got 16777217"),
        ({"num_experts": 2**62}, "num_experts must be at most 16777216, got 4611686018427387904"),
    ],
    "scatter_lora": [
        *routing("x"),
        *X_ROWS,
        ({"x": to(LONG)}, f"x must have dtype {ALL_FLOATS}, got torch.int64"),
        ({"x": to(torch.complex64)}, f"x must have dtype {ALL_FLOATS}, got torch.complex64"),
        *weight("x"),
        *packed_weight("x"),
        ({"x": e(6, 7)}, "x must have 8 columns (K of weight), got shape [6, 7]"),
        *PAIR_ROWS,
        *lora("x"),
        *bias("x"),
        *gates("x"),
        (
            {"x": to(FP32), "weight": to(FP32)},
            "lora_a must have dtype torch.float32 (that of x), got torch.bfloat16",
        ),
        (
            {"x": to(FP64), "weight": to(FP64), "lora_a": to(FP32), "lora_b": to(FP32)},
            "lora_a must have dtype torch.float64 (that of x), got torch.float32",
        ),
    ],
    "scatter_lora_dx": [
        *routing("dy"),
        *DY_ROWS,
        *weight("dy"),
        *packed_weight("dy"),
        ({"dy": e(6, 4)}, "dy must have 5 columns (N of weight), got shape [6, 4]"),
        *PAIR_ROWS,
        *lora("dy"),
        *bias("dy"),
        *gates("dy"),
        *X_ROWS,
        *X_LIKE_DY,
        ({"x": e(6, 7)}, "x must have 8 columns (K of weight), got shape [6, 7]"),
    ],
    "scatter_lora_dab": [
        *(*routing("dy"), *DY_ROWS, *X_ROWS, *X_LIKE_DY, *lora("dy"), *gates("dy")),
        ({"x": e(6, 0), "lora_a": e(3, 4, 0)}, "lora_a must have a K of at least 1, got shape [3, 4, 0]"),
        ({"dy": e(6, 0), "lora_b": e(3, 0, 4)}, "lora_b must have an N of at least 1, got shape [3, 0, 4]"),
    ],
    "scatter_lora_backward": [
        *routing("dy"),
        *DY_ROWS,
        *X_ROWS,
        *X_LIKE_DY,
        *weight("dy"),
        ({"dy": e(6, 4)}, "dy must have 5 columns (N of weight), got shape [6, 4]"),
        ({"x": e(6, 7)}, "x must have 8 columns (K of weight), got shape [6, 7]"),
        *lora("dy"),
        *bias("dy"),
        *gates("dy"),
    ],
    "scatter_lora_dw": [*routing("dy"), *DY_ROWS, *X_ROWS, *X_LIKE_DY, *gates("dy")],
    "scatter_lora_dbias": [*routing("dy"), *DY_ROWS, *gates("dy")],
    "glu": GLU_ROWS,
    "glu_backward": [
        *GLU_ROWS,
        ({"dy": e(4, 6)}, "dy must have shape [4, 3] (the rows and half the columns of h), got [4, 6]"),
        ({"dy": e(3, 3)}, "dy must have shape [4, 3] (the rows and half the columns of h), got [3, 3]"),
        ({"dy": to(FP32)}, "dy must have dtype torch.bfloat16 (that of h), got torch.float32"),
    ],
}
ROWS = [Row(op, change, f"{op}: {message}") for op, rows in TABLE.items() for change, message in rows]


def exactly(message: str) -> str:
    return r"\A" + re.escape(message) + r"(\n|\Z)"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.message)
def test_real(row):
    with pytest.raises(RuntimeError, match=exactly(row.message)):
        row.call()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.message)
def test_fake(row):
    with pytest.raises(RuntimeError, match=exactly(row.message)):
        row.call("meta")


def test_the_rows_start_from_valid_arguments():
    assert set(TABLE) == set(SCHEMAS)
    for op in TABLE:
        Row(op, {}, "").call()
        Row(op, {}, "").call("meta")


OFFSETS = {
    (-1, 4, 12): "expert_offsets must have values in [0, 12], got -1 at position 0",
    (4, 8, 13): "expert_offsets must have values in [0, 12], got 13 at position 2",
    (4, 3, 12): "expert_offsets must be non-decreasing, got 3 after 4 at position 1",
}
SLOTS = {
    -1: "sorted_scattered_idxs must have values in [0, 12), got -1 at position 5",
    12: "sorted_scattered_idxs must have values in [0, 12), got 12 at position 5",
    2**40: "sorted_scattered_idxs must have values in [0, 12), got 1099511627776 at position 5",
}
WITH_CONTENTS = [op for op in SCHEMAS if op.startswith("scatter_lora")]


@pytest.mark.parametrize("op", WITH_CONTENTS)
@pytest.mark.parametrize("values", OFFSETS)
def test_contents_of_expert_offsets(op, values):
    row = Row(op, {"expert_offsets": torch.tensor(values, dtype=INT)}, f"{op}: {OFFSETS[values]}")
    with pytest.raises(RuntimeError, match=exactly(row.message)):
        row.call()


@pytest.mark.parametrize("op", WITH_CONTENTS)
@pytest.mark.parametrize("value", SLOTS)
def test_contents_of_sorted_scattered_idxs(op, value):
    slots = torch.arange(12)
    slots[5] = value
    with pytest.raises(RuntimeError, match=exactly(f"{op}: {SLOTS[value]}")):
        Row(op, {"sorted_scattered_idxs": slots}, "").call()


@pytest.mark.parametrize("op", WITH_CONTENTS)
def test_a_slot_given_twice(op):
    """Another slot is then missing: its row would be left out without a word."""
    slots = torch.arange(12)
    slots[5] = 7
    message = f"{op}: sorted_scattered_idxs must be a permutation of [0, 12), got 7 twice"
    with pytest.raises(RuntimeError, match=exactly(message)):
        Row(op, {"sorted_scattered_idxs": slots}, "").call()


PACKED_DEVICE_ROWS = [
    ("weight", "nf4", "x"),
    (SCALE, "nf4", "weight"),
    (SCALE2, "nvfp4", "weight"),
    (ZERO, "int4", "weight"),
]
DEVICE_ROWS = [
    ("weight", "x"),
    ("sorted_scattered_idxs", "x"),
    ("expert_offsets", "x"),
    ("lora_a", "x"),
    ("bias", "x"),
    ("gates", "x"),
]


@pytest.mark.parametrize(("name", "lead"), DEVICE_ROWS)
def test_devices(name, lead):
    """The dispatcher would send such a call anywhere, so the check is called by itself."""
    args = arguments("scatter_lora")
    args[name] = args[name].to("meta")
    message = f"scatter_lora: {name} must be on device cpu (that of {lead}), got meta"
    with pytest.raises(RuntimeError, match=exactly(message)):
        checks.scatter_lora(ScatterLora(**args))


def packed_on_another_device(name: str, format_name: str) -> ScatterLora:
    args = arguments("scatter_lora") | packed(format_name)
    if name == ZERO:
        args[ZERO] = e(3, 5, 1, dtype=U8)
    args[name] = args[name].to("meta")
    return ScatterLora(**args)


@pytest.mark.parametrize(("name", "format_name", "lead"), PACKED_DEVICE_ROWS)
def test_devices_of_a_packed_weight(name, format_name, lead):
    message = f"scatter_lora: {name} must be on device cpu (that of {lead}), got meta"
    with pytest.raises(RuntimeError, match=exactly(message)):
        checks.scatter_lora(packed_on_another_device(name, format_name))


def test_every_check_has_a_row():
    """Each torch._check of checks.py must be the one that fails for some row above."""
    source = inspect.getsource(checks)
    sites = {
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch._check"
    }
    failed = set()

    def record(call: Callable) -> None:
        with pytest.raises(RuntimeError) as caught:
            call()
        frames = traceback.extract_tb(caught.value.__traceback__)
        failed.update(f.lineno for f in frames if f.filename == checks.__file__)

    for row in ROWS:
        record(lambda row=row: row.call("meta"))
    for name, _ in DEVICE_ROWS:
        args = arguments("scatter_lora")
        args[name] = args[name].to("meta")
        record(lambda args=args: checks.scatter_lora(ScatterLora(**args)))
    for name, format_name, _ in PACKED_DEVICE_ROWS:
        call = packed_on_another_device(name, format_name)
        record(lambda call=call: checks.scatter_lora(call))
    assert sites <= failed, f"checks.py lines without a test: {sorted(sites - failed)}"


MLP_ROWS = {
    "x must be 2-D, got shape [6]": {"x": e(6)},
    "expert_idxs must be 2-D, got shape [6]": {"expert_idxs": e(6, dtype=LONG)},
    "gates must be 2-D, got shape [6]": {"gates": e(6)},
    "gate_up_weight must be 3-D, got shape [10, 8]": {"gate_up_weight": e(10, 8)},
    "down_weight must be 3-D, got shape [8, 5]": {"down_weight": e(8, 5)},
    "expert_idxs must have 6 rows (those of x), got shape [5, 2]": {"expert_idxs": e(5, 2, dtype=LONG)},
    "gates must have shape [6, 2] (that of expert_idxs), got [6, 3]": {"gates": e(6, 3)},
    "gate_up_weight must have shape [E, N, 8] (the columns of x), got [3, 10, 7]": {
        "gate_up_weight": e(3, 10, 7)
    },
    "down_weight must have shape [3, N, 5] (E and I of gate_up_weight, gated is True), got [3, 8, 10]": {
        "down_weight": e(3, 8, 10)
    },
    "down_weight must have shape [3, N, 10] (E and I of gate_up_weight, gated is False), got [3, 8, 5]": {
        "gated": False
    },
    "limit must be None when gated is False, got 7.0": {
        "gated": False, "limit": 7.0, "down_weight": e(3, 8, 10)
    },
    "up_shift must be 0 when activation is given, got 1.0": {"activation": torch.relu, "up_shift": 1.0},
    "act and alpha must be left out when activation is given, got act=silu, alpha=1.702": {
        "activation": torch.relu, "alpha": 1.702
    },
    "interleaved must be False when gated is False, got True": {
        "gated": False, "interleaved": True, "down_weight": e(3, 8, 10)
    },
    "act must be one of silu, gelu, gelu_tanh, relu, relu2 when gated is False, got tanh": {
        "gated": False, "act": "tanh", "down_weight": e(3, 8, 10)
    },
    "alpha must be 1 when act is relu, got 2.0": {
        "gated": False, "act": "relu", "alpha": 2.0, "down_weight": e(3, 8, 10)
    },
}  # fmt: skip


@pytest.mark.parametrize("message", MLP_ROWS)
def test_moe_mlp(message):
    args = {
        "x": e(6, 8), "expert_idxs": e(6, 2, dtype=LONG), "gates": e(6, 2),
        "gate_up_weight": e(3, 10, 8), "down_weight": e(3, 8, 5),
    }  # fmt: skip
    functional.moe_mlp(**args)
    with pytest.raises(RuntimeError, match=exactly(f"moe_mlp: {message}")):
        functional.moe_mlp(**(args | MLP_ROWS[message]))


MODULE_ROWS = {
    "num_experts must be an integer of at least 1, got 0": {"num_experts": 0},
    "hidden_size must be an integer of at least 1, got 2.5": {"hidden_size": 2.5},
    "intermediate_size must be an integer of at least 1, got -3": {"intermediate_size": -3},
    "rank must be an integer of at least 1, got 0": {"rank": 0},
    "rank must be an integer of at least 1, got True": {"rank": True},
    "alpha must be finite, got inf": {"alpha": INF},
    "target must name some of ('gate_up', 'down'), got ('up',)": {"target": "up"},
    "target must name some of ('gate_up', 'down'), got ()": {"target": ()},
}


@pytest.mark.parametrize("message", MODULE_ROWS)
def test_module(message):
    args = {"num_experts": 2, "hidden_size": 4, "intermediate_size": 3} | MODULE_ROWS[message]
    with pytest.raises(ValueError, match=exactly(f"LoRAExperts: {message}")):
        nn.LoRAExperts(**args)
