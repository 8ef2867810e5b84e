"""Files, functions and classes stay small enough to read; names say what they are; nothing is global."""

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from tests.architecture.tree import FILES, ROOT, parsed

FILE_LINES, FUNCTION_LINES, CLASS_LINES, PARAMETERS, MEDIAN_LINES = 400, 60, 250, 6, 150
SUPPORT = sorted((ROOT / "tests" / "support").rglob("*.py"))
_ATTENTION = (
    "the terms of attention, by name, as every way of computing it has them; most callers leave most of them out"
)
OUTLIERS: dict[str, str] = {  # "path:name" -> why it may be larger
    "services/worker/service.py:WorkerService": "one loop: what is heard, what is decided, what is done about it",
    "kernels/paged_decode.py:paged_decode": _ATTENTION,
    "kernels/paged_prefill.py:paged_prefill": _ATTENTION,
    "kernels/prefill_choice.py:prefill_runs": _ATTENTION,
    "kernels/reference.py:attention": _ATTENTION,
    "kernels/rope.py:rope_write": "one launch for all that happens to a layer's queries, keys and values before attention",
    "services/worker/engine/attention.py:attend": _ATTENTION,
    "services/worker/model/interface.py:attend": _ATTENTION,
    "kvstore/transport/share.py:__init__": "one callback for each kind of news, and what it runs with",
    "common/settings.py:setting": "the keywords of a declaration; a field names the two or three that it needs",
}

BANNED_IN_NAMES = ("Manager", "Handler", "Helper", "Util", "Info", "Impl", "Data", "Base")
BANNED_FILES = {"utils", "util", "helpers", "helper", "misc", "base_impl", "common", "manager"}
MAY_CATCH_EVERYTHING = {
    "gateway/border.py": "the gateway's request boundary",
    "gateway/request_log.py": "the border to exporters of others: the log tells the first bug, and counts all",
    "services/worker/engine_thread.py": "the loop's top of the engine thread, which passes the error on",
}
_WORDS = re.compile(r"[A-Z][a-z0-9]*")


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def definitions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    first = node.body[0].lineno if is_kernel(node) else node.lineno
    return (node.end_lineno or first) - first + 1


def too_long(path: Path) -> dict[str, str]:
    """The file, and those of its classes and functions, that have too many lines."""
    over: dict[str, str] = {}
    n_lines = len(path.read_text().splitlines())
    if n_lines > FILE_LINES:
        over[label(path)] = f"{n_lines} lines"
    for node in definitions(path):
        limit = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
        if lines_of(node) > limit:
            over[f"{label(path)}:{node.name}"] = f"{lines_of(node)} lines"
    return over


def test_what_tests_share_is_as_short_as_what_ships() -> None:
    over: dict[str, str] = {}
    for path in SUPPORT:
        over |= too_long(path)
    assert not over, f"split these: {over}"


def test_nothing_is_longer_than_its_budget_without_a_reason() -> None:
    over: dict[str, str] = {}
    for path in FILES:
        over |= too_long(path)
        for node in definitions(path):
            if not isinstance(node, ast.ClassDef) and (count := parameters(node)) > PARAMETERS:
                over[f"{label(path)}:{node.name}"] = f"{count} parameters"
    unexplained = {name: size for name, size in over.items() if name not in OUTLIERS}
    assert not unexplained, f"split these, or give a reason in OUTLIERS: {unexplained}"
    assert set(OUTLIERS) <= set(over), f"no longer outliers: {set(OUTLIERS) - set(over)}"


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> bool:
    """A launch has nothing but plain arguments: a kernel's are not counted, nor the lines they take."""
    return any("triton.jit" in ast.unparse(one) for one in node.decorator_list)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """`self` does not count, and a keyword-only parameter counts as the others do: a caller must know it too."""
    if is_kernel(node):
        return 0
    names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def test_the_median_file_is_short() -> None:
    sizes = sorted(len(path.read_text().splitlines()) for path in FILES if path.stat().st_size)
    print(f"\n{len(sizes)} files, median {statistics.median(sizes):.0f} lines, longest {sizes[-1]}")
    assert statistics.median(sizes) <= MEDIAN_LINES


def test_names_say_what_things_are() -> None:
    for path in FILES:
        assert path.stem not in BANNED_FILES, f"{label(path)}: a name that says nothing"
        for node in definitions(path):
            if isinstance(node, ast.ClassDef):
                vague = set(_WORDS.findall(node.name)) & set(BANNED_IN_NAMES)
                assert not vague, f"{label(path)}: class {node.name}"


DOORS = {"common/messages/__init__.py", "kvstore/__init__.py"}
"""Packages that others use as one thing: the union of all messages, and the MemPool library."""


def test_package_files_are_empty() -> None:
    for path in FILES:
        if path.name == "__init__.py" and label(path) not in DOORS:
            assert not path.read_text(), f"{label(path)} must be empty"


def test_no_function_changes_a_global() -> None:
    for path in FILES:
        for node in ast.walk(parsed(path)):
            assert not isinstance(node, ast.Global), f"{label(path)}:{node.lineno}"


def mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.ListComp | ast.SetComp):
        return True
    if isinstance(value, ast.List | ast.Dict | ast.Set):
        return not (value.keys if isinstance(value, ast.Dict) else value.elts)
    if isinstance(value, ast.Call):
        name = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        return name in {"list", "dict", "set", "defaultdict", "deque", "Counter", "count", "Lock", "Queue", "Event"}
    return False


def test_modules_and_classes_hold_no_mutable_state() -> None:
    """Tables that are written down once are fine; empty containers, counters and locks are there to be changed."""
    for path in FILES:
        scopes: list[ast.Module | ast.ClassDef] = [parsed(path)]
        scopes += [node for node in definitions(path) if isinstance(node, ast.ClassDef)]
        for scope in scopes:
            if isinstance(scope, ast.ClassDef) and _is_struct(scope):
                continue  # msgspec copies an empty default for every object
            for node in scope.body:
                if isinstance(node, ast.Assign | ast.AnnAssign):
                    assert not mutable(node.value), f"{label(path)}:{node.lineno}: mutable state in a module or class"


def _is_struct(scope: ast.ClassDef) -> bool:
    return any(ast.unparse(base).rpartition(".")[2] in {"Struct", "Message"} for base in scope.bases)


def test_everything_public_has_a_docstring() -> None:
    for path in FILES:
        if path.name == "__init__.py" and not path.stat().st_size:
            continue
        assert ast.get_docstring(parsed(path)), f"{label(path)} has no docstring"


def test_errors_are_not_swallowed() -> None:
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ExceptHandler):
                require_reason(path, node)


def require_reason(path: Path, node: ast.ExceptHandler) -> None:
    assert node.type is not None, f"{label(path)}:{node.lineno}: bare except"
    everything = ast.unparse(node.type) in {"Exception", "BaseException"}
    reraises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
    if everything and not reraises:
        assert label(path) in MAY_CATCH_EVERYTHING, f"{label(path)}:{node.lineno}: catches everything"
    if len(node.body) == 1 and isinstance(node.body[0], ast.Pass):
        source = path.read_text().splitlines()[node.lineno - 1 : (node.body[0].end_lineno or 0)]
        assert any("#" in line for line in source), f"{label(path)}:{node.lineno}: silent without a reason"


def test_there_is_nothing_left_to_do() -> None:
    word = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
    for path in FILES:
        assert not word.search(path.read_text()), f"{label(path)} has an unfinished note"
