"""Words to calls. No logic: every command hands its words to the Python API and prints what comes back."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from metier.core import InterruptedRunError, MetierError, RecipeError
from metier.core.files import storage_error
from metier.core.log import set_quiet
from metier.core.version import __version__

DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG})
"""What the system says when a disk does not take any more, wherever it is met."""

app = typer.Typer(
    name="metier",
    help="Turn a general pretrained model into a specialist, and prove it. 通专：把通用模型变成专才，并给出证据。",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin: metier init --model MODEL --data FILE -o job.yaml; metier check job.yaml; metier train job.yaml",
)

JobFile = Annotated[Path, typer.Argument(metavar="JOB.YAML", help="The recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, such as train.learning_rate=2e-4."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say only warnings and errors.")]
TrustCode = Annotated[
    str | None,
    typer.Option("--trust-code", metavar="REV", help="Let the model run its own code, of this commit or sha256 alone."),
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.", show_default=False)]


def _version(value: bool) -> None:  # noqa: FBT001 - typer's callback form
    if value:
        typer.echo(f"metier {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn a general pretrained model into a specialist, and prove it. 通专：把通用模型变成专才，并给出证据。"""


@app.command()
def init(
    model: Annotated[str, typer.Option("--model", "-m", help="Hub id, folder, GGUF file, or demo:smollm2-135m.")],
    data: Annotated[str, typer.Option("--data", "-d", help="File of training rows.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here; stdout without.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a commented recipe from what the model and the rows look like."""
    from metier import api
    from metier.core.files import write_text

    set_quiet(quiet=quiet)
    text = api.init(model, data, f"runs/{output.stem}" if output else "runs/job")
    if output is not None:
        if output.exists():
            raise _usage(f"{output} exists already", "name another file with --output")
        write_text(output, text)
    if as_json:
        _print({"recipe": text, "file": str(output) if output else None})
    elif output is None:
        typer.echo(text)


@app.command()
def check(
    job: JobFile,
    overrides: Overrides = None,
    trust_code: TrustCode = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check recipe, model and every row; show three examples as the model meets them. Loads no weights."""
    from metier import api
    from metier.render import checked

    set_quiet(quiet=quiet)
    found = api.check(job, *_given(overrides, trust_code))
    if as_json:
        _print(checked.as_json(found))
    else:
        checked.show(found)


@app.command()
def plan(
    job: JobFile,
    overrides: Overrides = None,
    probe: Annotated[bool, typer.Option("--probe", help="Load the model and confirm with a few real steps.")] = False,
    trust_code: TrustCode = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Parameters, peak memory and time for full fine-tuning, LoRA, freezing and QLoRA."""
    from metier import api

    set_quiet(quiet=quiet)
    found = api.plan(job, *_given(overrides, trust_code), probe=probe)
    from metier.render import planned  # after the recipe was read: a typo in it answers at once

    if as_json:
        _print(found.model_dump(mode="json"))
    else:
        planned.show(found)


@app.command()
def train(
    job: JobFile,
    overrides: Overrides = None,
    trust_code: TrustCode = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tune, measure before and after, write the report. The same command resumes an interrupted run."""
    from metier import api

    set_quiet(quiet=quiet)
    run = api.train(job, *_given(overrides, trust_code))
    from metier.report import summary  # after the recipe was read: a typo in it answers at once

    if as_json:
        _print({"run": str(run.path), "report": str(run.report), "evidence": run.evidence.model_dump(mode="json")})
    else:
        typer.echo(summary(run.evidence))
        typer.echo(f"\nreport: {run.report}")


@app.command()
def compare(
    job: JobFile,
    overrides: Overrides = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", "-m", help="Such as lora,full,freeze,lora:rank=8,lora+kl=0.1; else the recipe's."),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", "-s", help="Whole trainings of each method.")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", "-b", help="Time all of it may take, such as 20min.")
    ] = None,
    data_curve: Annotated[
        str | None, typer.Option("--data-curve", help="Shares of the training rows in percent, such as 25,50,100.")
    ] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Say what it would do and take, and stop.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Set ways to tune beside each other on your data, over seeds; the same command resumes an interrupted one.

    With several recipes on one base, instead: one adapter for each task, and every way to hold them all.
    """
    from metier import api
    from metier.render import compared

    set_quiet(quiet=quiet)
    others, settings = compared.told_apart(overrides or ())
    asked = compared.asked(methods=methods, seeds=seeds, budget=budget, data_curve=data_curve)
    if others:
        if plan_only or any(value is not None for key, value in asked.items() if key != "seeds"):
            raise _usage(
                "--methods, --budget, --data-curve and --plan-only are for one recipe",
                "leave them out: several tasks are each tuned by LoRA, with the rate that its recipe says",
            )
        several = api.compare_tasks([job, *others], *settings, seeds=seeds)
        _print(compared.several_as_json(several)) if as_json else compared.show_several(several)
        return
    if plan_only:
        outline = api.plan_comparison(job, *overrides or (), **asked)
        _print(outline.model_dump(mode="json")) if as_json else compared.show_plan(outline)
        return
    found = api.compare(job, *overrides or (), **asked)
    if as_json:
        _print(compared.as_json(found))
    else:
        compared.show(found)


@app.command()
def evaluate(
    run: RunPath,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Other test rows in the run's format.")] = None,
    fail_under: Annotated[
        list[str] | None, typer.Option("--fail-under", help="METRIC=VALUE; exit 3 when the figure is worse.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a finished run on its test rows, or on others."""
    from metier import api
    from metier.render import measures

    set_quiet(quiet=quiet)
    gates = measures.read_gates(fail_under or ())
    found = api.load(run).evaluate(data)
    missed = measures.missed(found, gates)
    if as_json:
        shown = {"measures": [measure.model_dump(mode="json") for measure in found]}
        _print(shown | _as_json(missed) if missed else shown)
    else:
        measures.show(found)
    if missed:
        _tell(missed)
        raise typer.Exit(missed.exit_code)


@app.command()
def predict(
    run: RunPath,
    data: Annotated[
        Path,
        typer.Option(
            "--data", "-d", help="JSONL, CSV or plain text file of questions, - for stdin; h5ad or h5mu of cells."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write JSONL, or h5ad for cells, here; stdout without.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer every row of a file, one JSON object a line; predict the proteins of cells into an h5ad."""
    from metier import api
    from metier.core.files import write_text
    from metier.data import read_questions
    from metier.render import predicted

    set_quiet(quiet=quiet)
    if output is not None and output.is_dir():
        raise _usage(f"--output {output} is a folder", "name a file in it")
    specialist = api.load(run)
    if predicted.reads_cells(specialist):
        told = predicted.cells(specialist, data, output)
        _print(told) if as_json else typer.echo(f"{told['cells']:,} cells: {told['file']}")
        return
    rows = predicted.rows(specialist, read_questions(data), max_new_tokens)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output is not None:
        write_text(output, text)
    if as_json:
        _print({"predictions": rows, "file": str(output) if output else None})
    elif output is None:
        typer.echo(text, nl=False)


@app.command()
def chat(
    run: RunPath,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Answer this and end.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Show the untuned base's answer beside it.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Talk to a tuned model; with --base, see what tuning changed."""
    from metier.render import conversation

    set_quiet(quiet=quiet)
    conversation.hold(run, message=message, base=base, as_json=as_json)


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("runs"), as_json: Json = False) -> None:
    """List runs and comparisons: finished, or what can be resumed and how."""
    from metier.render import history

    if folder.is_file():
        raise _usage(f"{folder} is a file", "name the folder in which the runs lie")
    found = history.rows(folder)
    if as_json:
        _print({"runs": found})
    else:
        history.show(found, folder)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE-OR-FOLDER", help="A checkpoint of any kind.")],
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds and what reading it elsewhere would run. Loads nothing, runs nothing."""
    from metier import models
    from metier.render import inspected

    found = models.inspect(checkpoint)
    if as_json:
        _print(inspected.as_json(found))
    else:
        inspected.show(found)


@app.command()
def schema(
    of: Annotated[
        Literal["recipe", "evidence", "comparison", "interference"], typer.Argument(help="What to describe.")
    ] = "recipe",
    as_json: Json = True,  # noqa: ARG001 - a schema is JSON in any case
) -> None:
    """Print the JSON Schema of recipes, for editors, or of the files of figures, for programs."""
    from metier import recipe, report

    _print(recipe.json_schema() if of == "recipe" else report.json_schema(of))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where the runs go.")] = Path("runs/demo"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tune a real model on a support desk's messages by LoRA and fully, and compare."""
    from metier import demo as support_desk

    set_quiet(quiet=quiet)
    result = support_desk.run(folder)
    if as_json:
        _print(result.as_json())
    else:
        result.show()


def _given(overrides: list[str] | None, trust_code: str | None) -> list[str]:
    """The overrides, with what an option says among them."""
    return [*(overrides or ()), *([f"model.trust_code={trust_code}"] if trust_code else ())]


SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false",
    # Packs of ever new sizes else leave gaps in a GPU's memory that no later one fits; Windows cannot.
    **({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} if sys.platform == "linux" else {}),
}
"""What other libraries read from the environment, unless the user has set it."""


def main() -> None:
    """Run the command line; a user's mistake ends in one message and its exit code."""
    os.environ.update({**SETTINGS, **os.environ})
    # Training has its own, gentler handlers; anywhere else a signal ends the work in order, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(_call(sys.argv[1:] or ["--help"]))
    except MetierError as error:
        _end(error)
    except (KeyboardInterrupt, typer.Abort):
        _end(
            InterruptedRunError("stopped", where="metier", hint="the same command begins anew, or goes on if it trains")
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            _end(storage_error(Path(str(error.filename or "the disk")), error))
        # Newer releases of typer keep click's errors under a private name, so they are known by their shape.
        if hasattr(error, "format_message"):
            _end(_usage(str(error.format_message()), "`metier --help` and `metier COMMAND --help` tell more"))
        if os.environ.get("METIER_DEBUG"):
            raise
        _say_bug(error)
        sys.exit(1)


def _call(words: list[str]) -> int:
    code = int(app(args=words, standalone_mode=False) or 0)
    if code == 128 + signal.SIGINT:  # how typer tells of an interrupt
        raise KeyboardInterrupt
    return code


def _end(error: MetierError) -> NoReturn:
    if "--json" in sys.argv:
        _print(_as_json(error))
    _tell(error)
    sys.exit(error.exit_code)


def _tell(error: MetierError) -> None:
    for fault in error.faults:
        typer.echo(f"error: {fault}", err=True)


def _as_json(error: MetierError) -> dict[str, Any]:
    faults = [{"where": fault.where, "what": fault.what, "hint": fault.hint} for fault in error.faults]
    return {"error": type(error).__name__, "exit_code": error.exit_code, "faults": faults}


def _say_bug(error: Exception) -> None:
    """A crash is ours: keep the traceback in a file and say where."""
    what = f"a bug in metier: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    try:
        hint = f"please report it with {_keep_traceback(error)}"
    except OSError:
        hint = "please report it with what METIER_DEBUG=1 shows"
    if "--json" in sys.argv:
        _print({"error": "bug", "exit_code": 1, "faults": [{"where": "metier", "what": what, "hint": hint}]})
    typer.echo(f"error: {what} - {hint}", err=True)


def _keep_traceback(error: Exception) -> str:
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile(
        "w", prefix="metier-crash-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write("".join(traceback.format_exception(error)))
        return file.name


def _usage(what: str, hint: str) -> MetierError:
    return RecipeError(what, where="command line", hint=hint)


def _print(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))
