"""The configuration of `headway train`: typed sections, a TOML file, and overrides `a.b=c`.

`load` either returns a `Config` whose every value has been accepted, down to the constructor of each
method it names, or raises `ConfigError` with one line that names the key, the value and what is
accepted. `Config.to_toml` writes the resolved form, which loads to the same `Config` again.

>>> config = load(overrides=["optimizer.name=frugal", "train.steps=10"])
>>> config.optimizer.name, config.train.steps
('frugal', 10)
>>> load(overrides=["optimiser.lr=1"])
Traceback (most recent call last):
...
headway.config.ConfigError: unknown section 'optimiser' (did you mean 'optimizer'?)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from headway.catalogue import nearest
from headway.config.methods import MethodError, check_batch, check_method
from headway.config.schema import SECTIONS, Config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Config", "ConfigError", "load", "parse"]

# What pydantic calls an error -> how this program completes "KEY must be ...".
_ACCEPTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "dict_type": "a section",
    "model_type": "a section",
    "greater_than": "> {gt}",
    "greater_than_equal": ">= {ge}",
    "less_than": "< {lt}",
    "less_than_equal": "<= {le}",
    "literal_error": "{expected}",
}


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the user."""


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file (or start from the defaults), apply overrides in order, and check everything.

    Arguments:
        path: the file; None means an empty one.
        overrides: items `section.key=value`; the value is read as TOML, or as plain text where it is
            not valid TOML.

    Raises:
        ConfigError: for an unreadable file, invalid TOML, an unknown section, key or slug, a value
            of the wrong type or out of range.
    """
    text = ""
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a UTF-8 text file"
            raise ConfigError(f"cannot read configuration {str(path)!r}: {reason}") from error
    return parse(text, overrides, where=str(path) if path is not None else "configuration")


def parse(text: str, overrides: Sequence[str] = (), where: str = "configuration") -> Config:
    """As `load`, from the text of a TOML file."""
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(_one_line(f"{where} is not valid TOML: {error}")) from error
    for override in overrides:
        _apply(raw, override)
    return _check(raw)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or len(parts) > 2 or not all(parts):
        raise ConfigError(_one_line(f"an override is written section.key=value, got {override!r}"))
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (tomllib.TOMLDecodeError, RecursionError):
        parsed = {}
    # Text that ends the line and goes on ("1\nother = 2") is no single value: take it as plain text.
    item = parsed["value"] if set(parsed) == {"value"} else value
    section = raw
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(_one_line(f"{part} must be a section, got {section!r}"))
    section[parts[-1]] = item


def _check(raw: dict[str, Any]) -> Config:
    for name in raw:
        if name not in SECTIONS:
            kind = "section" if isinstance(raw[name], dict) else "key"
            raise ConfigError(_one_line(f"unknown {kind} {name!r}{nearest(name, SECTIONS)}"))
    try:
        config = Config.model_validate(raw)
    except pydantic.ValidationError as error:
        raise ConfigError(_one_line(_explain(error.errors()[0]))) from error
    except RecursionError as error:
        raise ConfigError("the configuration is nested too deeply") from error
    try:
        check_method("optimizer", config.optimizer)
        check_method("schedule", config.schedule, total_steps=config.nominal_steps)
        check_method("batch schedule", config.batch)
        check_batch(config.batch, config.launch.workers)
    except MethodError as error:
        raise ConfigError(_one_line(str(error))) from error
    return config


def _explain(error: Any) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = SECTIONS[location[0]].keys() if len(location) > 1 else SECTIONS
        return f"unknown key {key!r}{nearest(location[-1], known)}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    accepted = _ACCEPTED.get(error["type"])
    if accepted is None:
        return f"{key}: {error['msg']}, got {error['input']!r}"
    bounds = {name: f"{bound:g}" if isinstance(bound, float) else bound for name, bound in error.get("ctx", {}).items()}
    return f"{key} must be {accepted.format(**bounds)}, got {error['input']!r}"


def _one_line(message: str) -> str:
    line = " ".join(message.split())
    return line if len(line) <= 300 else line[:297] + "..."
