"""The tables of quality, as Markdown; "" if there is nothing to show."""

from __future__ import annotations

from . import measures
from .cells import columns_used, counted, listed, named, number, quoted, shown, table
from .names import MEMORY, Setting
from .rows import Results, Table
from .tables import by_task

# Number of requests of each task whose answers are shown.
ANSWERS = 5


def silent_tasks(results: Results) -> dict[str, str]:
    """Tasks that tell nothing apart, with the label that the model always gives (see `measures.one_label_tasks`)."""
    return measures.one_label_tasks(results.judged, results.metrics, MEMORY)


def telling(results: Results) -> Table:
    """Judged rows of tasks that count in means of quality."""
    rows = results.judged
    return rows[~rows["task"].isin(list(silent_tasks(results)))]


def note_on_silent_tasks(results: Results) -> str:
    """A sentence that names the tasks that do not count; "" if all count."""
    found = silent_tasks(results)
    if not found:
        return ""
    each = listed([f"{task} ({label!r})" for task, label in found.items()])
    verb = "is" if len(found) == 1 else "are"
    return (
        f"{each} {verb} answered with one label by the model with the whole prefix in memory, although the right "
        "answers differ. Such a task cannot tell systems apart, so it counts in no mean of quality."
    )


def headline(results: Results) -> str:
    """Mean of the tasks' scores, the difference from in memory, and KL at the answer."""
    rows = telling(results)
    lines = []
    for setting in measures.settings(rows):
        score = measures.mean_of(rows, setting, "score")
        any_ = score or measures.mean_of(rows, setting, "kl_answer") or measures.mean_of(rows, setting, "kl")
        against = measures.difference(rows, setting, MEMORY) if setting != MEMORY else None
        lines.append(
            [
                *named(setting),
                counted(any_),
                str(any_.prefixes) if any_ else "",
                str(measures.of(rows, setting)["task"].nunique()),
                shown(score, 100, 1),
                shown(against, 100, 1, sign=True),
                counted(against),
                shown(measures.mean_of(rows, setting, "kl_answer"), digits=4),
            ]
        )
    head = ["system", "budget", "n", "prefixes", "tasks", "score", "points from in memory", "pairs"]
    return table(*columns_used([*head, "KL at the answer, nats"], lines)) if lines else ""


def distances(results: Results) -> str:
    """KL and agreement over the question's tokens, and the answer's perplexity."""
    rows = telling(results)
    lines = []
    for setting in measures.settings(rows):
        divergence = measures.mean_of(rows, setting, "kl")
        agreement = measures.mean_of(rows, setting, "agreement")
        lines.append(
            [
                *named(setting),
                counted(divergence or agreement),
                shown(divergence, digits=4),
                shown(agreement, 100, 1),
                number(measures.perplexity(rows, setting), 3),
            ]
        )
    head = ["system", "budget", "n", "KL over the question, nats", "agreement, %", "perplexity"]
    return table(*columns_used(head, lines)) if any(any(line[2:]) for line in lines) else ""


def scores_by_task(results: Results) -> str:
    """Mean score of each task; the first row has the metrics."""
    rows = results.judged

    def cell(setting: Setting, task: str) -> str:
        return shown(measures.mean_of(rows, setting, "score", task), 100, 1)

    metrics = results.metrics
    return by_task(rows, cell, [metrics.get(task, "") for task in measures.tasks(rows)], "metric")


def differences_by_task(results: Results) -> str:
    """Difference in points of score from in memory, per task."""
    rows = results.judged

    def cell(setting: Setting, task: str) -> str:
        if setting == MEMORY:
            return ""
        return shown(measures.difference(rows, setting, MEMORY, task), 100, 1, sign=True)

    return by_task(rows, cell)


def distances_by_task(results: Results) -> str:
    """KL at the answer, per task."""
    rows = results.judged

    def cell(setting: Setting, task: str) -> str:
        return shown(measures.mean_of(rows, setting, "kl_answer", task), digits=4)

    return by_task(rows, cell)


def answers(results: Results) -> list[tuple[str, str]]:
    """For every task with generated answers: each setting's answers to the first few requests."""
    found = []
    rows = results.judged[results.judged["prediction"].notna()]
    for task in (task for task in measures.tasks(rows) if results.metrics.get(task) != "accuracy"):
        mine = rows[rows["task"] == task]
        numbers = sorted(mine["number"].unique())[:ANSWERS]
        lines = []
        for setting in measures.settings(mine):
            own = measures.of(mine, setting).drop_duplicates("number").set_index("number")["prediction"]
            lines.append([*named(setting), *(quoted(own.get(number)) for number in numbers)])
        head = ["system", "budget", *(f"request {number}" for number in numbers)]
        found.append((f"Answers to the first requests of {task}:", table(head, lines, len(head))))
    return found
