"""What `metier check` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from metier.render.screen import screen

if TYPE_CHECKING:
    from metier.run import Job


def as_json(job: Job) -> dict[str, Any]:
    """The check as plain values."""
    return {
        "format": job.splits.format,
        "reason": job.splits.reason,
        "rows": {
            "train": len(job.splits.train),
            "validation": len(job.splits.validation),
            "test": len(job.splits.test),
            "measured": len(job.test),
        },
        "task": job.task.kind,
        "head": job.head,
        "labels": list(job.labels),
        "tokens": sum(job.sizes()),
        "facts": list(job.splits.facts),
        "notes": list(job.notes),
        "examples": [
            {"where": shown.where, "parts": [{"text": text, "learnt": learnt} for text, learnt in shown.parts]}
            for shown in job.shown()
        ],
    }


def show(job: Job) -> None:
    """The check for people: learnt text is bold and underlined on a terminal, and stands in [[ ]] elsewhere."""
    console = screen()
    splits = job.splits
    console.print(f"{job.recipe.data.train}: {splits.reason}", markup=False)
    rows = f"{len(splits.train)} training, {len(splits.validation)} validation, {len(splits.test)} test"
    console.print(f"rows: {rows} ({len(job.test)} will be measured)")
    sizes = sorted(job.sizes())
    if sizes[-1] > 1:
        console.print(f"tokens: {sum(sizes):,} in training rows, median {sizes[len(sizes) // 2]}, longest {sizes[-1]}")
    if job.labels:
        console.print(
            f"classes: {len(job.labels)}: {', '.join(job.labels[:12])}{' ...' if len(job.labels) > 12 else ''}"
        )
    for shown in job.shown():
        console.print(f"\n{shown.where} (what is learnt is {'underlined' if console.is_terminal else 'in [[ ]]'}):")
        text = Text()
        for part, learnt in shown.parts:
            marked = f"[[{part}]]" if learnt and not console.is_terminal else part
            text.append(marked, style="bold underline" if learnt else "dim")
        console.print(text)
    for fact in splits.facts:
        console.print(f"\n{fact}", markup=False)
    for note in job.notes:
        console.print(f"\nnote: {note}", markup=False)
    console.print("\nno faults found")
