"""Read a ``.pt2`` file written by someone else without running anything it says.

``torch.export.load`` trusts its input: an operator's name is walked with ``getattr`` from the ``torch``
module (``torch.serialization.os.system`` is one), symbolic sizes and guards are evaluated as Python, custom
objects are unpickled, names are written into Python code that is then run, and compiled code is loaded as a
shared library (torch 2.14, ``torch/_export/serde/serialize.py``, ``torch/export/pt2_archive/_package.py`` and
``torch/fx/graph.py``). So the archive is read here first, as data, and refused unless everything in it is on
a list of harmless things.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compress.errors import ConfigError, IntegrityError
from compress.names import last_line

JSON_BYTES_MAX = 256 * 2**20
MEMBERS_MAX = 200_000
COMPILED = re.compile(
    r"(^|/)(aotinductor|executorch|mtia)/|\.(so|o|a|dll|dylib|pyd|cubin|fatbin|ptx|hsaco|py)$"
)
CUSTOM_OBJECT = re.compile(r"(^|/)(custom_obj|opaque_obj|script_obj)")
# Not here: aten.from_file, which opens files; _operator.call, attrgetter and methodcaller, which together
# reach any object; higher-order operators that hold code.
OPERATOR = re.compile(
    r"torch\.ops\.(aten|prim|prims|torchvision|quantized|quantized_decomposed)"
    r"\.(?!from_file)(_?[A-Za-z][A-Za-z0-9_]*|__i?[a-z]+__)(\.[A-Za-z_][A-Za-z0-9_]*)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|scan|map_impl|associative_scan|flex_attention|invoke_subgraph"
    r"|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|getitem|eq|ne|lt|le|gt|ge|and_|or_|xor|not_"
    r"|lshift|rshift|truth|index)"
    r"|math\.[a-z][a-z0-9]*|torch\._?sym_[a-z]+"
)
SYMBOL = re.compile(r"[a-z]+\d+")
SYMPY_NAME = re.compile(
    r"Symbol|Integer|Rational|Float|Add|Mul|Pow|Max|Min|Mod|Abs|floor|ceiling|FloorDiv|CleanDiv|CeilDiv"
    r"|PythonMod|ModularIndexing|Where|To(Float|Int)|(Trunc|Ceil|Floor|Round)To(Int|Float)|RoundDecimal"
    r"|FloatTrueDiv|IntTrueDiv|FloatPow|PowByNatural|Identity|Eq|Ne|Lt|Le|Gt|Ge|Equality|Unequality"
    r"|(Strict)?(Less|Greater)Than|And|Or|Not|true|false|oo|int_oo|OpaqueUnaryFn_[a-z0-9]+"
    r"|BitwiseFn_bitwise_[a-z]+|L"  # L: a guard's inputs
)
NAME = re.compile(r"[\w./ -]*")  # torch writes names into the Python code that it makes of the graph
FREE_TEXT = frozenset({"metadata", "as_string", "as_strings", "torch_version"})  # shown, or passed on as text
EXPRESSIONS = frozenset({"expr_str", "guards_code", "range_constraints"})
TREES = frozenset({"in_spec", "out_spec", "context"})
TREE_TYPES = frozenset({"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None})
GUARD_METHODS = frozenset({"size", "stride", "storage_offset"})
EXPRESSION_NODES = (
    *(ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.Tuple, ast.Subscript),
    *(ast.UnaryOp, ast.USub, ast.Not, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
    *(ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.BoolOp, ast.And, ast.Or),
)


def load_program(path: Path) -> torch.export.ExportedProgram:
    """The exported program in ``path``, after `inspect_program`; its tensors are read with weights_only.

    Raises ConfigError (exit 3) when there is no such file, and IntegrityError (exit 8) when it is truncated
    or changed, holds compiled code or custom objects, or names anything but known operators and expressions.
    """
    inspect_program(path)
    try:
        with only_weights(), _quiet("torch.export"):
            return torch.export.load(str(path))
    except Exception as error:  # whatever torch raises here, the file is not readable as a program
        what = f"cannot be read as an exported program: {last_line(error)}"
        raise IntegrityError(what, str(path), "export the model again with torch.export.save") from error


def inspect_program(path: Path) -> None:
    """Refuse (IntegrityError, exit 8) a ``.pt2`` archive that could do more than describe a graph."""
    if not path.is_file():
        raise ConfigError("no such file", str(path), "model.name is relative to the config's folder")
    try:
        with zipfile.ZipFile(path) as archive:
            check_members(archive, path)
            for name in archive.namelist():
                _check_member(archive, name, path)
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        what = f"not a whole .pt2 archive: {last_line(error)}"
        raise IntegrityError(what, str(path), "copy or export the file again") from error
    if damaged:
        raise IntegrityError(f"member {damaged!r} is damaged", str(path), "copy or export the file again")


def check_members(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse members that are compressed (torch compresses none) or claim more than the file holds."""
    members = archive.infolist()
    size = path.stat().st_size
    packed = next((m for m in members if m.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        what = f"member {packed.filename!r} is compressed, which torch.save never does"
        raise IntegrityError(what, str(path), "save the file again with torch")
    if len(members) > MEMBERS_MAX or sum(m.file_size for m in members) > size:
        raise IntegrityError(
            "the archive claims more than it holds", str(path), "save the file again with torch"
        )


@contextmanager
def only_weights() -> Iterator[None]:
    """Inside, every torch.load of this process reads tensors only, whatever weights_only it asks for."""
    name, opposite = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before = {key: os.environ.pop(key, None) for key in (name, opposite)}
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({key: value for key, value in before.items() if value is not None})


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Inside, this logger says nothing: torch logs the traceback of an error that it raises as well."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _check_member(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    if COMPILED.search(name.lower()):
        fix = "give the program before compilation, from torch.export.save"
        raise IntegrityError(f"holds compiled code ({name})", str(path), fix)
    if CUSTOM_OBJECT.search(name.lower()):
        _refuse(f"holds a custom object ({name})", path)
    if name.lower().endswith(".json"):
        if archive.getinfo(name).file_size > JSON_BYTES_MAX:
            _refuse(f"member {name!r} is larger than {JSON_BYTES_MAX} bytes", path)
        try:
            document = json.loads(archive.read(name))
        except (ValueError, RecursionError) as error:
            raise IntegrityError(
                f"member {name!r} is not JSON", str(path), "export the file again"
            ) from error
        _check_document(document, path)


def _check_document(document: Any, path: Path) -> None:
    """Every operator, expression, name and constant that the loader would act on, at any depth."""
    todo = [("", document)]
    while todo:
        key, value = todo.pop()
        if isinstance(value, list):
            todo.extend((key, item) for item in value)
        elif isinstance(value, dict):
            free = key in FREE_TEXT
            if not free:
                _check_entry(value, path)
            todo.extend((key, name) for name in value)
            todo.extend((key if free else name, item) for name, item in value.items())
        elif isinstance(value, str):
            _check_text(key, value, path)


def _check_entry(entry: dict[str, Any], path: Path) -> None:
    target = entry.get("target") if "inputs" in entry else entry.get("as_operator")
    if isinstance(target, str) and not OPERATOR.fullmatch(target):
        _refuse(f"calls {target[:80]!r}, which is not a known operator", path)
    if "as_custom_obj" in entry or CUSTOM_OBJECT.search(str(entry.get("path_name", ""))):
        _refuse("holds a custom object", path)
    if "__enum__" in entry or ("children_spec" in entry and entry.get("type") not in TREE_TYPES):
        _refuse(f"has inputs or outputs in a {str(entry.get('type', 'enum'))[:80]!r}", path)


def _check_text(key: str, text: str, path: Path) -> None:
    """A string of the graph: free text, an expression, a tree as JSON, or else a name that goes into code."""
    if key in FREE_TEXT:
        if not text.replace("\n", "").replace("\t", "").isprintable():
            _refuse(f"holds unprintable text ({text[:80]!r})", path)
    elif key in EXPRESSIONS:
        if not _harmless(text):
            _refuse(f"holds the expression {text[:80]!r}, which is not plain arithmetic on sizes", path)
    elif key in TREES and text.startswith(("[", "{")):
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError):
            tree = None
        _check_document({key: tree} if tree is not None else {"": text}, path)
    elif not NAME.fullmatch(text):
        _refuse(f"holds the name {text[:80]!r}", path)


def _harmless(text: str) -> bool:
    """Whether ``text`` is arithmetic on symbols and sizes of inputs, with no other name, call or string."""
    if len(text) > 10_000:
        return False
    try:
        tree = ast.parse(text, mode="eval")
        return all(_harmless_node(node) for node in ast.walk(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _harmless_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return bool(SYMPY_NAME.fullmatch(node.id) or SYMBOL.fullmatch(node.id))
    if isinstance(node, ast.Attribute):
        return node.attr in GUARD_METHODS
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", node.value) is not None
    return isinstance(node, EXPRESSION_NODES)


def _refuse(what: str, path: Path) -> None:
    raise IntegrityError(
        what, str(path), "it is not loaded; export the model yourself with torch.export.save"
    )
