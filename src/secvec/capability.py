"""Capability through lm-eval: its tasks and its scores, on a model folder; nothing of it is rewritten here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from secvec.answering import Subject
from secvec.atomic import write_json
from secvec.errors import MissingExtraError, UsageError
from secvec.models import load_model, load_tokenizer, on_device
from secvec.tripwire import read_json


@dataclass(frozen=True)
class Tasks:
    """names: of lm-eval's tasks; folder: of task files of your own; limit: questions a task, None for all."""

    names: Sequence[str]
    folder: Path | None
    limit: int | None
    batch_size: int


def check_tasks(tasks: Tasks) -> None:
    """Raises MissingExtraError where lm-eval is not installed, UsageError on a task that it does not know."""
    if tasks.names:
        known = _manager(tasks).match_tasks(list(tasks.names))
        if missing := [name for name in tasks.names if name not in known]:
            raise UsageError(f"--tasks: lm-eval knows no {missing[0]!r}; name the folder with its file (task_folder)")


def measure(subject: Subject, tasks: Tasks, path: Path) -> Mapping[str, Any]:
    """Return lm-eval's scores by task, as it names them; kept in `path` with what they depend on."""
    manager = _manager(tasks)
    lm_eval, huggingface = import_module("lm_eval"), import_module("lm_eval.models.huggingface")
    about: dict[str, Any] = {
        "model": subject.digest,
        "tasks": list(tasks.names),
        "limit": tasks.limit,
        "lm_eval": lm_eval.__version__,
    }
    if path.is_file() and (kept := read_json(path)).get("about") == about:
        return kept["results"]
    model, tokenizer = load_model(subject.folder), load_tokenizer(subject.home)
    on_device(model)
    found: Any = lm_eval.simple_evaluate(
        model=huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=tasks.batch_size),
        tasks=list(tasks.names),
        task_manager=manager,
        limit=tasks.limit,
        log_samples=False,
    )
    results = {task: {k: v for k, v in scores.items() if _is_number(v)} for task, scores in found["results"].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"about": about, "results": results})
    return results


def _manager(tasks: Tasks) -> Any:
    try:
        lm_eval_tasks = import_module("lm_eval.tasks")
    except ImportError as error:
        raise MissingExtraError("lm-eval", "eval") from error
    return lm_eval_tasks.TaskManager(include_path=None if tasks.folder is None else str(tasks.folder))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and value == value
