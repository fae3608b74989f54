"""The account that Prepare gives of what it left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import Any

from etils import epath

from t5style import console
from t5style.corpus.document import atomic_open
from t5style.corpus.passes import EXAMPLES, chunk_file
from t5style.corpus.tally import Row
from t5style.run_dir import RunDir


def card_row(row: Row) -> dict[str, Any]:
    """A stage's row of the data card: without the seconds, which are never the same twice."""
    return {
        "name": row.name,
        "in": row.documents,
        "kept": row.kept,
        "changed": row.changed,
        "dropped": dict(sorted(row.dropped.items())),
        "characters": row.characters,
    }


def gather(run: RunDir, work: epath.Path, passes: int, chunks: int, more: Sequence[bytes]) -> None:
    """Collects what the chunks set aside: all of the quarantine, a few examples of each reason for
    dropping.
    """
    shown: dict[str, int] = {}
    with (
        atomic_open(run.path / "quarantine.jsonl") as quarantine,
        atomic_open(run.path / "dropped.jsonl") as dropped,
    ):
        for number in range(passes):
            for index in range(chunks):
                with chunk_file(work, number, index, "quarantine").open("rb") as file:
                    shutil.copyfileobj(file, quarantine)
                for line in chunk_file(work, number, index, "dropped").read_bytes().splitlines(keepends=True):
                    reason = json.loads(line)["reason"]
                    shown[reason] = shown.get(reason, 0) + 1
                    if shown[reason] <= EXAMPLES:
                        dropped.write(line)
        dropped.write(b"".join(more))


def tell(run: RunDir, figures: dict[str, Any]) -> None:
    """Prints what came of it."""
    rows = [(name, *row.values()) for name, row in figures["splits"].items()]
    console.table(f"documents in {run.path}", ("split", "documents", "characters", "bytes"), rows)
    rows = list(figures["dropped"].items())
    if figures["quarantined"]:
        rows.append(("could not be read (quarantine.jsonl)", figures["quarantined"]))
    if rows:
        console.table("left out (examples in dropped.jsonl)", ("reason", "documents"), rows)
