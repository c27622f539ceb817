"""Which code a result came from: a digest of the modules that made it, and of no other module.

A changed message in `cli/` is no reason to train a model again; a changed network is one for the
models that use it. So the digest covers the modules that a module imports, the modules that those
import, and so on. Imports inside functions count too. Only modules of the same package and of
recspark are followed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterator
from importlib.machinery import ModuleSpec

from recspark.config import Config
from recspark.models.registry import spec_of

_PACKAGE = "recspark"


def code_digest(*modules: str) -> str:
    """Return 12 hex digits over the sources of `modules` and of all modules that they import.

    A checkout and a package built from it give the same digest, also where the package is in a zip.
    """
    sha = hashlib.sha256()
    for name in sorted(imported(*modules)):
        sha.update(name.encode())
        sha.update((_source(name) or "").encode())
    return sha.hexdigest()[:12]


def algorithm_code(config: Config, *models: str) -> str:
    """Return the digest of the code that the algorithms of some of the night's models import."""
    specs = [spec_of(model, config.settings_of(model)) for model in models]
    return code_digest(*[module for spec in specs for module in spec.modules])


@functools.cache
def imported(*modules: str) -> frozenset[str]:
    """Return the names of `modules`, of their packages, and of all modules that they import, at any
    depth.
    """
    names: set[str] = set()
    names_to_visit = list(modules)
    while names_to_visit:
        name = names_to_visit.pop()
        # `recspark/__init__.py` only decides how workers start, which changes no result.
        if name in names or name == _PACKAGE or _spec(name) is None:
            continue
        names.add(name)
        names_to_visit += [parent] if (parent := name.rpartition(".")[0]) else []
        names_to_visit += _imports(name)
    return frozenset(names)


@functools.cache
def _imports(module: str) -> tuple[str, ...]:
    """Return what one module imports from its own package and from recspark."""
    source = _source(module)
    if source is None:  # a compiled extension has no source
        return ()
    package = module if _is_package(module) else module.rpartition(".")[0]
    followed_packages = {module.partition(".")[0], _PACKAGE}
    names = list(_imported_names(ast.parse(source), package))
    return tuple(
        dict.fromkeys(name for name in names if name.partition(".")[0] in followed_packages)
    )


def _imported_names(node: ast.AST, package: str) -> Iterator[str]:
    """Yield the names that the code below `node` imports: modules, and names that may be modules.

    `from a.b import c` yields `a.b` and `a.b.c`, since `c` may be a module. Imports that are only
    for type checkers (`if TYPE_CHECKING:`) are left out.
    """
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        children: list[ast.AST] = [*node.orelse]
    else:
        children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            base = importlib.util.resolve_name("." * node.level + base, package)
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)
    for child in children:
        yield from _imported_names(child, package)


@functools.cache
def _spec(name: str) -> ModuleSpec | None:
    """Return what Python knows about a module; None where `name` is no module. Imports only its
    package.
    """
    parent = name.rpartition(".")[0]
    if parent and not _is_package(parent):  # a name inside a module is no module
        return None
    return importlib.util.find_spec(name)


def _is_package(name: str) -> bool:
    spec = _spec(name)
    return spec is not None and spec.submodule_search_locations is not None


@functools.cache
def _source(module: str) -> str | None:
    spec = _spec(module)
    loader = None if spec is None else spec.loader
    return loader.get_source(module) if hasattr(loader, "get_source") else None  # type: ignore[union-attr]
