"""`headway methods` and `headway methods show SLUG`."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from headway.catalogue import ROLES, Method, baselines, find, get, nearest
from headway.cli.failures import FAILED, WRONG_INPUT, fail
from headway.config.methods import not_trained

app = typer.Typer(no_args_is_help=False)


@app.callback(invoke_without_command=True)
def methods(
    context: typer.Context,
    text: Annotated[str, typer.Option("--find", help="Only those that contain these words.")] = "",
    role: Annotated[str, typer.Option(help="Only those of one role, such as optimizer.")] = "",
    with_baselines: Annotated[bool, typer.Option("--baselines", help="PyTorch's own components too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the methods, or those of a role or with certain words.

    Example:
        headway methods --role optimizer --find memory
    """
    if context.invoked_subcommand:
        return
    if role and role not in ROLES:
        raise fail(f"unknown role {role!r}{nearest(role, ROLES)}", WRONG_INPUT)
    rows = find(text, role or None)
    if with_baselines:
        words = text.lower().split()
        rows += [row for row in baselines(role or None) if all(w in f"{row.slug} {row.summary}".lower() for w in words)]
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("slug", "role", "what it does", "paper"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(f"[bold]{row.slug}[/bold]", row.role, row.summary, f"arXiv {row.arxiv}" if row.arxiv else "")
    Console().print(table if rows else "no method matches")


@app.command("show")
def show(
    slug: Annotated[str, typer.Argument(help="The method's slug, as `headway methods` lists it.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What one method is: signature, paper, claim, example.

    Example:
        headway methods show frugal
    """
    try:
        row = get(slug)
    except KeyError as error:
        raise fail(error.args[0], WRONG_INPUT) from error
    import inspect

    try:
        loaded = row.load()
    except ImportError as error:
        raise fail(str(error), FAILED) from error
    signature = f"{loaded.__name__}{inspect.signature(loaded)}"
    documentation = inspect.getdoc(loaded) or ""
    if as_json:
        fields = {**dataclasses.asdict(row), "signature": signature, "documentation": documentation}
        typer.echo(json.dumps(fields, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(f"[bold]{row.title}[/bold]  ({row.role}, slug [bold]{row.slug}[/bold])\n{escape(row.summary)}\n")
    for name, value in _facts(row).items():
        console.print(f"[dim]{name:10}[/dim] {escape(value)}", soft_wrap=True)
    console.print(f"\n[bold]{escape(signature)}[/bold]\n\n{escape(documentation)}", soft_wrap=True)


def _facts(row: Method) -> dict[str, str]:
    module, _, name = row.object.partition(":")
    facts = {"import": f"from {module} import {name}"}
    section, reason = ROLES[row.role].section, not_trained(row.role, row.load())
    if reason:
        facts["training"] = f"in a loop of your own: it {reason}"
    elif section:
        facts["training"] = f"headway train --set {section}.name={row.slug}"
    if row.paper:
        facts["paper"] = f"{row.paper}, arXiv {row.arxiv}"
    if row.claim:
        facts["claim"] = f"headway verify {row.slug}"
    if row.extra:
        facts["needs"] = f'pip install "headway[{row.extra}]"'
    return facts
