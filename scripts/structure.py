"""What the library is made of: sizes, imports, circles, and who reaches into whom.

    python scripts/structure.py                        # the checkout that this file is in
    python scripts/structure.py ../old --picture before.png

It reads the source and imports none of it, so it works on any checkout. The rules:

- **Room**: a folder of the package, or a module that lies beside the folders.
- **Import**: one module names another one of the package in an import statement, wherever the statement stands (at the
  top, in a function, under `TYPE_CHECKING`). Each pair of modules counts once.
- **Circle**: a group of modules (or rooms) that reach each other by imports.
- **Private access**: `x._name`, where `x` is not `self`, `cls` or `super()`, the name has no two underscores at its
  ends, and the same module defines no `_name` (as a function, a class, a variable, or an attribute that one of its
  classes sets). An access to a name that another module of the package defines is *across modules*; the others are to
  Python or to other libraries. `from .module import _name` counts as well.
- **Methods and attributes of a class**: all functions in its body, properties and `__init__` included; what they
  assign to `self`, and annotated fields.
"""

from __future__ import annotations

import argparse
import ast
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

# The rooms from the top; rooms in one row are independent of each other.
LAYERS = (
    ("cli", "metrics"),
    ("cache",),
    ("session",),
    ("prefill", "request"),
    ("loading",),
    ("planning",),
    ("selection",),
    ("store",),
    ("memory", "model"),
    ("hardware",),
    ("config", "stats", "timeline", "errors", "wording"),
)
MAX_LINES, MAX_METHODS, MAX_ATTRIBUTES = 400, 15, 10
_IGNORED = re.compile(r"#\s*type:\s*ignore")
_ENTRY = "__main__"

Edge = tuple[str, str]


@dataclass
class Module:
    """One file.

    Attributes:
        name: in the package, with dots; `""` is the package itself.
        path: of the file.
        is_package: whether it is an `__init__.py`.
        tree: its syntax.
    """

    name: str
    path: Path
    is_package: bool
    tree: ast.Module = field(repr=False)

    @cached_property
    def lines(self) -> int:
        """Lines of the file."""
        return self.path.read_text().count("\n")

    @property
    def room(self) -> str:
        """The room that it belongs to; `""` for the package itself."""
        return self.name.partition(".")[0]

    @cached_property
    def private_names(self) -> set[str]:
        """Private names that it defines."""
        return {name for name in _defined(self.tree) if _is_private(name)}

    @cached_property
    def type_ignores(self) -> int:
        """Comments that silence the type checker."""
        with tokenize.open(self.path) as file:
            tokens = tokenize.generate_tokens(file.readline)
            return sum(token.type == tokenize.COMMENT and bool(_IGNORED.search(token.string)) for token in tokens)


class Package:
    """All modules of a package, and what they import of each other."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.modules: dict[str, Module] = {}
        for path in sorted(folder.rglob("*.py")):
            parts = list(path.relative_to(folder).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            self.modules[name] = Module(name, path, is_package, ast.parse(path.read_text(), str(path)))
        self.edges: set[Edge] = {
            (module.name, found)
            for module in self.modules.values()
            for found in self._imported(module)
            if found != module.name
        }

    def _imported(self, module: Module) -> Iterator[str]:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first, _, rest = alias.name.partition(".")
                    if first == self.name and rest in self.modules:
                        yield rest
            elif isinstance(node, ast.ImportFrom):
                base = self._base(module, node)
                if base is None:
                    continue
                for alias in node.names:
                    inside = f"{base}.{alias.name}".strip(".")
                    yield inside if inside in self.modules else base

    def _base(self, module: Module, node: ast.ImportFrom) -> str | None:
        """The module of this package that an import names, or `None`."""
        if node.level:
            parts = module.name.split(".") if module.name else []
            up = node.level - module.is_package
            base = ".".join([*parts[: len(parts) - up], *(node.module.split(".") if node.module else [])])
        else:
            first, _, base = (node.module or "").partition(".")
            if first != self.name:
                return None
        return base if base in self.modules else None

    @cached_property
    def rooms(self) -> dict[str, list[Module]]:
        """Modules by room, without the package itself and `__main__`."""
        found: dict[str, list[Module]] = defaultdict(list)
        for module in self.modules.values():
            if module.room not in ("", _ENTRY):
                found[module.room].append(module)
        return dict(found)

    @cached_property
    def room_edges(self) -> dict[Edge, int]:
        """How many imports lead from one room to another."""
        found: dict[Edge, int] = defaultdict(int)
        for importer, imported in self.edges:
            pair = self.modules[importer].room, self.modules[imported].room
            if pair[0] != pair[1] and not {"", _ENTRY} & set(pair):
                found[pair] += 1
        return dict(found)

    def private_accesses(self) -> tuple[list[str], list[str]]:
        """Places of private accesses: those across modules, and those to other packages."""
        defined = set().union(*(module.private_names for module in self.modules.values()))
        across: list[str] = []
        foreign: list[str] = []
        for module in self.modules.values():
            for node, name in _private_uses(module.tree):
                if name not in module.private_names:
                    place = f"{module.path}:{node.lineno}: {name}"
                    (across if name in defined else foreign).append(place)
        return across, foreign

    def large_classes(self) -> list[str]:
        """Classes with many methods or attributes."""
        found = []
        for module in self.modules.values():
            for node in ast.walk(module.tree):
                if isinstance(node, ast.ClassDef):
                    methods = sum(isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)) for part in node.body)
                    attributes = len(_attributes(node))
                    if methods > MAX_METHODS or attributes > MAX_ATTRIBUTES:
                        found.append(f"{module.name}.{node.name}: {methods} methods, {attributes} attributes")
        return found


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            yield node.attr


def _is_own(value: ast.expr) -> bool:
    """Whether an attribute of this is the object's own."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


def _private_uses(tree: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and not _is_own(node.value):
            yield node, node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, alias.name) for alias in node.names if _is_private(alias.name))


def _attributes(node: ast.ClassDef) -> set[str]:
    found = {
        part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and _is_own(part.value):
            found.add(part.attr)
    return found


def circles(nodes: Iterable[str], edges: Iterable[Edge]) -> list[list[str]]:
    """Groups of two or more nodes that reach each other (strongly connected components, by Tarjan), largest first."""
    following: dict[str, list[str]] = defaultdict(list)
    for importer, imported in edges:
        following[importer].append(imported)
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for after in following[node]:
            if after not in number:
                visit(after)
            if after in stack:
                lowest[node] = min(lowest[node], lowest[after])
        if lowest[node] == number[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in nodes:
        if node not in number:
            visit(node)
    return sorted(found, key=len, reverse=True)


def is_layered(package: Package) -> bool:
    """Whether the rooms of the package are those of `LAYERS`."""
    return set(package.rooms) <= {room for row in LAYERS for room in row}


def upward(package: Package) -> list[Edge]:
    """Imports between rooms that do not lead down, for a package that has the rooms of `LAYERS`."""
    if not is_layered(package):
        return []
    rank = {room: number for number, row in enumerate(LAYERS) for room in row}
    below = len(LAYERS) - 1
    return [
        (importer, imported)
        for importer, imported in package.room_edges
        if rank[imported] <= rank[importer] and rank[importer] != below
    ]


def report(package: Package, *, every: bool) -> None:
    """Print all figures.

    Args:
        package: that is described.
        every: list each private access too.
    """
    modules = package.modules.values()
    print(f"{'room':<18}{'modules':>8}{'lines':>8}")
    for room, inside in sorted(package.rooms.items(), key=lambda item: -sum(module.lines for module in item[1])):
        print(f"{room:<18}{len(inside):>8}{sum(module.lines for module in inside):>8,}")
    print(f"{'all':<18}{len(modules):>8}{sum(module.lines for module in modules):>8,}\n")

    across, foreign = package.private_accesses()
    groups = circles(package.modules, package.edges)
    room_groups = circles(package.rooms, package.room_edges)
    print(f"imports between modules    {len(package.edges):>6}")
    print(
        f"imports between rooms      {sum(package.room_edges.values()):>6}  ({len(package.room_edges)} pairs of rooms)"
    )
    print(f"circles of modules         {len(groups):>6}  ({sum(map(len, groups))} modules in them)")
    print(f"circles of rooms           {len(room_groups):>6}  ({sum(map(len, room_groups))} rooms in them)")
    print(f"private accesses           {len(across):>6}  across modules; {len(foreign)} to other packages")
    print(f"type: ignore               {sum(module.type_ignores for module in modules):>6}")
    long = [f"{module.name or package.name}: {module.lines} lines" for module in modules if module.lines > MAX_LINES]
    large = package.large_classes()
    print(f"modules over {MAX_LINES} lines     {len(long):>6}")
    print(f"classes over {MAX_METHODS} methods or {MAX_ATTRIBUTES} attributes: {len(large)}")

    sections = {
        "imports that do not lead down": [f"{a} -> {b}: {package.room_edges[a, b]}" for a, b in upward(package)],
        "circles of modules": [", ".join(group) for group in groups],
        "circles of rooms": [", ".join(group) for group in room_groups],
        f"modules over {MAX_LINES} lines": long,
        "large classes": large,
    }
    if every:
        sections |= {"private accesses across modules": across, "private accesses to other packages": foreign}
    for title, lines in sections.items():
        if lines:
            print(f"\n{title}:", *lines, sep="\n  ")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Sizes, imports, circles and private accesses of the library.")
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--package", default="hf_contiguouskv", help="the folder of the package in the checkout")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the rooms and their imports (needs matplotlib)"
    )
    parser.add_argument("--title", help="above the picture; default: the package's name")
    parser.add_argument("--all", action="store_true", help="list each private access")
    arguments = parser.parse_args()
    folder = arguments.checkout / arguments.package
    if not (folder / "__init__.py").exists():
        parser.error(f"there is no package in {folder}")
    package = Package(folder)
    report(package, every=arguments.all)
    if arguments.picture:
        from structure_picture import draw

        draw(package, arguments.picture, arguments.title or arguments.package)


if __name__ == "__main__":
    main()
