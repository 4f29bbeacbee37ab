"""Run configuration: a dataclass gives names and defaults, a YAML file values, the command line overrides."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from sf_mllm.errors import InputError, first_line, nearest

ConfigT = TypeVar("ConfigT")


def load_run_config(schema: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file into a dataclass, then apply dotted overrides.

    Precedence: dataclass default < file < override.

    Args:
        schema: dataclass with nested dataclasses; a `dict` field takes any keys.
        path: YAML file.
        overrides: "section.key=value", the value in YAML syntax.

    Returns:
        An instance of `schema`.

    Raises:
        InputError: the file is missing or no mapping, a key is unknown (the nearest valid key is named), a value has
            the wrong type, or the dataclass's own checks refuse it.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"Config file '{path}' does not exist; give the path of a YAML file, see configs/.")
    try:
        from_file = OmegaConf.load(path)
    except Exception as error:  # YAML parse errors come in several types
        raise InputError(f"Config file '{path}' is not valid YAML: {first_line(error)}.") from error
    if not isinstance(from_file, DictConfig):
        raise InputError(f"Config file '{path}' must hold a mapping of keys to values at its top level.")
    layers = [(f"Config file '{path}'", from_file)]
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key or key.startswith("-"):
            raise InputError(f"Override '{override}' is not of the form key=value, for example train.max_steps=100.")
        try:
            layers.append((f"Override '{override}'", OmegaConf.from_dotlist([override])))
        except Exception as error:
            raise InputError(f"Override '{override}' cannot be read: {first_line(error)}.") from error

    config = OmegaConf.structured(schema)
    for origin, values in layers:
        try:
            config = OmegaConf.merge(config, values)
        except ConfigKeyError as error:
            key = error.full_key or str(error.key)
            parent, _, leaf = key.rpartition(".")
            node = OmegaConf.select(config, parent) if parent else config
            valid = [str(name) for name in node]
            where = f" in section '{parent}'" if parent else ""
            raise InputError(
                f"{origin}: unknown key '{leaf}'{where}.{nearest(leaf, valid)} Valid keys: {', '.join(sorted(valid))}."
            ) from error
        except OmegaConfBaseException as error:
            key = f" for key '{error.full_key}'" if error.full_key else ""
            raise InputError(f"{origin}: bad value{key}: {first_line(error)}.") from error
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise InputError(
            f"Config file '{path}' leaves required keys without a value: {', '.join(missing)}; give them as "
            f"{' '.join(f'{key}=VALUE' for key in missing)}."
        )
    result = OmegaConf.to_object(config)
    assert isinstance(result, schema)
    return result


def to_plain(config: Any) -> dict[str, Any]:
    """Return a configuration dataclass as plain dicts and lists."""
    return dataclasses.asdict(config)


def dump_run_config(config: Any, path: str | Path) -> None:
    """Write the resolved configuration as YAML, atomically."""
    write_text_atomically(path, OmegaConf.to_yaml(OmegaConf.create(to_plain(config))))


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write a text file so that a reader sees either the old or the new content, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
