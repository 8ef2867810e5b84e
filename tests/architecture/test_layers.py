"""Imports point one way: common <- kernels <- kvstore <- services, common <- gateway, common <- loadgen."""

import ast
import graphlib
import sys

import pytest

from services.launcher.commands import COMMANDS
from tests.architecture.tree import MODULES, imports, parsed

BASE, WIRE, BRAIN = {"common"}, {"common.messages"}, {"common.policy", "common.cost"}
FAULTS = {"common.faults"}  # what shells ask, where something may go wrong on purpose
SHELL = {"common.net"}  # sockets and Redis: never inside PURE
STORE = {"kvstore", "kvstore.index", "kvstore.handover"}

# A module belongs to its most specific prefix. It may import its own prefix and these.
MAY_IMPORT: dict[str, set[str]] = {
    "common": set(),
    "common.messages": BASE | {"common.cost"},
    "common.cost": BASE,
    "common.policy": BASE | {"common.cost"},
    "common.faults": BASE | WIRE,
    "common.net": BASE | WIRE | FAULTS,
    "kernels": BASE,
    "kvstore.index": BASE | WIRE | BRAIN,
    "kvstore.handover": BASE | WIRE | BRAIN | {"kvstore.index"},
    "kvstore": BASE | WIRE | BRAIN | SHELL | FAULTS | STORE | {"kernels"},
    "kvstore.server.core": BASE | WIRE | BRAIN | {"kvstore.index"},
    "kvstore.server": BASE | WIRE | BRAIN | SHELL | FAULTS | STORE | {"kvstore.server.core"},
    "services": set(),
    "services.worker.core": BASE | WIRE | BRAIN | {"kvstore.index", "kvstore.handover"},
    "services.worker": BASE | WIRE | BRAIN | SHELL | FAULTS | STORE | {"kernels", "services.worker.core"},
    "services.launcher": BASE | SHELL,
    "gateway.core": BASE | WIRE | BRAIN,
    "gateway": BASE | WIRE | BRAIN | SHELL | FAULTS | {"gateway.core"},
    "loadgen": BASE | {"common.cost"},
}
PURE = {
    "common.messages",
    "common.cost",
    "common.faults",
    "common.policy",
    "kvstore.index",
    "kvstore.handover",
    "kvstore.server.core",
    "services.worker.core",
    "gateway.core",
}
BANNED_IN_PURE = {
    *("asyncio", "logging", "os", "random", "redis", "secrets", "signal", "socket", "subprocess"),
    *("threading", "time", "torch", "zmq"),
}
MAY_READ_THE_ENVIRONMENT = {
    "services.launcher.cli": "the entry point of the program",
    "services.launcher.up": "passes its environment on to its children",
    "services.launcher.status": "a command's entry",
    "services.launcher.doctor": "a command's entry",
    "gateway.process": "OpenTelemetry is set by its own variables",
}


def owner(module: str) -> str | None:
    found = [prefix for prefix in MAY_IMPORT if module == prefix or module.startswith(f"{prefix}.")]
    return max(found, key=len, default=None)


def reached(module: str) -> dict[str, str]:
    """Everything that importing `module` imports -> who imports it. Parents of a package count."""
    seen: dict[str, str] = {module: ""}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        for name in imports(MODULES[current], lazy=False):
            if name not in seen:
                seen[name] = current
                if name in MODULES:
                    waiting.append(name)
    return seen


def test_imports_follow_the_table() -> None:
    wrong: list[str] = []
    for module, path in MODULES.items():
        here = owner(module)
        assert here is not None, f"{module} has no row in MAY_IMPORT"
        allowed = {None, here} | MAY_IMPORT[here]
        wrong += [f"{module} ({here}) may not import {name}" for name in imports(path) if owner(name) not in allowed]
    assert not wrong, "\n".join(wrong)


def test_the_load_generators_numbers_know_nothing_of_how_they_are_shown() -> None:
    inner, shell = ("loadgen.results.", "loadgen.stats."), ("loadgen.output", "loadgen.commands", "loadgen.flags")
    wrong = {m: n for m in MODULES if m.startswith(inner) for n in imports(MODULES[m]) if n.startswith(shell)}
    assert not wrong


def test_the_table_has_no_circle() -> None:
    edges = {here: allowed - {here} for here, allowed in MAY_IMPORT.items()}
    assert list(graphlib.TopologicalSorter(edges).static_order())


def test_the_table_has_no_dead_row() -> None:
    rows = {owner(module) for module in MODULES}
    assert set(MAY_IMPORT) == rows


@pytest.mark.parametrize("module", [module for module in MODULES if owner(module) in PURE])
def test_pure_modules_reach_no_clock_chance_or_device(module: str) -> None:
    for name, importer in reached(module).items():
        banned = name.split(".")[0] in BANNED_IN_PURE
        assert not banned, f"{module} is pure and reaches {name} through {importer}"


@pytest.mark.parametrize("module", ["gateway.__main__", "loadgen.__main__", "services.launcher.cli"])
def test_processes_without_a_model_reach_no_torch(module: str) -> None:
    heavy = {name: who for name, who in reached(module).items() if name.split(".")[0] in {"torch", "safetensors"}}
    assert not heavy, f"{module} would import {heavy}"


def test_settings_of_every_command_are_light() -> None:
    """The launcher reads them all, whatever it starts."""
    modules = {c.settings.partition(":")[0] for c in COMMANDS if c.settings is not None}
    allowed = set(sys.stdlib_module_names) | {"common", "gateway", "kvstore", "services", "msgspec"}
    for module in modules:
        heavy = {name for name in reached(module) if name.split(".")[0] not in allowed}
        assert not heavy, f"{module} imports {heavy}"


def test_the_launcher_names_services_only_in_its_table() -> None:
    """The one place that may reach every service: it starts them. By name, late, so that one cannot load another."""
    for module in MODULES:
        if module.startswith("services.launcher"):
            assert not [name for name in imports(MODULES[module]) if name.startswith(("gateway", "kvstore", "loadgen"))]
    for command in COMMANDS:
        assert command.entry.partition(":")[0] in MODULES
        assert command.settings is None or command.settings.partition(":")[0] in MODULES


def test_imports_inside_functions_say_why() -> None:
    """Only for optional hardware or a slow start, and with the reason on the line."""
    for module, path in MODULES.items():
        lines = path.read_text().splitlines()
        at_top = {id(node) for node in parsed(path).body}
        for node in _imports_in_functions(module):
            assert id(node) not in at_top
            assert "  # " in lines[node.lineno - 1], (
                f"{path}:{node.lineno}: an import inside a function without a reason"
            )


def _imports_in_functions(module: str) -> list[ast.stmt]:
    functions = (n for n in ast.walk(parsed(MODULES[module])) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [n for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]


def test_only_entry_points_read_the_environment() -> None:
    for module, path in MODULES.items():
        if module.endswith("__main__") or module in MAY_READ_THE_ENVIRONMENT:
            continue
        for node in ast.walk(parsed(path)):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            assert name not in {"environ", "getenv"} or not _is_os(node), f"{path}:{node.lineno} reads the environment"


def _is_os(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
