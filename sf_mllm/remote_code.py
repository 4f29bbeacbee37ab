"""The code of a model as one Python file beside its weights, for people who have transformers but not this package.

transformers imports such a file where it is told `trust_remote_code=True`. It wants modules without subfolders, and
each file that an Auto class names becomes a package of its own, in which the same configuration would exist as another
class. So everything goes into one file: what the Auto classes name, and what that uses of our modules, comments
included. A function that imports a part of the package when it is called makes new models; it is left out.
"""

import ast
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sf_mllm
from sf_mllm.config import write_text_atomically

_PACKAGE = "sf_mllm"
_ROOT = Path(sf_mllm.__file__).parent

_ENCODER_CLASSES = {
    "AutoConfig": "sf_mllm.encoder.configuration_sparseformer.SparseFormerConfig",
    "AutoModel": "sf_mllm.encoder.modeling_sparseformer.SparseFormerModel",
    "AutoImageProcessor": "sf_mllm.encoder.image_processing_sparseformer.SparseFormerImageProcessor",
}
AUTO_CLASSES = {
    "sparseformer": _ENCODER_CLASSES,
    "sf_llava": {
        "AutoConfig": "sf_mllm.vlm.configuration_sf_llava.SFLlavaConfig",
        "AutoModel": "sf_mllm.vlm.modeling_sf_llava.SFLlavaModel",
        "AutoModelForImageTextToText": "sf_mllm.vlm.modeling_sf_llava.SFLlavaForConditionalGeneration",
        "AutoImageProcessor": _ENCODER_CLASSES["AutoImageProcessor"],
        "AutoProcessor": "sf_mllm.vlm.processing_sf_llava.SFLlavaProcessor",
    },
}
"""For each model type what transformers' Auto classes load, by its full name."""

_HEADER = """\
# Part of sf_mllm {version}. Copyright (c) 2026 the sf_mllm authors. SPDX-License-Identifier: MIT
# Collected from the package's modules, which are named below, by sf_mllm/remote_code.py; change them, not this file.
"""


def set_remote_code(directory: Path, *, include: bool) -> None:
    """Make a saved model loadable by `trust_remote_code=True` without this package, or take that away.

    Args:
        directory: as `save_pretrained` of one of our models and of its processor wrote it.
        include: write `modeling_<model type>.py` and point the configurations to it. Either way pointers to code that a
            model or a part of it kept from the directory that it was loaded from are removed.
    """
    model_type = json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"]
    module = f"modeling_{model_type}"
    classes = AUTO_CLASSES[model_type]
    auto_map = {auto: f"{module}.{name.rpartition('.')[2]}" for auto, name in classes.items()}
    processors = {auto: name for auto, name in auto_map.items() if auto.endswith("Processor")}
    pointers = {
        "config.json": {auto: name for auto, name in auto_map.items() if auto not in processors},
        "processor_config.json": processors,
        "preprocessor_config.json": processors,
        "tokenizer_config.json": {},
    }
    for file, wanted in pointers.items():
        if (directory / file).is_file():
            _set_auto_map(directory / file, wanted if include else {})
    if include:
        write_text_atomically(directory / f"{module}.py", bundle(classes.values()))


def bundle(objects: Iterable[str]) -> str:
    """Return the source of one module that defines the given objects and everything of ours that they use.

    Args:
        objects: full names of functions, classes or constants of this package.

    Raises:
        RuntimeError: a module is written in a way that cannot be bundled, or two use one name for different things.
    """
    bundler = _Bundler()
    for name in objects:
        module, _, local_name = name.rpartition(".")
        bundler.reach(bundler.load(module), local_name)
    return bundler.text()


def _set_auto_map(path: Path, auto_map: dict[str, str]) -> None:
    content = _without_auto_maps(json.loads(path.read_text(encoding="utf-8")))
    if auto_map:
        content["auto_map"] = auto_map
        if "image_processor" in content:
            content["image_processor"]["auto_map"] = {"AutoImageProcessor": auto_map["AutoImageProcessor"]}
    write_text_atomically(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _without_auto_maps(content: Any) -> Any:
    """Return JSON content without the pointers to code in it or in its parts, such as a decoder's configuration."""
    if isinstance(content, dict):
        return {key: _without_auto_maps(value) for key, value in content.items() if key != "auto_map"}
    return content


@dataclass(eq=False)
class _Statement:
    """A statement at the top of a module, with the comment above it.

    Attributes:
        text: its lines.
        uses: all names that it reads, local ones included.
        is_used: whether the bundle needs it.
    """

    text: str
    uses: set[str]
    is_used: bool = False


@dataclass(eq=False)
class _Module:
    """What a module defines and where its other names come from.

    Attributes:
        name: "sf_mllm.ops.roi", say.
        statements: in their order, without imports.
        defines: name -> the statement that binds it.
        ours: name -> module of this package and name there.
        foreign: name -> module of another package and name there, or None for the module itself.
    """

    name: str
    statements: list[_Statement] = field(default_factory=list)
    defines: dict[str, _Statement] = field(default_factory=dict)
    ours: dict[str, tuple["_Module", str]] = field(default_factory=dict)
    foreign: dict[str, tuple[str, str | None]] = field(default_factory=dict)


class _Bundler:
    """Marks what is used, then writes it down: imports first, then the modules, imported ones before importing ones."""

    def __init__(self) -> None:
        self.modules: dict[str, _Module] = {}  # in the order in which they were completely read
        self.imports: dict[str, tuple[str, str | None]] = {}
        self.owners: dict[str, tuple[str, object]] = {}  # name -> module that used it first, and what it means there

    def load(self, name: str) -> _Module:
        """Read a module and the modules of ours that it imports."""
        if name not in self.modules:
            module = _Module(name)
            path = _ROOT.joinpath(*name.split(".")[1:]).with_suffix(".py")
            self._read(module, path.read_text(encoding="utf-8"))
            self.modules[name] = module
        return self.modules[name]

    def reach(self, module: _Module, name: str) -> None:
        """Mark what a name stands for in a module, and all that it uses in turn."""
        if name in module.ours:
            self.reach(*module.ours[name])
        elif name in module.foreign:
            self._claim(name, module, module.foreign[name])
            self.imports[name] = module.foreign[name]
        elif name in module.defines:
            statement = module.defines[name]
            self._claim(name, module, statement)
            if not statement.is_used:
                statement.is_used = True
                for used in sorted(statement.uses):
                    self.reach(module, used)

    def text(self) -> str:
        """Return the source of all that was reached."""
        plain = [
            f"import {origin}" + (f" as {name}" if name != origin.partition(".")[0] else "")
            for name, (origin, attribute) in self.imports.items()
            if attribute is None
        ]
        from_imports = defaultdict(list)
        for name, (origin, attribute) in self.imports.items():
            if attribute is not None:
                from_imports[origin].append(attribute if attribute == name else f"{attribute} as {name}")
        lines = sorted(plain) + [f"from {o} import {', '.join(sorted(n))}" for o, n in sorted(from_imports.items())]
        parts = [_HEADER.format(version=sf_mllm.__version__), "\n".join(lines) + "\n"]
        for module in self.modules.values():
            used = [statement.text for statement in module.statements if statement.is_used]
            if used:
                parts.append(f"\n\n# {module.name}\n\n\n" + "".join(used).strip("\n") + "\n")
        return "\n".join(parts[:2]) + "".join(parts[2:])

    def _claim(self, name: str, module: _Module, meaning: object) -> None:
        owner, earlier = self.owners.setdefault(name, (module.name, meaning))
        if earlier != meaning:
            raise RuntimeError(f"'{name}' means one thing in {owner} and another in {module.name}; rename one.")

    def _read(self, module: _Module, source: str) -> None:
        lines = source.splitlines(keepends=True)
        end = 0
        for index, node in enumerate(ast.parse(source).body):
            start, end = end, node.end_lineno or end
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._read_import(module, node)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                if index > 0:  # text below a constant says what it is; the first one is the module's own
                    module.statements[-1].text += "".join(lines[start:end])
            elif not _is_for_type_checkers(node) and not _imports_package_when_called(node):
                statement = _read_statement(node, lines, start)
                module.statements.append(statement)
                names = _names_bound_by(node)
                if not names:
                    raise RuntimeError(f"{module.name}, line {node.lineno}: only definitions can be bundled.")
                module.defines |= dict.fromkeys(names, statement)

    def _read_import(self, module: _Module, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            origin = node.module if isinstance(node, ast.ImportFrom) else alias.name
            is_ours = _is_ours(node)
            if origin is None or origin == "__future__" or (is_ours and isinstance(node, ast.Import)):
                raise RuntimeError(f"{module.name}, line {node.lineno}: an import of this kind cannot be bundled.")
            if not is_ours:
                module.foreign[name] = (origin, alias.name if isinstance(node, ast.ImportFrom) else None)
                continue
            imported = self.load(origin)
            if name != alias.name or not {name} & (imported.defines.keys() | imported.ours.keys()):
                raise RuntimeError(f"{module.name}, line {node.lineno}: import '{name}' under its own name.")
            module.ours[name] = (imported, name)


def _read_statement(node: ast.stmt, lines: list[str], start: int) -> _Statement:
    """Cut a statement out of its file, without the methods of a class that import the package."""
    left_out: list[ast.AST] = []
    kept_lines = lines[start : node.end_lineno]
    if isinstance(node, ast.ClassDef):
        end_of_previous = node.lineno
        for item in node.body:
            if _imports_package_when_called(item):
                left_out.append(item)
                for number in range(end_of_previous, item.end_lineno or item.lineno):
                    kept_lines[number - start] = ""
            end_of_previous = item.end_lineno or item.lineno
    inside = {id(child) for item in left_out for child in ast.walk(item)}
    uses = {
        child.id
        for child in ast.walk(node)
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load) and id(child) not in inside
    }
    return _Statement("".join(kept_lines), uses)


def _names_bound_by(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets: list[Any] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return {child.id for target in targets for child in ast.walk(target) if isinstance(child, ast.Name)}


def _is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _imports_package_when_called(node: ast.AST) -> bool:
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return is_function and any(_is_ours(child) for child in ast.walk(node))


def _is_ours(node: ast.AST) -> bool:
    """Whether a node imports from this package."""
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").partition(".")[0] == _PACKAGE
    return isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == _PACKAGE for alias in node.names)
