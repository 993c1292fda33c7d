"""The table of methods: what exists, of which role, from which paper, and where its object lives.

`methods.toml` has one row per published method, `baselines.toml` one per well-known component of
PyTorch that a configuration may name beside them (AdamW, a cosine schedule, ...). Nothing is
imported until `load`.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["ROLES", "Method", "Role", "baselines", "find", "get", "import_object", "load", "methods", "nearest"]


@dataclass(frozen=True)
class Role:
    """An interface of the ecosystem that methods implement interchangeably.

    `package` holds the methods, `contract` is the conformance suite every one of them passes,
    `section` the section of a training configuration that names one by its slug, or empty.
    """

    name: str
    package: str
    contract: str
    section: str


ROLES = {
    role.name: role
    for role in (
        Role("optimizer", "headway.optim", "headway.testing:check_optimizer", "optimizer"),
        Role("schedule", "headway.schedules", "headway.testing:check_schedule", "schedule"),
        Role("batch schedule", "headway.schedules", "headway.testing:check_batch_schedule", "batch"),
        Role("controller", "headway.schedules", "headway.testing:check_controller", ""),
        Role("planner", "headway.budget", "headway.testing:check_planner", ""),
    )
}


@dataclass(frozen=True)
class Method:
    """One row: a published method (`paper` is set) or a baseline (`paper` is empty).

    `object` and `claim` are written `package.module:name`; `extra` is the optional dependency group
    that the method needs, or empty.
    """

    slug: str
    title: str
    role: str
    object: str
    summary: str
    paper: str = ""
    arxiv: str = ""
    extra: str = ""
    claim: str = ""

    @property
    def module(self) -> str:
        """The module that holds the method's object."""
        return self.object.partition(":")[0]

    def load(self) -> Any:
        """Import and return the method's object.

        Raises `ImportError` with the `pip install` line when the method's extra is missing.
        """
        return import_object(self.object, extra=self.extra)


def import_object(path: str, extra: str = "") -> Any:
    """The object at `package.module:name`.

    >>> import_object("math:pi")
    3.141592653589793
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if extra and not (error.name or "").startswith("headway"):
            raise ImportError(f'{path} needs {error.name}: pip install "headway[{extra}]"') from error
        raise


@cache
def _rows(table: str) -> tuple[Method, ...]:
    text = resources.files(__package__).joinpath(table).read_text(encoding="utf-8")
    return tuple(Method(**row) for row in tomllib.loads(text)["method"])


def methods(role: str | None = None) -> list[Method]:
    """All published methods, in the table's order, or those of one role."""
    return [row for row in _rows("methods.toml") if role in (None, row.role)]


def baselines(role: str | None = None) -> list[Method]:
    """The components of PyTorch that a configuration may name beside the methods."""
    return [row for row in _rows("baselines.toml") if role in (None, row.role)]


def find(text: str = "", role: str | None = None) -> list[Method]:
    """The methods whose slug, title, summary or paper contain every word of `text`, case-insensitively.

    >>> [method.slug for method in find("reflected exponential", role="schedule")]
    ['rex']
    """
    words = text.lower().split()
    return [
        row
        for row in methods(role)
        if all(word in " ".join((row.slug, row.title, row.summary, row.paper, row.role)).lower() for word in words)
    ]


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint such as ` (did you mean 'frugal'?)`, or the list of what is known when nothing is close.

    >>> nearest("fugal", ["frugal", "rex"])
    " (did you mean 'frugal'?)"
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(names)})"


def get(slug: str, role: str | None = None) -> Method:
    """The row of a method or baseline.

    Raises `KeyError` with the nearest right spelling, or the role that the slug does have.
    """
    rows = {row.slug: row for row in [*methods(role), *baselines(role)]}
    if slug not in rows:
        other = next((row for row in [*methods(), *baselines()] if row.slug == slug), None)
        if other is not None:
            raise KeyError(f"'{slug}' has the role {other.role}, not {role} (`headway methods show {slug}`)")
        what = f"{role} " if role else ""
        raise KeyError(f"unknown {what}method '{slug}'{nearest(slug, rows)}")
    return rows[slug]


def load(slug: str) -> Any:
    """Import and return a method's object by slug.

    >>> load("rex").__name__
    'REXLR'
    """
    return get(slug).load()
