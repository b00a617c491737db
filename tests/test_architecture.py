"""The house as it is drawn: imports point one way, also inside functions, and a fact about a method stands once."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fs_fwdllm.config.methods import METHODS

PACKAGE = Path(__file__).resolve().parents[1] / "fs_fwdllm"

#: The rooms from the ground up; a module imports from its own room or from those below.
FLOORS = (
    ("errors", "_version"),
    ("core",),
    ("config",),
    ("data",),
    ("model",),
    ("estimator", "evaluation", "guard"),
    ("method",),
    ("report",),
    ("inference",),
    ("running",),
    ("forecast",),
    ("profiler", "sweep"),
    ("host",),
    ("cli",),
    ("__init__", "__main__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name, parsed."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


MODULES = modules()


def imports_of(name: str) -> Iterator[str]:
    """The modules of ours that a module imports anywhere, also inside functions and for type checking only."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fs_fwdllm")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fs_fwdllm":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in MODULES} <= set(FLOOR_OF)


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_points_up(module: str) -> None:
    """A name that is only needed for type checking may come from the module's own room alone, like any other."""
    own = FLOOR_OF[room_of(module)]
    upward = [target for target in imports_of(module) if FLOOR_OF[room_of(target)] > own]
    beside = [
        target
        for target in imports_of(module)
        if FLOOR_OF[room_of(target)] == own and room_of(target) != room_of(module)
    ]
    assert not upward and not beside


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: set(imports_of(name)) - {name} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


#: Words of ``federate.method`` and ``trainer.type``, and names of methods. ``fwdllm`` is also our section's name.
WORDS = {word for name in METHODS for spelling in METHODS[name].spellings for word in spelling} | set(METHODS)
SPELLED = re.compile(rf"\b({'|'.join(sorted(WORDS - {'', 'general', 'fwdllm'}))})\b", re.IGNORECASE)

#: Words of the hosts' own, which happen to be spelt like a method.
OF_THE_HOSTS = {
    ("fs_fwdllm.host.fedml.settings", "FedAvg"),  # the default of FedML's federated_optimizer
    ("fs_fwdllm.host.fedml.translation", "FedAvg"),  # the only federated_optimizer our methods run under
    ("fs_fwdllm.host.federatedscope.settings", "fedavg"),  # FederatedScope's aggregator.robust_rule
    ("fs_fwdllm.host.federatedscope.settings", ": our servers aggregate scalars; allowed is 'fedavg'"),
}


def literals_of(name: str) -> Iterator[str]:
    """The strings in a module's code: what it compares with, prints and looks up, not what it explains."""
    tree = MODULES[name]
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


@pytest.mark.parametrize("module", [name for name in MODULES if name != "fs_fwdllm.config.methods"])
def test_a_method_or_trainer_is_spelt_in_the_table_alone(module: str) -> None:
    exempt = {word for owner, word in OF_THE_HOSTS if owner == module}
    # Paths of modules, as the table of recipes and forecasts have them, name rooms and not methods.
    found = [text for text in literals_of(module) if SPELLED.search(text) and text not in exempt | {module}]
    assert [text for text in found if not re.fullmatch(r"fs_fwdllm(\.\w+)+(:\w+)?", text)] == []


def test_the_search_for_spellings_finds_some() -> None:
    assert any(SPELLED.search(text) for text in literals_of("fs_fwdllm.config.methods"))


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name) in ("core", "config", "errors")])
def test_the_core_and_the_configuration_load_without_torch(module: str) -> None:
    """At load time; the one module for tensors is imported by whoever holds one."""
    if module == "fs_fwdllm.core.torch_arrays":
        return
    loaded = [node for node in MODULES[module].body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in loaded if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in loaded if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {"torch", "transformers", "peft"}


#: Attributes of objects that are not ours, for which their packages have no public word.
OF_THIRD_PARTIES = {
    "_attn_implementation",  # the attention kernel that transformers chose for a model
    "_forward_pre_hooks",  # whether anything hooks a torch module
    "_replace",  # of named tuples, where the underscore keeps fields apart from methods
    "_asdict",
}


def private_names(path: Path) -> list[str]:
    """Names with an underscore that a file takes from somebody else."""
    found = []
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    # Outside of a class, self is the first argument of a function that a test puts in the place of a method.
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    own = {id(node) for owner in classes for node in ast.walk(owner)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fs_fwdllm"):
            found += [alias.name for alias in node.names if _is_private(alias.name)]
        elif isinstance(node, ast.Attribute) and _is_private(node.attr):
            trusted = ("self", "cls", "os", "sys") if id(node) in own else ("os", "sys")
            if not (isinstance(node.value, ast.Name) and node.value.id in trusted):
                found.append(f"{ast.unparse(node)} (line {node.lineno})")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):  # setattr, monkeypatch.setattr
            names = [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            found += [f"{name} (line {node.lineno})" for name in names if _is_private(name)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += re.findall(r"^fs_fwdllm[\w.]*\._(?!_)\w+$", node.value)
    return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in OF_THIRD_PARTIES


OUTSIDE = [
    path for room in ("tests", "benchmarks", "examples", "docs") for path in (PACKAGE.parent / room).rglob("*.py")
]


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_nobody_outside_calls_a_private_name(path: Path) -> None:
    assert private_names(path) == []
