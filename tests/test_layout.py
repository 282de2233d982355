"""The fences of the source tree: what each folder may include, and sizes."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"

# ops → driver → dispatch → {ukernel, formats} → core; bindings see all but ops. Of the two below
# dispatch, ops see the table of formats, which their checks of a weight are made from, and no kernels.
MAY_INCLUDE = {
    "core": set(),
    "ukernel": {"core"},
    "formats": {"core", "ukernel"},
    "dispatch": {"core", "ukernel", "formats"},
    "driver": {"core", "ukernel", "formats", "dispatch"},
    "ops": {"core", "formats", "dispatch", "driver"},
    "bindings": {"core", "ukernel", "formats", "dispatch", "driver"},
}
# A word in a folder's code → the only folders that may have it.
CONFINED = {
    r"#include [<\"](torch|ATen|c10)/": {"ops"},
    r"#include [<\"]pybind11/": {"bindings"},
    r"#include <\w*intrin\.h>": {"ukernel"},
    r"\b_mm\d*_\w+": {"ukernel"},
    r"\bgetenv\b": {"dispatch"},
    r"\bstd::(thread|jthread|mutex)\b": {"bindings"},
    r"\b(std::)?(printf|puts|cout|cerr)\b": set(),
}
NATIVE = sorted(p for p in CSRC.rglob("*") if p.suffix in (".cpp", ".h", ".inl"))
PYTHON = sorted(
    p for folder in ("torch_moelora", "python", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def folder(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


def code(path: Path) -> str:
    """Without comments."""
    return re.sub(r"//.*|/\*.*?\*/", "", path.read_text(), flags=re.MULTILINE)


def test_every_folder_has_its_fence():
    assert {p.name for p in CSRC.iterdir() if p.is_dir()} == set(MAY_INCLUDE)
    for folder_name in MAY_INCLUDE:
        assert (CSRC / folder_name / "README.md").read_text().strip(), folder_name


@pytest.mark.parametrize("path", NATIVE, ids=name)
def test_includes(path):
    """Only downwards, and always by the path from csrc."""
    here = folder(path)
    for included in re.findall(r'#include "([^"]+)"', code(path)):
        assert (CSRC / included).exists(), f"{included} is not a path from csrc"
        assert included.split("/")[0] in MAY_INCLUDE[here] | {here}, f"{here} may not include {included}"


@pytest.mark.parametrize("path", NATIVE, ids=name)
def test_confined(path):
    for pattern, allowed in CONFINED.items():
        if folder(path) not in allowed:
            assert not (found := re.search(pattern, code(path))), f"{found.group()} is not for {folder(path)}"


def test_instruction_set_units_use_no_library():
    """Inline functions of a library, compiled with wider flags, could be the copy that the linker keeps."""
    for path in (CSRC / "ukernel").iterdir():
        if path in NATIVE:
            found = set(re.findall(r"#include <([^>]+)>", code(path)))
            assert found <= {"immintrin.h", "cstdint"}, name(path)
            assert not re.search(r"\bstd::", code(path)), name(path)


def test_machine_flags_are_in_cmake_alone():
    flag = re.compile(r"-m(arch|tune|cpu|sse|avx|amx|fma|f16c|bmi)|#pragma \w+ target|\btarget\s*\(\s*\"")
    others = [*NATIVE, *(p for p in PYTHON if "tests" not in p.parts), ROOT / "setup.py", ROOT / "Makefile"]
    assert flag.search((ROOT / "CMakeLists.txt").read_text())
    for path in others:
        assert not (found := flag.search(path.read_text())), f"{name(path)}: {found.group()}"


# How a weight is stored, the files of the drivers that ask for it, and all others.
STORED = re.compile(r"\.(packed|numbers|turned)\b|\b(is_packed|bits_of)\(")
DOOR = [
    CSRC / "driver" / file
    for file in ("weight_tiles.h", "weight_tiles.cpp", "packed_rows.h", "packed_rows.cpp")
]
LOOPS = [path for path in NATIVE if folder(path) == "driver" and path not in DOOR]
CONTRACTION = [path for path in LOOPS if re.search(r"_orientation$|^grouped$|^next_region$", path.stem)]


@pytest.mark.parametrize("path", LOOPS, ids=name)
def test_loops_do_not_know_how_a_weight_is_stored(path):
    """They ask WeightTiles; where weights are multiplied, of no operand but the bias by its strides."""
    assert not (found := STORED.search(code(path))), f"{found.group()} is for weight_tiles.h"
    strides = re.findall(r"([\w.]+)\.(?:row|col|expert)_stride\b", code(path))
    assert path not in CONTRACTION or set(strides) <= {"op.bias"}, f"strides of {strides}"


def test_weights_are_asked_for_at_the_door():
    assert all(path in NATIVE for path in DOOR) and len(CONTRACTION) >= 6
    assert STORED.search("".join(map(code, DOOR)))


@pytest.mark.parametrize("path", [*NATIVE, *PYTHON], ids=name)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_functions_stay_short(path):
    """Kernels, which Triton compiles as one function, may be twice as long."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
            lines = node.end_lineno - node.lineno + 1
            assert lines <= (120 if kernel else 60), f"{node.name} has {lines} lines"


# Comments, strings and preprocessor lines: their braces are none.
NO_CODE = re.compile(
    r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'|//[^\n]*|/\*.*?\*/|^ *#(?:[^\n]*\\\n)*[^\n]*',
    re.DOTALL | re.MULTILINE,
)
MEMBER_INITIALIZER = re.compile(r"([:,]\s*\w+)\{([^{};]*)\}(?=\s*[,{])")
SCOPE = re.compile(r"\b(namespace|class|struct|union|extern)\b[^()]*$")
LABELS = re.compile(r"(\s*(public|private|protected):)*\s*")


def native_functions(text: str) -> list[tuple[str, int]]:
    """(first line, number of lines) of every function, members too. What is inside of one, such as a lambda,
    is part of it.
    """
    text = NO_CODE.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)
    text = MEMBER_INITIALIZER.sub(r"\1(\2)", text)
    found, first, depth, start = [], None, 0, 0
    for mark in re.finditer(r"[{};]", text):
        head = text[start : mark.start()]
        if mark.group() == "{" and first is None and "(" in head and not SCOPE.search(head):
            first = start + LABELS.match(head).end()
        if first is not None and mark.group() != ";":
            depth += 1 if mark.group() == "{" else -1
            if depth == 0:
                lines = text[first : mark.end()].splitlines()
                found.append((lines[0], len(lines)))
                first = None
        start = mark.end()
    return found


def test_members_are_functions_too():
    text = """
namespace n {
// A brace in a comment: {
#define OPEN {
struct S : public Base {
 public:
  explicit S(int n)
      : a_{n},
        b_(n) {
    if (n) start();
  }
  int get() const { return '{'; }
  template <class T>
  auto later(T t) -> decltype(t()) {
    return [&] {
      return "}";
    };
  }
  int a_ = int{1}, b_;
};
int table[] = {1, 2};
extern "C" void free_one(void) {
}
}
"""
    assert native_functions(text) == [
        ("explicit S(int n)", 5),
        ("int get() const { return    ; }", 1),
        ("template <class T>", 6),
        ("extern     void free_one(void) {", 2),
    ]


@pytest.mark.parametrize("path", NATIVE, ids=name)
def test_native_functions_stay_short(path):
    limit = 120 if folder(path) == "ukernel" else 60
    for first, lines in native_functions(path.read_text()):
        assert lines <= limit, f"{first} … has {lines} lines"


def test_the_model_library_knows_no_command_line():
    """moelora's modules import nothing of moelora.commands; `python -m moelora` alone does."""
    library = ROOT / "python" / "moelora"
    assert (library / "commands" / "__init__.py").exists()
    modules = [path for path in library.rglob("*.py") if library / "commands" not in path.parents]
    assert {library / "placement", library / "placement" / "beside"} <= {path.parent for path in modules}
    for path in modules:
        if path == library / "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)]
            found = [f"{getattr(node, 'module', None) or ''}.{name}" for name in names]
            assert not any("commands" in name.split(".") for name in found), f"{name(path)}: {found}"
            assert not getattr(node, "level", 0), f"{name(path)} imports by a relative path"
