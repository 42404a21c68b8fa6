"""The layout of the code: who may import whom, and how large things may be."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.gateway import ROOT

BASE = frozenset(
    (
        "errors",
        "times",
        "money",
        "usage",
        "rates",
        "headers",
        "locations",
        "steps",
        "slices",
        "histogram",
        "release",
    )
)
# Each room, a folder or a file of redbtc/, with the rooms that it may import.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "headers": frozenset(),
    "steps": frozenset(),
    "slices": frozenset(("steps",)),
    "histogram": frozenset(),
    "release": frozenset(),
    "start": frozenset(),
    "waiting_process": frozenset(),
    "systemd": frozenset(("errors",)),
    "times": frozenset(("errors",)),
    "money": frozenset(("errors",)),
    "usage": frozenset(),
    "rates": frozenset(("usage",)),
    "locations": frozenset(("usage",)),
    "refusals": frozenset(("headers",)),
    "deadlines": frozenset(("refusals",)),
    "settings_tables": frozenset(),
    "upstream_settings": frozenset(("headers", "settings_tables")),
    "config": BASE | {"settings_tables", "upstream_settings"},
    "codex": BASE | {"config"},
    "telemetry": BASE | {"refusals"},
    "unexpected": frozenset(("telemetry",)),
    "meter": frozenset(("usage", "headers", "steps")),
    "request_body": BASE | {"meter", "refusals"},
    "store": BASE | {"config", "meter"},
    "limits": BASE | {"config", "deadlines", "refusals", "store"},
    "billing": BASE | {"config", "store"},
    "upstream": BASE | {"config", "refusals", "meter", "request_body", "upstream_settings"},
    "server": BASE | {"deadlines", "limits", "refusals", "request_body", "store", "telemetry"},
    "admin": BASE | {"billing", "codex", "config", "limits", "store"},
    "dashboard": BASE | {"admin", "billing", "codex", "config", "meter", "server", "store"},
    "demo": BASE | {"refusals", "request_body"},
}
MAY_IMPORT["gateway"] = frozenset(MAY_IMPORT) - {"start", "waiting_process", "demo"}
MAY_IMPORT["handover"] = frozenset(MAY_IMPORT) - {"start", "demo", "dashboard"}
MAY_IMPORT["cli"] = frozenset(MAY_IMPORT) - {"handover"}
MAY_IMPORT["redbtc_proxy"] = frozenset(MAY_IMPORT)
MAY_IMPORT["__main__"] = frozenset(("start", "redbtc_proxy"))
# Libraries that only some rooms know, or that some rooms must not know.
ASGI = ("starlette", "uvicorn")
KNOWS_ASGI = {"server", "gateway", "dashboard", "admin", "demo", "redbtc_proxy"}
NO_IO = ("asyncio", "aiosqlite", "sqlite3", "socket", "httpx2", "starlette", "uvicorn")
SQL = ("aiosqlite", "sqlite3")
KNOWS_SQL = {"store", "billing", "admin", "gateway", "handover", "cli"}
FILES = sorted((ROOT / "redbtc").rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in [*FILES, ROOT / "redbtc_proxy.py"]}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in TREES}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def imports_of(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, in functions and for types as well."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            for each in node.names:
                inner = f"{node.module}.{each.name}"
                yield inner if inner in MODULES else node.module or ""


OURS = {module_of(path): {each for each in imports_of(path) if each in MODULES} for path in TREES}


def test_rooms_import_downwards() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, found in OURS.items()
        for imported in sorted(found)
        if room_of(imported) not in MAY_IMPORT[room_of(module)] | {room_of(module)}
    ]
    assert not wrong


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Return what imports itself by way of others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for each in graph.get(waiting.pop(), set()) - seen:
                seen.add(each)
                waiting.append(each)
        return seen

    return [each for each in graph if each in reached(each)]


def test_no_import_is_circular() -> None:
    assert not circles(OURS)
    assert not circles({room: set(others) for room, others in MAY_IMPORT.items()})
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


@pytest.mark.parametrize("path", TREES, ids=module_of)
def test_rooms_know_only_their_libraries(path: Path) -> None:
    room = room_of(module_of(path))
    libraries = {each.split(".")[0] for each in imports_of(path)}
    if room not in KNOWS_ASGI:
        assert libraries.isdisjoint(ASGI)
    if room not in KNOWS_SQL:
        assert libraries.isdisjoint(SQL)
    if room in ("meter", "request_body"):
        assert libraries.isdisjoint(NO_IO)
    if room == "store":
        assert libraries.isdisjoint((*ASGI, "httpx2", "websockets"))


def test_privates_stay_private() -> None:
    wrong = [
        f"{module_of(path)} imports {each.name}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("redbtc")
        for each in node.names
        if each.name.startswith("_")
    ]
    assert not wrong


# Names that several modules may define: `main` is what starts a program, and the type variable `T`
# means nothing outside the signatures beside it.
REPEATED = {"main", "T"}


def defined_in(tree: ast.Module) -> set[str]:
    """Return the public names that a module defines at its top level."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target)]
            names |= {part.id for part in parts if isinstance(part, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_a_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for path, tree in TREES.items():
        for name in defined_in(tree) - REPEATED:
            places.setdefault(name, []).append(module_of(path))
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}
    assert defined_in(ast.parse("a, (b, _) = c\nd: e = f\ndef g(): h = 1")) == {"a", "b", "d", "g"}


def lengths(*kinds: type[ast.AST]) -> dict[str, int]:
    """Return the number of lines of each definition of these kinds."""
    return {
        f"{module_of(path)}.{node.name}:{node.lineno}": (node.end_lineno or 0) - node.lineno + 1
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and isinstance(node, kinds)
    }


def test_files_classes_and_functions_are_short() -> None:
    files = {module_of(path): path.read_text().count("\n") for path in TREES}
    files = {module: count for module, count in files.items() if count}
    assert statistics.median(files.values()) < 250
    assert not {module: count for module, count in files.items() if count > 600}
    assert files["redbtc_proxy"] < 350
    assert not {name: count for name, count in lengths(ast.ClassDef).items() if count > 250}
    functions = lengths(ast.FunctionDef, ast.AsyncFunctionDef)
    assert statistics.median(functions.values()) <= 6
    assert sorted(functions.values())[int(len(functions) * 0.95)] <= 23
    assert not {name: count for name, count in functions.items() if count > 53}


FRAGMENT = re.compile(
    r"(Of|And|That|Those|Whether|Still|What|Where|Who|Whose|Its|It|With|By|At|From|To|Also|Not|So|"
    r"Once|Only|All|More|Nothing|If)\b"
)


def docstrings() -> dict[str, str]:
    return {
        f"{module_of(path)}.{getattr(node, 'name', '')}": text
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and (text := ast.get_docstring(node))
    }


def is_fragment(text: str) -> bool:
    """Return whether a docstring can't be understood by itself: it begins in the middle of a
    sentence, or has less than three words."""
    first = re.split(r"(?<=[.:;])\s", text.replace("\n", " "))[0]
    return bool(FRAGMENT.match(first)) or len(re.findall(r"\w+", first)) < 3


def test_docstrings_are_sentences() -> None:
    found = docstrings()
    fragments = [
        f"{name}: {text.splitlines()[0]}" for name, text in found.items() if is_fragment(text)
    ]
    assert len(fragments) < 0.02 * len(found), "\n".join(fragments)
    assert is_fragment("Of the month's.")
    assert not is_fragment("Return what remains of the monthly budget, after holds.")
