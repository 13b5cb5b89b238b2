"""General ability: lm-eval's tasks on the model as it now is.

1. lm-eval asks the Hugging Face model behind the lens, whose weights are the lens's own: patches in
   force count, and those of `patches` are applied on entry and taken off on exit.
2. Interventions and hooks live in the hooked model alone, where lm-eval would not see them: they
   are refused.

Needs the extra `ability` (`pip install 'qv_lens[ability]'`: lm-eval, EleutherAI)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from qv_lens.errors import ConfigError, check_count, check_seed, meant
from qv_lens.facts.spans import puts_bos
from qv_lens.models.lens import Lens
from qv_lens.patch import Patch

#: a task by its name in lm-eval, or its configuration (the keys of lm-eval's task files)
Task = str | Mapping[str, Any]


def ability(
    lens: Lens,
    tasks: Sequence[Task],
    patches: Patch | Sequence[Patch] = (),
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> pd.DataFrame:
    """lm-eval's tasks on the model as it now is: `task, metric, value, error, questions`.

    `tasks`: names (`"arc_easy"`; their data are downloaded by lm-eval), or configurations of tasks
    of one's own. `patches`: applied while it is asked. `limit`: questions of each task (None: all).
    `shots`: worked examples in front (None: the task's own number). `error`: lm-eval's standard
    error; NaN where it gives none.

    Raises `ConfigError` without lm-eval, for interventions or hooks in force, for a BOS that lm-eval
    would not put, for no task, and for one that lm-eval does not have or whose questions it cannot
    read; `ModelError` where no Hugging Face model holds the weights.
    """
    if isinstance(tasks, (str, Mapping)) or not tasks:
        raise ConfigError(f"tasks= takes a list of tasks, as ['arc_easy'], got {tasks!r:.100}.")
    if limit is not None:
        check_count("limit (None: all questions)", limit)
    if shots is not None:
        check_count("shots (None: the task's own)", shots, 0)
    check_count("batch_size", batch_size)
    seed = check_seed(seed)
    try:
        run = import_module("lm_eval").simple_evaluate
        wrapper = import_module("lm_eval.models.huggingface").HFLM
        manager = import_module("lm_eval.tasks").TaskManager
    except ImportError as error:
        raise ConfigError(
            "General ability is measured by lm-eval, which is not installed: pip install "
            "'qv_lens[ability]'."
        ) from error
    index, bos = _index(manager, tasks), _asked_with_bos(lens)
    with lens.patched(*([patches] if isinstance(patches, Patch) else patches)):
        label = lens.label
        wrapped = wrapper(
            pretrained=lens.plain_model(),
            tokenizer=deepcopy(lens.tokenizer),  # lm-eval gives it padding
            add_bos_token=bos,
            batch_size=batch_size,
        )
        try:
            results = run(
                model=wrapped,
                tasks=[task if isinstance(task, str) else dict(task) for task in tasks],
                task_manager=index,
                limit=limit,
                num_fewshot=shots,
                bootstrap_iters=0,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (ConnectionError, FileNotFoundError) as error:
            raise ConfigError(
                f"lm-eval cannot read the questions of these tasks, which it downloads: {error}. "
                "Ask where there is a network, or give a task of your own as a dictionary."
            ) from error
    frame = _table(results)
    frame.attrs.update(label)
    return frame


def _asked_with_bos(lens: Lens) -> bool:
    """Whether prompts begin with a BOS, as the lens reads them. Raises `ConfigError` where the lens
    puts one that the tokenizer does not: lm-eval asks the tokenizer alone."""
    own = puts_bos(lens.tokenizer)
    if lens.prepend_bos and not own:
        raise ConfigError(
            "This lens puts a BOS in front of prompts (prepend_bos=True) that its tokenizer does not "
            "put there, and lm-eval would ask without it: load the model with prepend_bos=False."
        )
    return own


def _index(manager: Any, tasks: Sequence[Task]) -> Any:
    """lm-eval's index of its own tasks, whose files take half a minute to read: empty where every
    task is given whole. Raises `ConfigError` for a name that is not in it."""
    named = any(isinstance(task, str) or "group" in task for task in tasks)
    index = manager(include_defaults=named)
    for task in tasks:
        if isinstance(task, str) and task not in index.all_tasks and not Path(task).is_file():
            raise ConfigError(
                f"lm-eval has no task {task!r}, and no file is called so."
                f"{meant(task, index.all_tasks)} `lm-eval ls tasks` lists its tasks."
            )
    return index


def _table(results: Mapping[str, Any]) -> pd.DataFrame:
    """lm-eval's results, whose keys are "metric,filter" and "metric_stderr,filter"."""
    rows = []
    for task, values in results["results"].items():
        questions = results["n-samples"].get(task, {}).get("effective")
        for key, value in values.items():
            metric, _, sieve = key.partition(",")
            if not sieve or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{sieve}")
            name = metric if sieve == "none" else f"{metric}, {sieve}"
            rows.append(
                {
                    "task": task,
                    "metric": name,
                    "value": float(value),
                    "error": error if isinstance(error, float) else float("nan"),
                    "questions": questions,
                }
            )
    return pd.DataFrame(rows, columns=["task", "metric", "value", "error", "questions"])
