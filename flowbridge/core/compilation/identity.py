"""What a compiled program depends on, as plain data: the model, the code that evaluates it, and the machine."""

from __future__ import annotations
import __future__

import ast
import contextlib
import dis
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch.export import ExportedProgram

from ..execution.machine import machine
from ..potential import Potential

_LAYOUT = 2  # raise it when programs are made in another way from the same inputs

_ENTRIES = frozenset({"forward", "energy_and_forces", "from_configuration"})
"""Methods by which a potential is built and evaluated; others count where something mentions their names."""

_IMPORT = dis.opmap["IMPORT_NAME"]

_LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy"}
"""Packages whose code is not looked into: torch is covered by its version."""


def describe(potential: Potential, batch: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return all that the compiled program of a potential depends on, besides the numbers in it.

    Args:
        potential: the potential, in its dtype and on its device.
        batch: number of configurations of one call.
        dtype: of positions.
        device: of positions and parameters.
    """
    return {
        "layout": _LAYOUT,
        "class": f"{type(potential).__module__}.{type(potential).__qualname__}",
        "source": source_digest(potential),
        "batch": batch,
        "positions": str(dtype),
        "parameters": sorted({str(tensor.dtype) for tensor in (*potential.parameters(), *potential.buffers())}),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": str(torch.__version__),
        "machine": machine(),
    }


def source_digest(potential: Potential) -> str:
    """Return a digest of the code that builds and evaluates a potential, without comments and docstrings.

    An edited flow must not run the program of the old one, and an edited function that it does not use must not make it be
    compiled again. The classes of the potential's parts are where the search begins. What their code mentions (functions,
    classes and constants of the packages of these classes, wherever they are imported from) is searched in turn; of a class,
    methods count whose names are mentioned anywhere. Classes typed into an interpreter have no source: the digest of the
    program tells them apart.
    """
    parts = list(potential.modules())
    values = [value for part in parts for value in vars(part).values()]
    roots: set[type | FunctionType] = {cls for part in parts for cls in type(part).__mro__}
    roots |= {value if isinstance(value, type | FunctionType) else type(value) for value in values}
    code = _ReachableCode({root.__module__.partition(".")[0] for root in roots} - _LIBRARIES)
    for root in roots:
        code.mention(root.__module__, root.__qualname__.partition(".")[0])
    return code.digest()


@dataclass(frozen=True)
class _Piece:
    """A statement of a module, or a method of a class.

    Attributes:
        digest: of its code, without comments, docstrings and places in the file.
        names: all that it mentions.
        imports: what it imports by itself, as in a module.
        method: its name if it is a method that something has to call, else empty.
    """

    digest: str
    names: frozenset[str]
    imports: dict[str, tuple[str, str]]
    method: str = ""


@dataclass
class _Source:
    """The definitions of a module, and where the names that it imports come from (a name of a module; empty for itself)."""

    pieces: dict[str, list[_Piece]]
    imports: dict[str, tuple[str, str]]


class _ReachableCode:
    """The definitions that are used, from those mentioned on: fewer than there are, more than are run.

    Args:
        packages: top-level packages whose definitions are followed.
    """

    def __init__(self, packages: Iterable[str]) -> None:
        self._packages = frozenset(packages)
        self._names = set(_ENTRIES)
        self._found: dict[tuple[str, str], list[str]] = {}
        self._uncalled: list[tuple[str, str, _Piece]] = []
        self._modules: set[tuple[str, str]] = set()

    def mention(self, module: str, name: str) -> None:
        """Add a definition of a module, and what it mentions."""
        if module.partition(".")[0] not in self._packages or (module, name) in self._found:
            return
        source = _source(module)
        if source is None or name not in source.pieces:
            if source is not None and name in source.imports:
                self.mention(*source.imports[name])
            return
        self._found[module, name] = []
        inherited = self._inherited(module, name)
        for piece in source.pieces[name]:
            if piece.method in self._names | inherited | {""}:
                self._follow(module, name, piece)
            else:
                self._uncalled.append((module, name, piece))

    def digest(self) -> str:
        """Return the digest of everything found."""
        while called := [entry for entry in self._uncalled if entry[2].method in self._names]:
            self._uncalled = [entry for entry in self._uncalled if entry not in called]
            for entry in called:
                self._follow(*entry)
        digest = hashlib.sha256()
        for package in sorted(self._packages):
            with contextlib.suppress(PackageNotFoundError):
                digest.update(f"{package} {version(package)}\n".encode())
        for (module, name), pieces in sorted(self._found.items()):
            digest.update(f"{module}.{name} {' '.join(sorted(pieces))}\n".encode())
        return digest.hexdigest()

    def _inherited(self, module: str, name: str) -> set[str]:
        """Return the names of methods that a library may call, because a class of its own has them."""
        cls = getattr(sys.modules.get(module), name, None)
        bases = cls.__mro__ if isinstance(cls, type) else ()
        return {entry for base in bases if base.__module__.partition(".")[0] in _LIBRARIES for entry in vars(base)}

    def _follow(self, module: str, name: str, piece: _Piece) -> None:
        self._found[module, name].append(piece.digest)
        self._names |= piece.names
        source = _source(module)
        imports = {**(source.imports if source else {}), **piece.imports}
        for used in piece.names:
            origin = imports.get(used, (module, used))
            if origin[1]:
                self.mention(*origin)
            else:  # a module, of which something is used
                self._follow_module(origin[0], piece.names)

    def _follow_module(self, module: str, names: frozenset[str]) -> None:
        source = _source(module) if module.partition(".")[0] in self._packages else None
        for used in names if source else ():
            if (module, used) in self._modules:
                continue
            self._modules.add((module, used))
            if _is_module(module, used):
                self._follow_module(f"{module}.{used}", names)
            else:
                self.mention(module, used)


def _source(module: str) -> _Source | None:
    """Return the definitions of a module as its file has them now, None where there is no file."""
    path, package = _place(module)
    return _parsed(path, os.stat(path).st_mtime_ns, package) if path.endswith(".py") else None


def _place(module: str) -> tuple[str, str]:
    """Return the file of a module, loaded or not (empty where there is none), and the package it is in."""
    loaded = sys.modules.get(module)
    try:
        spec = getattr(loaded, "__spec__", None) or (None if loaded else importlib.util.find_spec(module))
    except (ImportError, ValueError):
        spec = None
    if spec is not None:
        return spec.origin or "", spec.parent or ""
    return getattr(loaded, "__file__", None) or "", ""


@cache
def _parsed(path: str, modified: int, package: str) -> _Source:
    content = Path(path).read_bytes()
    source = _Source({}, {})
    flags = __future__.annotations.compiler_flag if b"from __future__ import annotations" in content else 0
    for statement in ast.parse(content).body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            continue
        if not isinstance(statement, ast.ClassDef | ast.FunctionDef):
            source.imports |= _imports(statement, package)
        if isinstance(statement, ast.ClassDef):
            methods = [part for part in statement.body if isinstance(part, ast.FunctionDef)]
            statement.body = [part for part in statement.body if part not in methods]
            # Annotations of a class may be what it is made of (a dataclass, a validated configuration): they count.
            pieces = [_piece(statement, 0, package)]
            pieces += [_piece(part, flags, package, part.name) for part in methods]
            source.pieces.setdefault(statement.name, []).extend(pieces)
        elif not isinstance(statement, ast.Import | ast.ImportFrom):
            piece = _piece(statement, flags, package)
            for name in _bound(statement) or piece.names:  # what binds nothing does something to what it mentions
                source.pieces.setdefault(name, []).append(piece)
    return source


def _piece(statement: ast.stmt, flags: int, package: str, method: str = "") -> _Piece:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        # The compiler drops the text of a docstring, but not every trace of there being one.
        texts = [part for part in statement.body if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)]
        statement.body = [part for part in statement.body if part not in texts] or [ast.Pass(lineno=1, col_offset=0)]
    code = compile(ast.Module([statement], []), "", "exec", flags, dont_inherit=True, optimize=2)
    digest, names = hashlib.sha256(), set[str]()
    importing = False
    for part in _nested(code):
        words = [constant for constant in part.co_consts if isinstance(constant, str) and constant.isidentifier()]
        names.update(part.co_names, words)  # words: getattr(x, "name")
        importing = importing or _IMPORT in part.co_code[::2]
        constants = [_plain(constant) for constant in part.co_consts if not isinstance(constant, CodeType)]
        variables = (part.co_names, part.co_varnames, part.co_freevars, part.co_cellvars, part.co_flags)
        counts = (part.co_argcount, part.co_posonlyargcount, part.co_kwonlyargcount)
        digest.update(repr((part.co_name, part.co_code, constants, variables, counts)).encode())
    special = method.startswith("__") and method.endswith("__")
    imports = _imports(statement, package) if importing else {}
    return _Piece(digest.hexdigest(), frozenset(names), imports, "" if special else method)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _plain(constant: object) -> str:
    """Return a text of a constant that is the same in every process."""
    if isinstance(constant, frozenset):
        return f"frozenset {sorted(map(_plain, constant))}"
    return f"({', '.join(map(_plain, constant))})" if isinstance(constant, tuple) else repr(constant)


def _imports(statement: ast.stmt, package: str) -> dict[str, tuple[str, str]]:
    found = {}
    for node in ast.walk(statement):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                found[name] = (alias.name if alias.asname else name, "")
        elif isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                whole = _is_module(origin, alias.name)
                found[alias.asname or alias.name] = (f"{origin}.{alias.name}", "") if whole else (origin, alias.name)
    return found


def _is_module(package: str, name: str) -> bool:
    return _place(package)[0].endswith("__init__.py") and _place(f"{package}.{name}")[0] != ""


def _bound(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.FunctionDef):
        return {statement.name}
    nodes = list(ast.walk(statement))
    bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return bound | {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def program_digest(program: ExportedProgram) -> str:
    """Return a digest of the operations and of all constants of a traced program."""
    digest = hashlib.sha256(str(program.graph).encode())
    for name, tensor in sorted({**program.state_dict, **program.constants}.items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
