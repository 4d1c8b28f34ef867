"""The command line: parse, call one library function, print."""

import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from secvec.errors import SecvecError
from secvec.launch import refuse_several, speaking_once
from secvec.terminal import (
    AsJson,
    BatchSize,
    ConfigFile,
    Data,
    DryRun,
    Epochs,
    Lr,
    MaxLength,
    Model,
    Out,
    Seed,
    Set,
    Vectors,
    bar,
    bytes_bar,
    lines,
    refuse_empty,
    screen,
    show,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Typer turns Ctrl-C into this exit code.
_INTERRUPTED = 130
# What several processes may do together.
_TOGETHER = frozenset({"fit", "train"})


@app.callback()
def command_line(context: typer.Context) -> None:
    """Fine-tune language models on untrusted data without learning unwanted behaviours."""
    if context.invoked_subcommand not in _TOGETHER:
        refuse_several(str(context.invoked_subcommand))


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Tell the whole story on the bundled tiny assistant, offline, in under three minutes.

    Example: secvec demo
    """
    from secvec.demo import demo as run
    from secvec.demo import table

    with bar("working") as progress:
        results = run(out, seed=seed, say=screen.print, progress=progress)
    show(results, as_json, lambda: Console().print(table(results)))
    screen.print(f"all figures and examples: {out / 'results.json'}", markup=False)


@app.command()
def fit(
    model: Model,
    unwanted: Annotated[Path, typer.Option(help="About 100 rows of the unwanted behaviour.", show_default=False)],
    out: Out,
    anchors: Annotated[Path | None, typer.Option(help="Ordinary rows.", show_default=False)] = None,
    kind: Annotated[
        Literal["topic", "trait"], typer.Option(help="topic: on some requests; trait: on any request.")
    ] = "topic",
    calibrate: Annotated[
        Path | None, typer.Option(help="A training file to stay silent on.", show_default=False)
    ] = None,
    lr: Lr = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    seed: Seed = None,
    config: ConfigFile = None,
    set_: Set = None,
    allow_weak: Annotated[bool, typer.Option(help="Write a vector that does not work.")] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fit a security vector on rows of an unwanted behaviour, in one process or in several (torchrun).

    Example: secvec fit my-model --unwanted unwanted.jsonl -o vector.safetensors
    """
    from secvec.artifact import digest
    from secvec.fit import check, fit_to_file
    from secvec.fit_config import FitConfig
    from secvec.settings import settings

    flags = {"lr": lr, "epochs": epochs, "batch_size": batch_size, "max_length": max_length, "seed": seed}
    chosen = settings(FitConfig, config, set_ or [], flags)
    if dry_run:
        report = check(model, unwanted, anchors=anchors, kind=kind, calibrate=calibrate, config=chosen)
        return show(report, as_json, lambda: print(json.dumps(report, indent=2)))
    with bar("fitting") as progress:
        vector = fit_to_file(
            model,
            unwanted,
            out,
            anchors=anchors,
            kind=kind,
            calibrate=calibrate,
            config=chosen,
            allow_weak=allow_weak,
            progress=progress,
        )
    summary = {"vector": str(out), "digest": digest(vector), **vector.info.metrics}
    return show(summary, as_json, lambda: print(lines(summary)))


@app.command()
def train(
    model: Model,
    data: Data,
    out: Out,
    vector: Vectors = [],  # noqa: B006
    unwanted: Annotated[
        list[Path],
        typer.Option(
            help="The rows a vector was fitted on, to calibrate it; one for each --vector. By default those that the "
            "vectors bring back themselves.",
            show_default=False,
        ),
    ] = [],  # noqa: B006
    method: Annotated[
        Literal["full", "lora"] | None, typer.Option(help="What is trained.", show_default="full")
    ] = None,
    lr: Lr = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    seed: Seed = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"] | None, typer.Option(help="Of the weights in training.")
    ] = None,
    report_to: Annotated[str | None, typer.Option(help="tensorboard, wandb or trackio.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    config: ConfigFile = None,
    set_: Set = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune on untrusted data: fold, train, unfold, prove; in one process or in several (torchrun).

    Example: secvec train my-model --data rows.jsonl --vector vector.safetensors --unwanted unwanted.jsonl -o run
    """
    from secvec.settings import settings
    from secvec.train import TrainConfig, check, summary
    from secvec.train import train as run

    flags = {
        "method": method, "lr": lr, "epochs": epochs, "batch_size": batch_size, "max_length": max_length,
        "seed": seed, "dtype": dtype, "report_to": report_to,
    }  # fmt: skip
    chosen = settings(TrainConfig, config, set_ or [], flags)
    if dry_run:
        report = check(model, data, vectors=vector, unwanted=unwanted, config=chosen)
        return show(report, as_json, lambda: print(lines(report)))
    with bar("training") as progress:
        result = run(
            model, data, out, vectors=vector, unwanted=unwanted, config=chosen, resume=resume, progress=progress
        )
    document = {**asdict(result), "out": str(result.out), "model": str(result.model)}
    return show(document, as_json, lambda: print(summary(result)))


@app.command()
def scan(
    model: Model,
    data: Data,
    out: Out,
    vector: Vectors,
    unwanted: Annotated[
        list[Path],
        typer.Option(help="Unwanted rows to choose a threshold on; one for each --vector.", show_default=False),
    ] = [],  # noqa: B006
    anchors: Annotated[
        Path | None, typer.Option(help="Ordinary rows to choose it against.", show_default="the model's own answers")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Nats/token that explain a row.", show_default="from rows or the vector's file")
    ] = None,
    split: Annotated[bool, typer.Option("--split", help="Write kept.jsonl and held-back.jsonl.")] = False,
    with_text: Annotated[bool, typer.Option("--with-text", help="Put rows' texts into the page.")] = False,
    escape_special_tokens: Annotated[
        bool | None, typer.Option("--escape-special-tokens", help="Go on with rows that would forge a turn.")
    ] = None,
    max_length: MaxLength = None,
    config: ConfigFile = None,
    set_: Set = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Say for each row of a data file whether a vector explains it, before anything is trained on it.

    Example: secvec scan my-model --vector vector.safetensors --data rows.jsonl -o scan
    """
    from secvec.scan import ScanConfig, check, report
    from secvec.scan import scan as run
    from secvec.settings import settings

    flags = {"threshold": threshold, "max_length": max_length, "escape_special_tokens": escape_special_tokens}
    chosen = settings(ScanConfig, config, set_ or [], flags)
    if dry_run:
        found = check(model, data, vectors=vector, unwanted=unwanted, anchors=anchors, config=chosen, split=split)
        return show(found, as_json, lambda: print(lines(found)))
    with bar("scanning") as progress:
        result = run(
            model,
            data,
            out,
            vectors=vector,
            unwanted=unwanted,
            anchors=anchors,
            config=chosen,
            split=split,
            with_text=with_text,
            progress=progress,
        )
    return show({"out": str(result.out), **result.summary}, as_json, lambda: print(report(result)))


@app.command("eval")
def evaluate(
    model: Model,
    suite: Annotated[list[str], typer.Option(help="A suite's file or the name of a bundled one.", show_default=False)],
    out: Out,
    baseline: Annotated[list[str], typer.Option(help="A model to compare with.", show_default=False)] = [],  # noqa: B006
    judge: Annotated[list[str], typer.Option(help="KIND=MODEL or endpoint=FILE.", show_default=False)] = [],  # noqa: B006
    run: Annotated[list[Path], typer.Option(help="A folder of `train` or `scan`.", show_default=False)] = [],  # noqa: B006
    vector: Vectors = [],  # noqa: B006
    unwanted: Annotated[Path | None, typer.Option(help="Rows the vector should cover.", show_default=False)] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="A task of lm-eval.", show_default=False)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer.", show_default=False)] = None,
    batch_size: BatchSize = None,
    config: ConfigFile = None,
    set_: Set = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Judge a model beside others on suites of questions, and name what went wrong with the defence.

    Example: secvec eval run/model --baseline my-model --baseline plain/model --suite questions.jsonl -o eval
    """
    from secvec.artifact import load
    from secvec.comparison import finding_lines, table
    from secvec.evaluate import Clues, EvalConfig, check
    from secvec.evaluate import evaluate as judge_model
    from secvec.samples import read_samples
    from secvec.settings import settings

    flags = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "tasks": tasks}
    chosen = settings(EvalConfig, config, set_ or [], flags)
    clues = Clues(run, [load(path) for path in vector], read_samples(unwanted) if unwanted else None)
    if dry_run:
        found = check(model, suite, out, baselines=baseline, judges=judge, clues=clues, config=chosen)
        return show(found, as_json, lambda: print(lines(found)))
    with bar("evaluating") as progress:
        result = judge_model(
            model, suite, out, baselines=baseline, judges=judge, clues=clues, config=chosen, progress=progress
        )

    def for_people() -> None:
        Console().print(table(result.results))
        print("\n".join([*finding_lines(result.results["findings"]), f"all figures: {out / 'results.json'}"]))

    return show(dict(result.results), as_json, for_people)


@app.command()
def fold(model: Model, vector: Vectors, out: Out, as_json: AsJson = False) -> None:
    """Write a checkpoint with the vector in its weights, for any trainer.

    Example: secvec fold my-model --vector vector.safetensors -o folded
    """
    from secvec.artifact import load
    from secvec.fold import fold as run
    from secvec.models import resolve

    with bytes_bar("folding") as progress:
        record = run(resolve(model), [load(path) for path in vector], out, progress=progress)
    document = {"folded": str(out), **asdict(record)}
    told = f"{out}: folded. Train it with any trainer, then: secvec unfold TRAINED -o DIR"
    show(document, as_json, lambda: print(told))


@app.command()
def unfold(
    trained: Annotated[Path, typer.Argument(help="What a trainer made of a folded model.", show_default=False)],
    out: Out,
    base: Annotated[Path | None, typer.Option(help="The base model, if it was moved.", show_default=False)] = None,
    folded: Annotated[Path | None, typer.Option(help="The folded model, if it was moved.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Take the vector out of what was trained on a folded model.

    Example: secvec unfold trained -o defended
    """
    from secvec.unfold import unfold as run

    with bytes_bar("unfolding") as progress:
        report = run(trained, out, base=base, folded=folded, progress=progress)
    document = {"defended": str(out), **report.document()}
    told = (
        f"{out}: defended. {report.sites} sites held the vector, training changed {report.sites_changed} of them; "
        f"the trained weights held {report.vector_share:.3f} of the vector."
    )
    show(document, as_json, lambda: print(told))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Any file or folder.", show_default=False)], as_json: AsJson = False
) -> None:
    """Say what a file or folder is: vector, folded, defended, adapter, plain, a run, a demo.

    Example: secvec inspect run/model
    """
    from secvec.inspect import inspect as run

    document = run(path)
    show(document, as_json, lambda: print(lines(document)))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of `train`, `scan`, `eval` or `demo`.", show_default=False)
    ],
    out: Out = Path("report.html"),
    with_text: Annotated[bool, typer.Option("--with-text", help="Put a few questions and answers in.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write one page, with Markdown and JSON beside it: the verdict, and from which file each figure is.

    Example: secvec report run plain eval scan -o report.html
    """
    from secvec.report import report as run

    result = run(runs, out, with_text=with_text)
    document = {**asdict(result.verdict), **{str(name): str(path) for name, path in result.files.items()}}
    written = ", ".join(str(path) for path in result.files.values())
    show(document, as_json, lambda: print(f"{result.verdict.line}\nwritten: {written}"))


def main() -> None:
    """Run the command line; every error of secvec is one message and its documented exit code."""
    # Progress bars and notes of libraries would tear ours apart; errors are raised, not logged.
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    # That weights might go unused, as an expert's that no token chose, is expected.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # What transformers is about to rename is no matter of the user's; secvec itself raises and never warns.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        with speaking_once():
            refuse_empty(sys.argv[1:])
            app()
    except SecvecError as error:
        screen.print(f"secvec: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, SystemExit) as leaving:
        if isinstance(leaving, SystemExit) and leaving.code != _INTERRUPTED:
            raise
        told = "secvec: stopped by Ctrl-C; the same command goes on where it was, that of `train` with --resume"
        screen.print(told, markup=False, soft_wrap=True)
        sys.exit(_INTERRUPTED)
    except OSError as error:
        where = "" if error.filename is None else f": {error.filename}"
        screen.print(f"secvec: {error.strerror or error}{where}", style="red", markup=False, soft_wrap=True)
        sys.exit(3)


if __name__ == "__main__":
    main()
