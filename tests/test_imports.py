"""Imports flow downward only, and importing the package stays cheap: read from the source with `ast`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pisa_dist

pytestmark = pytest.mark.timeout(300)

PACKAGE = Path(pisa_dist.__file__).parent

# Lowest first. A module may import from lower layers, and from the siblings that its own name stands for (a package's
# entry covers all modules in it). A new module needs a place here; one in `algorithms/`, `data/` or `models/` has it.
LAYERS = (
    ("checks",),
    ("admm",),
    ("consensus", "distributed", "faults", "robust", "sharding"),
    ("compression", "slots"),
    ("local", "rounds"),
    ("communication", "overlap"),
    ("optim_worker",),
    ("optim_base", "optim_local"),
    ("optim",),
    ("",),  # pisa_dist itself, which offers the optimizers
    ("data", "guards", "progress", "tracking"),
    ("clock", "metrics", "minibatches", "models", "participation"),
    ("algorithms",),
    ("gradients", "state"),
    ("schedule", "vectorize"),
    ("exchange",),
    ("trainer",),
    ("snapshot", "checksums", "figures", "preemption"),
    ("checkpoint", "seeds"),
    ("report", "rundir"),
    ("schema",),
    ("runner",),
    ("train",),
    ("benchmark",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# The optimizer a user drops into a loop stands beside the trainer's stack: neither is built on the other.
BESIDE = {"optim", "optim_base", "optim_local", "optim_worker", "overlap", "local", "rounds", "slots", "communication"}
OFFERS_THEM = {"", "optim", "optim_base", "optim_local", "optim_worker", "overlap", "local", "rounds"}

NEVER_AT_START = ("torchvision", "wandb", "tensorboard", "transformers", "timm", "matplotlib", "sklearn", "scipy")


def sources() -> list[Path]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 30
    return files


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def element(module: str) -> str:
    """The name under which a module of the package stands in `LAYERS`: its first part below the package."""
    return module.removeprefix("pisa_dist").removeprefix(".").split(".")[0]


def imports(tree: ast.AST, *, in_functions: bool = True) -> Iterator[tuple[str, int]]:
    """(module, line) of every import; that of `from package import module` is the module. Skips TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((imported_module(node.module or "", alias.name), node.lineno) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        elif in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, in_functions=in_functions)


def imported_module(module: str, name: str) -> str:
    path = PACKAGE.parent.joinpath(*module.split("."), name)
    return f"{module}.{name}" if path.is_dir() or path.with_suffix(".py").is_file() else module


def is_package(imported: str, name: str) -> bool:
    return imported == name or imported.startswith(f"{name}.")


def refusal(importer: str, imported: str) -> str | None:
    """Why one module of the package may not import another; None where it may."""
    own, other = element(importer), element(imported)
    for module, name in ((importer, own), (imported, other)):
        if name not in LEVEL:
            return f"{module} has no place in LAYERS"
    if other in BESIDE and own not in OFFERS_THEM:
        return f"{importer} imports {imported}: the optimizers stand beside the trainer"
    if own != other and LEVEL[other] >= LEVEL[own]:
        return f"{importer} imports {imported}, which does not lie below it"
    return None


def test_every_module_has_a_layer_and_imports_only_from_lower_ones() -> None:
    problems = []
    for file in sources():
        for imported, line in imports(ast.parse(file.read_text())):
            problem = refusal(module_name(file), imported) if is_package(imported, "pisa_dist") else None
            if problem:
                problems.append(f"{file.name}:{line}: {problem}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("pisa_dist.admm.updates", "pisa_dist.consensus"),
        ("pisa_dist.data.splits", "pisa_dist.trainer"),
        ("pisa_dist.consensus", "pisa_dist.distributed"),
        ("pisa_dist.trainer", "pisa_dist.optim"),
        ("pisa_dist.newcomer", "pisa_dist.checks"),
        ("pisa_dist.train", "pisa_dist.newcomer"),
        ("pisa_dist.checks", "pisa_dist"),
    ],
)
def test_an_import_upward_or_of_an_unlisted_module_is_refused(importer: str, imported: str) -> None:
    assert refusal(importer, imported)


def test_every_layer_named_here_exists() -> None:
    assert {element(module_name(file)) for file in sources()} == set(LEVEL)


def test_the_equations_import_torch_the_standard_library_and_checks_alone() -> None:
    allowed = sys.stdlib_module_names | {"torch"}
    files = [file for file in sources() if element(module_name(file)) == "admm"]
    assert len(files) >= 5
    for file in files:
        for imported, line in imports(ast.parse(file.read_text())):
            own = is_package(imported, "pisa_dist.admm") or is_package(imported, "pisa_dist.checks")
            assert own or imported.split(".")[0] in allowed, f"{file.name}:{line} imports {imported}"
            assert not is_package(imported, "torch.distributed"), f"{file.name}:{line} imports {imported}"


def test_hydra_is_imported_by_the_command_line_alone() -> None:
    importers = {
        module_name(file)
        for file in sources()
        for imported, _ in imports(ast.parse(file.read_text()))
        if is_package(imported, "hydra")
    }
    assert importers == {"pisa_dist.train"}


def test_slow_or_optional_packages_are_imported_only_inside_functions() -> None:
    for file in sources():
        for imported, line in imports(ast.parse(file.read_text()), in_functions=False):
            slow = [name for name in NEVER_AT_START if is_package(imported, name)]
            assert not slow, f"{file.name}:{line} imports {imported} at module level"
            assert not is_package(imported, "torch.utils.tensorboard"), f"{file.name}:{line}"


def test_a_lazy_import_does_not_hide_at_module_level() -> None:
    tree = ast.parse("try:\n    import wandb\nexcept ImportError:\n    wandb = None\ndef f():\n    import timm\n")
    assert [name for name, _ in imports(tree, in_functions=False)] == ["wandb"]
    assert [name for name, _ in imports(tree)] == ["wandb", "timm"]


def test_importing_the_package_loads_neither_hydra_nor_plotting_nor_trackers(tmp_path: Path) -> None:
    unwanted = ("hydra", "omegaconf", "sklearn", "scipy", "matplotlib", "wandb", "tensorboard", "torchvision", "rich")
    code = f"import sys, pisa_dist; print(pisa_dist.SISA.__name__, [m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "SISA []"), done.stderr


def undocumented(tree: ast.Module) -> Iterator[str]:
    """Public modules, classes, functions and methods without a docstring; a `noqa: D102` needs a documented base."""
    if not ast.get_docstring(tree):
        yield "the module"
    nodes: list[tuple[str, ast.AST]] = [("", tree)]
    while nodes:
        prefix, parent = nodes.pop()
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                if node.name.startswith("_"):
                    continue
                if not ast.get_docstring(node):
                    yield f"{prefix}{node.name}"
                if isinstance(node, ast.ClassDef):
                    nodes.append((f"{prefix}{node.name}.", node))


def overrides_a_documented_method(module: str, dotted: str) -> bool:
    owner, _, name = dotted.rpartition(".")
    kind = getattr(sys.modules.get(module), owner, None)
    return any(getattr(vars(base).get(name), "__doc__", None) for base in getattr(kind, "__mro__", ())[1:])


def test_every_public_name_has_a_docstring_of_its_own_or_of_the_method_that_it_overrides() -> None:
    import pisa_dist.algorithms  # noqa: F401 - so that the classes of the methods can be looked up

    missing = [
        f"{file.relative_to(PACKAGE)}: {name}"
        for file in sources()
        for name in undocumented(ast.parse(file.read_text()))
        if not overrides_a_documented_method(module_name(file), name)
    ]
    assert not missing, "\n".join(missing)


def test_a_missing_docstring_is_found_in_a_class_and_in_its_methods() -> None:
    tree = ast.parse(
        '"""Module."""\nclass A:\n    """A."""\n    def f(self): ...\n    def _g(self): ...\ndef h(): ...\n'
    )
    assert sorted(undocumented(tree)) == ["A.f", "h"]


def test_no_file_exceeds_400_lines() -> None:
    lengths = {file.name: len(file.read_text().splitlines()) for file in sources()}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_no_module_asserts() -> None:
    found = [
        f"{file.name}:{node.lineno}"
        for file in sources()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert not found
