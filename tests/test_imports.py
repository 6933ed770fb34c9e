"""Imports flow one way, the core needs torch and NumPy only, and importing csdiv is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import csdiv

PACKAGE = Path(csdiv.__file__).parent
FOLDERS = ("kernels", "bench", "studies")
"""Packages of csdiv that stand beside its folder in the repository; links in it lead there."""
LAYERS = {
    "__main__": {"cli"},
    "cli": {"models", "studies", "nn", "functional", "mixture", "backends", "bench"},
    "bench": {"models", "nn", "testing", "kernels", "_C"},
    "studies": {"models", "nn"},
    "models": {"nn", "distances", "functional", "mixture"},
    "testing": {"functional", "mixture", "reference"},
    "nn": {"checks", "functional", "mixture"},
    "weightings": {"pairs", "mixture", "checks", "shapes", "transforms", "reference", "weights"},
    "distances": {"checks", "covariances", "functional", "mixture", "pairs", "reference", "shapes"},
    "functional": {"backends", "checks", "mixture", "pairs", "reference", "transforms", "weights"},
    "pairs": {
        "autograd",
        "backends",
        "checks",
        "conversions",
        "covariances",
        "mixture",
        "operators",
        "reference",
        "shapes",
        "weights",
    },
    "weights": {"mixture", "transforms"},
    "mixture": {"checks", "conversions", "samples", "sampling", "shapes", "transforms", "trees"},
    "trees": set(),
    "conversions": {"checks", "covariances", "shapes"},
    "covariances": {"reference", "shapes", "transforms"},
    "checks": {"transforms"},
    "autograd": {"backends", "operators", "ops", "shapes", "transforms"},
    "ops": {"backends", "channels", "operators", "shapes", "transforms"},
    "channels": {"backends", "operators", "reference", "shapes"},
    "backends": {"_C", "kernels", "operators", "reference", "shapes", "transforms"},
    "sampling": {"checks", "covariances"},
    "samples": {"checks", "shapes", "transforms"},
    "operators": set(),
    "kernels": set(),
    "reference": {"transforms", "shapes"},
    "transforms": set(),
    "process": set(),
    "shapes": set(),
}
"""What each module may import of csdiv, itself aside: models → nn → functional → mixture, autograd → ops → backends →
{kernels, _C, reference}. ``pairs``, below functional, checks names and calls the specification directly for full
covariances."""
LAZY = {"mixture": {"functional"}}
"""What may be imported inside a function only."""
OPTIONAL = {"conversions": {"sklearn"}}
"""What a function imports that nothing else needs."""
FACE = {"models", "studies", "bench", "cli"}
"""Modules that may take names from csdiv itself, as a user does."""
CORE = set(LAYERS) - FACE - {"__main__"}
LOADED = {"autograd", "backends", "channels", "checks", "conversions", "functional", "kernels", "mixture", "nn"}
LOADED |= {
    "covariances",
    "operators",
    "ops",
    "pairs",
    "process",
    "reference",
    "samples",
    "sampling",
    "shapes",
    "transforms",
    "trees",
    "weights",
}
"""What csdiv.nn and csdiv.cs_divergence load of csdiv. csdiv._C is loaded when a backend needs it."""
MOST_LOADED = 27
"""Modules; there were 20 when this was written."""
STANDARD = set(sys.stdlib_module_names)


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def sources() -> list[Path]:
    """Every module but csdiv itself. Links are followed here: rglob differs between versions of Python."""
    found = set(PACKAGE.rglob("*.py")).union(*((PACKAGE / folder).glob("*.py") for folder in FOLDERS))
    return sorted(found - {PACKAGE / "__init__.py"})


def imported(tree: ast.AST, path: Path) -> list[tuple[str, bool]]:
    """Every imported module, absolute and dotted, and whether the import stands inside a function."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, inside: bool) -> None:
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                assert node.level == 1 and module_of(path) == "bench", f"relative import in {path}"  # noqa: PT018
                base = f"csdiv.bench.{base}".rstrip(".")
            # "from csdiv import a" may name a module; "from csdiv.a import b" is of csdiv.a
            packages = ("csdiv", *(f"csdiv.{folder}" for folder in FOLDERS))
            names = [f"{base}.{alias.name}" for alias in node.names] if base in packages else [base]
            found.extend((name, inside) for name in names)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


def test_every_module_has_a_layer() -> None:
    assert {module_of(path) for path in sources()} == set(LAYERS)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    layer = module_of(path)
    public = set(csdiv.__all__) - set(LAYERS)
    for name, inside in imported(ast.parse(path.read_text()), path):
        if name.split(".")[0] != "csdiv" or name == "csdiv":
            continue
        target = name.split(".")[1]
        if target in public or target.startswith("__"):
            assert layer in FACE, f"{layer} imports {name}"
            continue
        allowed = LAYERS[layer] | {layer} | (LAZY.get(layer, set()) if inside else set())
        assert target in allowed, f"{layer} imports {name}"


@pytest.mark.parametrize(
    "path", [p for p in sources() if module_of(p) in CORE], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_core_needs_torch_and_numpy_only(path: Path) -> None:
    for name, inside in imported(ast.parse(path.read_text()), path):
        optional = OPTIONAL.get(module_of(path), set()) if inside else set()
        needed = {"triton"} if module_of(path) == "kernels" else {"numpy"}
        assert name.split(".")[0] in STANDARD | {"torch", "csdiv"} | needed | optional, f"{path.name} imports {name}"


def flow(graph: dict[str, set[str]]) -> list[str]:
    """The modules in an order in which each stands after those that it imports."""
    order: list[str] = []
    remaining = {name: targets & set(graph) for name, targets in graph.items()}
    while remaining:
        free = [name for name, targets in remaining.items() if targets <= set(order)]
        assert free, f"a cycle among {sorted(remaining)}"
        order += free
        remaining = {name: targets for name, targets in remaining.items() if name not in free}
    return order


@pytest.mark.parametrize("folder", FOLDERS)
def test_modules_have_no_cycle(folder: str) -> None:
    """Imports inside functions included."""
    paths = [path for path in sources() if module_of(path) == folder and path.stem != "__init__"]
    graph = {
        f"csdiv.{folder}.{path.stem}": {name for name, _ in imported(ast.parse(path.read_text()), path)}
        for path in paths
    }
    assert sum(len(targets & set(graph)) for targets in graph.values()) >= len(graph) - 1  # they are found at all
    assert set(flow(graph)) == set(graph)


def test_a_cycle_is_found() -> None:
    with pytest.raises(AssertionError, match=r"a cycle among \['a', 'b'\]"):
        flow({"a": {"b"}, "b": {"a", "c"}, "c": {"d"}})


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_functions_that_triton_does_not_compile_are_annotated(path: Path) -> None:
    """mypy does not ask for it in kernels/, as it cannot tell the two."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg != "self"]
            assert node.returns is not None, node.name
            assert not untyped, node.name


def test_layers_have_no_cycle() -> None:
    order = flow(LAYERS)
    assert order.index("reference") < order.index("backends") < order.index("functional") < order.index("models")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def test_import_loads_nothing_heavy() -> None:
    heavy = ("triton", "lightning", "sklearn", "scipy", "matplotlib", "pandas", "tensorboard")
    load = "import csdiv; csdiv.nn, csdiv.cs_divergence, csdiv.backend_status"
    code = f"import torch, sys; before = set(sys.modules); {load}; print(*set(sys.modules) - before)"
    new = {name.split(".")[0] for name in run(code).split()}
    assert "csdiv" in new
    assert not new & set(heavy)


def test_import_takes_little_beside_torch() -> None:
    """Few modules, all of them csdiv's own: seconds would be those of the machine."""
    load = "import csdiv; csdiv.nn, csdiv.cs_divergence"
    new = run(f"import torch, sys; before = set(sys.modules); {load}; print(*set(sys.modules) - before)").split()
    assert {name for name in new if name != "csdiv" and not name.startswith("csdiv.")} == set()
    assert {name.split(".")[1] for name in new if name != "csdiv"} == LOADED
    assert len(new) <= MOST_LOADED


def test_help_does_not_wait_for_torch() -> None:
    """Promised are 2 s; torch alone takes more on a slow machine."""
    pytest.importorskip("typer")
    code = (
        "import sys; from csdiv.cli import app; app()(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    assert run(code).split()[-1] == "False"


def test_names_are_found_when_they_are_used() -> None:
    assert run("from csdiv import *; print(nn.__name__, log_overlap.__name__)") == "csdiv.nn log_overlap\n"
    assert set(csdiv.__all__) <= set(dir(csdiv))
    for name in csdiv.__all__:
        assert getattr(csdiv, name) is getattr(csdiv, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        csdiv.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        csdiv.models.nothing  # noqa: B018
