"""Which code a result came from: a digest of the modules that made it, and of nothing else.

A change of a message in `cli/` is no reason to train a model again; a change of a network is one for
the models that use it. So the digest is over the closure of imports, at the top of a module or inside
its functions, as far as they are of the same package or of recspark.
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
    """Return 12 hex digits over the sources of `modules` and of all that they import.

    The same for a checkout and for a package made of it, also when it is shipped in a zip.
    """
    sha = hashlib.sha256()
    for name in sorted(imported(*modules)):
        sha.update(name.encode())
        sha.update((_source(name) or "").encode())
    return sha.hexdigest()[:12]


def algorithm_code(config: Config, *models: str) -> str:
    """Return the digest of what the algorithms of some of the night's models import."""
    specs = [spec_of(model, config.settings_of(model)) for model in models]
    return code_digest(*[module for spec in specs for module in spec.modules])


@functools.cache
def imported(*modules: str) -> frozenset[str]:
    """Return the names of `modules`, their packages, and of all modules that they import."""
    names: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        # The top of recspark says how its workers start, which is part of no result.
        if name in names or name == _PACKAGE or _spec(name) is None:
            continue
        names.add(name)
        waiting += [parent] if (parent := name.rpartition(".")[0]) else []
        waiting += _imports(name)
    return frozenset(names)


@functools.cache
def _imports(module: str) -> tuple[str, ...]:
    """Return what one module imports of its own package and of recspark."""
    source = _source(module)
    if source is None:  # compiled: an extension
        return ()
    package = module if _is_package(module) else module.rpartition(".")[0]
    ours = {module.partition(".")[0], _PACKAGE}
    names = list(_names(ast.parse(source), package))
    return tuple(dict.fromkeys(name for name in names if name.partition(".")[0] in ours))


def _names(node: ast.AST, package: str) -> Iterator[str]:
    """Give the modules, and what may be modules, that the code below `node` names."""
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
        yield from _names(child, package)


@functools.cache
def _spec(name: str) -> ModuleSpec | None:
    """Return what Python knows of a module, None where `name` is none. Imports its package alone."""
    parent = name.rpartition(".")[0]
    if parent and not _is_package(parent):  # a name in a module
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
