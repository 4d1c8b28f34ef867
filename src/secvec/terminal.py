"""What the commands share at the terminal: options, progress bars, results for people or machines."""

import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from secvec.errors import UsageError
from secvec.launch import is_main

screen = Console(stderr=True)

Model = Annotated[str, typer.Argument(help="A model folder or a hub id.", show_default=False)]
Data = Annotated[
    Path,
    typer.Option(help="Rows: a file, a folder or a hub data set; FILE:FORMAT says its format.", show_default=False),
]
Out = Annotated[Path, typer.Option("-o", "--out", help="Where to write.", show_default=False)]
Vectors = Annotated[
    list[Path], typer.Option("--vector", help="A security vector; repeat for several.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document for machines.")]
Lr = Annotated[float | None, typer.Option(help="Step size.", show_default=False)]
Epochs = Annotated[int | None, typer.Option(help="Passes over the rows.", show_default=False)]
BatchSize = Annotated[int | None, typer.Option(help="Rows a step.", show_default=False)]
MaxLength = Annotated[int | None, typer.Option(help="Tokens a row.", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.", show_default=False)]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Settings as YAML.", show_default=False)]
Set = Annotated[list[str] | None, typer.Option("--set", help="One more setting, key=value.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")]


def refuse_empty(arguments: Sequence[str]) -> None:
    """Raise UsageError on an empty argument, which would stand for the current folder."""
    for before, argument in pairwise(("secvec", *arguments)):
        if not argument or re.fullmatch(r"--[\w-]+=", argument):
            named = argument or f"after {before}"
            raise UsageError(f"{named}: expected a value, found none; is a variable of the shell not set?")


def show(document: dict[str, Any], as_json: bool, for_people: Callable[[], None]) -> None:
    """Print a document as JSON, or call what prints it for people."""
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        for_people()


def lines(document: dict[str, Any]) -> str:
    """Return a document as one line an entry, or an item of a list."""
    width = max(len(key) for key in document)
    return "\n".join(f"{key:<{width}}  {_value(value, width)}" for key, value in document.items())


def _value(value: object, indent: int) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {inner}" for key, inner in cast("Mapping[str, object]", value).items())
    if isinstance(value, list | tuple):
        return f"\n{'':{indent}}  ".join(map(str, cast("Sequence[object]", value))) or "-"
    return str(value)


@contextmanager
def bar(what: str) -> Generator[Callable[[int, int, str], None]]:
    """Show how far work is; the function yielded takes (done, total, what was seen)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not screen.is_terminal or not is_main()
    with Progress(
        *columns, TextColumn("{task.fields[seen]}", markup=False), console=screen, transient=True, disable=hidden
    ) as progress:
        task = progress.add_task(what, total=None, seen="")
        yield lambda done, total, seen: progress.update(task, completed=done, total=total, seen=seen)


@contextmanager
def bytes_bar(what: str) -> Generator[Callable[[int, int], None]]:
    """Show how far work on files is; the function yielded takes (done, total) in bytes."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
