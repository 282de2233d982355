"""Red until every operator of schemas.py has everything that an operator must have."""

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch

import torch_moelora
from torch_moelora import _C, backends, calls, checks, fake, formats, quantizers, reference, schemas

TESTS = Path(__file__).parent
PACKAGE = Path(torch_moelora.__file__).parent
CSRC = PACKAGE.parent / "csrc"
OPS = list(schemas.SCHEMAS)


def arguments(op: str) -> list[tuple[str, object]]:
    """(name, default) of the schema."""
    schema = getattr(torch.ops.moelora, op).default._schema
    return [
        (a.name, a.default_value if a.has_default_value() else inspect.Parameter.empty)
        for a in schema.arguments
    ]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta", "Autograd"])
def test_kernels(op, key):
    """Meta is the fake; an operator without an Autograd kernel would give wrong zeros instead of an error.

    The CUDA kernels look theirs up in the first call: `test_triton_has_every_operator` sees what they find.
    """
    found = torch._C._dispatch_has_kernel_for_dispatch_key(f"moelora::{op}", key)
    integers_only = op == "flatten_sort_count" and key == "Autograd"
    assert found != integers_only, f"{op} has {'a' if found else 'no'} {key} kernel"


@pytest.mark.parametrize("op", OPS)
def test_schema_is_functional(op):
    schema = getattr(torch.ops.moelora, op).default._schema
    assert not schema.is_mutable
    assert not any(r.alias_info for r in schema.returns)


def test_reference_calls_fakes_and_checks_are_complete():
    assert set(reference.REFERENCE) == set(OPS)
    assert set(fake.FAKES) == set(OPS)
    assert set(calls.CALLS) == set(OPS)
    for op in OPS:
        assert callable(getattr(checks, op))


@pytest.mark.parametrize("op", OPS)
def test_reference_takes_the_schemas_arguments(op):
    parameters = inspect.signature(reference.REFERENCE[op]).parameters.values()
    given = [(p.name, p.default) for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert given == arguments(op)


@pytest.mark.parametrize("op", OPS)
def test_calls_have_the_schemas_arguments(op):
    """In order and with its defaults: the dispatcher leaves out arguments that equal theirs."""
    kind = calls.CALLS[op]
    missing = inspect.Parameter.empty
    assert [(name, kind._field_defaults.get(name, missing)) for name in kind._fields] == arguments(op)


TESTED_WITH = {"glu_backward": "glu"}


@pytest.mark.parametrize("op", OPS)
def test_has_a_test_file(op):
    """Of its own name, or of the operator that it is tested with; and there it is called by name."""
    path = TESTS / f"test_{TESTED_WITH.get(op, op)}.py"
    tree = ast.parse(path.read_text())
    names = {getattr(node, "value", None) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert op in names, f"{path.name} never calls {op}"


def triton_implementations() -> dict[str, ast.FunctionDef]:
    """The functions that triton/register.py lists. From the source: Triton need not be installed."""
    folder = PACKAGE / "triton"
    register = ast.parse((folder / "register.py").read_text())
    nodes = list(ast.walk(register))
    ours = {a.name for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 1 for a in n.names}
    listed = [n for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", None) in ours]
    defined = {
        (path.stem, node.name): node
        for path in folder.glob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    return {node.attr: defined[node.value.id, node.attr] for node in listed}


def test_triton_has_every_operator():
    functions = triton_implementations()
    assert set(functions) == set(OPS)
    for op, function in functions.items():
        (argument,) = function.args.args
        assert ast.unparse(argument.annotation) == calls.CALLS[op].__name__, op


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_what_cuda_calls_find():
    assert set(backends._triton_implementations()) == set(OPS)


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports, "." for its own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." if node.level else node.module.split(".")[0])
    return found


def test_reference_imports_nothing_of_ours():
    assert imports(PACKAGE / "reference.py") <= {"__future__", "math", "torch"}
    assert imports(PACKAGE / "schemas.py") == set()


def test_the_operators_need_only_torch():
    """transformers and peft belong to the model layer; rich is an optional nicety of `python -m
    torch_moelora`.
    """
    for path in PACKAGE.glob("*.py"):
        assert not imports(path) & {"transformers", "peft", "accelerate", "safetensors", "moelora"}, path.name


def test_the_environment_is_read_in_one_place():
    for path in PACKAGE.rglob("*.py"):
        if path.name != "switches.py":
            text = path.read_text()
            assert "environ" not in text and "getenv" not in text, path


FORMATS = list(formats.FORMATS)
PACKED = [name for name in FORMATS if name != "dense"]


def test_every_format_has_its_line_in_the_reference():
    assert list(reference.FORMATS) == PACKED


def test_every_kernel_set_unpacks_every_format():
    """To the same dtypes each; of the sets that this machine can run."""
    report = _C.format_report()
    assert set(report) == set(_C.isa_report()["usable"])
    for isa, found in report.items():
        assert list(found) == PACKED, isa
        for name, dtypes in found.items():
            assert "bf16" in dtypes and dtypes == found[PACKED[0]], f"{isa} unpacks {name} to {dtypes}"


@pytest.mark.parametrize("kind", ["Code", "ScaleType"])
def test_every_kind_of_code_and_scale_can_be_read(kind):
    """Also by the sets that this machine cannot run: the same lines fill all of them."""
    if not CSRC.exists():
        pytest.skip("an installed package has no sources")
    (kinds,) = re.findall(rf"enum class {kind} : uint8_t {{(.*?)}}", (CSRC / "core" / "codes.h").read_text())
    source = (CSRC / "ukernel" / "unpack.inl").read_text()
    filled = re.findall(rf"\bat\({kind}::(\w+)\) =", source)
    assert filled == kinds.replace(" ", "").split(",")


@pytest.mark.parametrize("name", PACKED)
def test_every_format_can_be_quantized(name):
    """By a rounding of quantizers.py, to a weight that the reference reads as `dequantize` does."""
    row = formats.FORMATS[name]
    assert row.rounding in vars(quantizers).values()
    weight = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0))
    packed = formats.quantize(weight, name)
    dense = packed.dequantize(torch.float32)
    assert packed.format == name and (dense - weight).norm() < 0.2 * weight.norm()
    assert torch.equal(dense, reference.dense_weight(*packed.operands().values(), torch.float32))


def names_in_triton(function: str) -> set[str]:
    """The formats that a function of triton/unpack.py compares with."""
    tree = ast.parse((PACKAGE / "triton" / "unpack.py").read_text())
    (found,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    compared = [c for n in ast.walk(found) if isinstance(n, ast.Compare) for c in n.comparators]
    return {c.value for c in compared if isinstance(c, ast.Constant)} & set(PACKED)


@pytest.mark.parametrize("name", PACKED)
def test_every_format_has_a_branch_in_triton(name):
    """In `code_value`, whatever it is, which ends with an assertion for unknown ones; in the others where
    their last branch, for numbers as scales and nibbles with the low one first, would be wrong.
    """
    row = formats.FORMATS[name]
    assert name in names_in_triton("code_value")
    plain_scales = {torch.float32, torch.bfloat16, torch.float16}
    assert (name in names_in_triton("scale_value")) == (not plain_scales.issuperset(row.scale_dtypes))
    assert (name in names_in_triton("codes_tile")) == (row.per_byte == 1 or row.high_first)
    assert (name in names_in_triton("unpack_experts")) == bool(row.zero)


def test_the_compiled_operators_have_the_same_formats():
    header = CSRC / "formats" / "formats.h"
    if not header.exists():
        pytest.skip("an installed package has no sources")
    assert re.findall(r'\.name = "(\w+)"', header.read_text()) == FORMATS


def test_nothing_else_lists_the_formats():
    """A file that names all of them is a second table."""
    allowed = {"formats.py", "reference.py", "unpack.py"}
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if path.name not in allowed:
            assert not all(f'"{name}"' in text for name in PACKED), path
