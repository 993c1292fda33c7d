"""MkDocs hook: what the docs take from the program itself.

The method pages come from the catalogue and the last verified claims, the tables of the configuration
from its schema. Nothing of them is written by hand, so nothing of them can go stale.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.catalogue import ROLES, Method, baselines, methods
from headway.config.methods import not_trained
from headway.config.schema import SECTIONS, MethodSection

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

CLAIMS = Path(__file__).parent / "claims"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the method pages to the navigation's "Methods", one group per role."""
    for item in config.nav or []:
        if "Methods" in item:
            item["Methods"] += [
                {f"{name.capitalize()}s": [{row.title: f"methods/{row.slug}.md"} for row in methods(name)]}
                for name in ROLES
            ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add one page per method."""
    from mkdocs.structure.files import File

    for row in methods():
        files.append(File.generated(config, f"methods/{row.slug}.md", content=method_page(row)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the generated tables in the place of their markers, such as `<!-- methods -->`."""
    tables: dict[str, Callable[[], str]] = {
        "methods": methods_table,
        "baselines": baselines_table,
        "configuration": lambda: configuration_tables(page.meta.get("meanings", {})),
    }
    return re.sub(r"<!-- (methods|baselines|configuration) -->", lambda match: tables[match[1]](), markdown)


def methods_table() -> str:
    """All methods: slug, what it does, paper, and the verdict of the last verified claim."""
    rows = [
        (f"[`{row.slug}`]({row.slug}.md)", row.role, row.summary, _arxiv(row), _verdict(_claim(row)))
        for row in methods()
    ]
    return _table(("slug", "role", "what it does", "paper", "claim"), rows)


def baselines_table() -> str:
    """The components of PyTorch that a configuration may name beside the methods."""
    return _table(("slug", "role", "what it is"), [(f"`{row.slug}`", row.role, row.summary) for row in baselines()])


def configuration_tables(meanings: Mapping[str, Mapping[str, str]]) -> str:
    """One table per section: key, default, accepted values, meaning.

    Raises:
        KeyError: a key of the schema has no meaning.
    """
    parts = []
    for name, section in SECTIONS.items():
        schema = section.model_json_schema(by_alias=True)["properties"]
        rows = [
            (f"`{key}`", _default(section, key, schema[key]), _accepted(section, key, schema[key]), meanings[name][key])
            for key in section.keys()  # noqa: SIM118  a method of the section, not of a dict
        ]
        table = _table(("key", "default", "accepted", "meaning"), rows)
        if issubclass(section, MethodSection):
            table += "\n\nEvery other key goes to the constructor of the method that is named." + _own_options(section)
        parts.append(f"### `[{name}]`\n\n{table}")
    return "\n\n".join(parts)


def method_page(row: Method) -> str:
    """The page of one method: summary, use, the last verified claim, and the API."""
    name = row.object.partition(":")[2]
    others = [other for other in importlib.import_module(row.module).__all__ if other != name]
    section = ROLES[row.role].section
    parts = [
        f"# {row.title}",
        row.summary,
        f"- Slug `{row.slug}`, role {row.role}{f': section `[{section}]` of a configuration' if section else ''}\n"
        f"- Paper: {row.paper}, {_arxiv(row)}\n"
        "- Needs " + (f'`pip install "headway[{row.extra}]"`' if row.extra else "nothing beyond the core install"),
        "## Use",
        f"```python\nfrom {row.module} import {name}\n\n{_construction(row)}\n```",
        *_training(row, section),
        f"```console\n$ headway verify {row.slug}\n```",
        "## Claim",
        claim_section(row),
        "## API",
        f"::: {row.module}.{name}",
        *(f"::: {row.module}.{other}" for other in others),
    ]
    return "\n\n".join(parts) + "\n"


def claim_section(row: Method) -> str:
    """What the last verified run of the claim measured, or that there is none."""
    claim = _claim(row)
    if claim is None:
        return f"Not verified yet. To run it: `headway verify {row.slug}`."
    rows = [
        (
            check["what"],
            f"{check['measured']:.4g}",
            "" if check["baseline"] is None else f"{check['baseline']:.4g}",
            f"{'≤' if check['relation'] == '<=' else '≥'} {check['threshold']:.4g}",
            "holds" if check["holds"] else "**fails**",
        )
        for check in claim["checks"]
    ]
    parts = [
        f"{claim['statement']} {_verdict(claim)}",
        _table(("what", "measured", "baseline", "threshold", "verdict"), rows, "lrrrl"),
        f"The paper: {claim['paper']}" if claim["paper"] else "",
        f"Measured with headway {claim['headway']}, torch {claim['torch']}, Python {claim['python']} on "
        f"{claim['machine']}, seed {claim['seed']}. To run it again: `headway verify {row.slug}`.",
    ]
    if (CLAIMS / f"{row.slug}.svg").is_file():
        parts.append(f"![What the claim of {row.slug} measured](../claims/{row.slug}.svg){{ .claim }}")
    return "\n\n".join(part for part in parts if part)


def _training(row: Method, section: str) -> list[str]:
    """How `headway train` takes the method, or why it does not."""
    if not section:
        return []
    reason = not_trained(row.role, row.load())
    if reason:
        return [f"It {reason}, which `headway train` does not do: use it in a loop of your own."]
    # A batch schedule needs to know how far it may grow, and parts to grow by.
    options = {"micro_batch": 4, "max_batch": 64} if section == "batch" else {}
    lines = "".join(f"\n{key} = {value}" for key, value in options.items())
    sets = "".join(f" --set {section}.{key}={value}" for key, value in options.items())
    return [
        f'```toml\n[{section}]\nname = "{row.slug}"{lines}\n```',
        f"```console\n$ headway train --set {section}.name={row.slug}{sets}\n```",
    ]


def _construction(row: Method) -> str:
    """The line of Python that builds the method with what it requires."""
    cls = row.load()
    result = row.role.rpartition(" ")[2]
    if hasattr(cls, "for_model"):
        return f"{result} = {cls.__name__}.for_model(model)"
    if not inspect.isclass(cls):
        required = [name for name, given in inspect.signature(cls).parameters.items() if given.default is given.empty]
        return f"plan = {cls.__name__}({', '.join(required)})"
    if not inspect.signature(cls).parameters or hasattr(cls, "fit"):
        return f"{result} = {cls.__name__}()"
    first, *others = inspect.signature(cls).parameters.values()
    required = [f"{other.name}={other.name}" for other in others if other.default is other.empty]
    given = {"params": "model.parameters()"}.get(first.name, first.name)
    return f"{result} = {cls.__name__}({', '.join([given, *required])})"


def _claim(row: Method) -> dict[str, Any] | None:
    file = CLAIMS / f"{row.slug}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _verdict(claim: Mapping[str, Any] | None) -> str:
    if claim is None:
        return "not verified yet"
    count = len(claim["checks"])
    held = sum(check["holds"] for check in claim["checks"])
    return f"All {count} checks hold." if claim["holds"] else f"**{held} of {count} checks hold.**"


def _arxiv(row: Method) -> str:
    return f"[arXiv {row.arxiv}](https://arxiv.org/abs/{row.arxiv})"


def _default(section: type, key: str, schema: Mapping[str, Any]) -> str:
    if issubclass(section, MethodSection) and key == "name":
        return f'`"{next(iter(section.defaults))}"`'
    return f"`{json.dumps(schema['default'])}`"


def _own_options(section: type[MethodSection]) -> str:
    slug, options = next(iter(section.defaults.items()))
    if not options:
        return ""
    written = ", ".join(f"`{key} = {json.dumps(value)}`" for key, value in options.items())
    return f" Where `{slug}` is used, {written} unless the configuration says otherwise."


def _accepted(section: type, key: str, schema: Mapping[str, Any]) -> str:
    if issubclass(section, MethodSection) and key == "name":
        role = next(role.name for role in ROLES.values() if SECTIONS.get(role.section) is section)
        return f"a [slug](methods/index.md) of role {role}"
    if "enum" in schema:
        return ", ".join(f'`"{value}"`' for value in schema["enum"])
    kind = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "`true`, `false`",
        "array": f"list of {'text' if schema.get('items', {}).get('type') == 'string' else 'numbers'}",
    }[schema["type"]]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]:,}" for key, sign in signs.items() if key in schema]
    return f"{kind} {', '.join(bounds)}".strip()


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], align: str = "") -> str:
    rule = ["---:" if side == "r" else "---" for side in align.ljust(len(header), "l")]
    lines = [header, rule, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
