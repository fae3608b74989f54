"""The report of a prepared corpus, from what its preparation left in its folder:

    data_report.html    one page that needs nothing else, scripts included: there are none
    croissant.json      the same for machines (croissant.py)
    README.md           a dataset card as the Hugging Face Hub reads it

It reads data_card.json, timings.json, dropped.jsonl, quarantine.jsonl and clusters.jsonl: summaries and
examples, so that its cost does not grow with the corpus. Only checksums need the documents' files
(croissant.py). A document may hold anything: all text is escaped, and the page's content security policy
forbids scripts and fetching.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from etils import epath

from t5style import console
from t5style.report import croissant, dataset_card, diff, pictures, sections
from t5style.report.report import environment, percent, size
from t5style.report.stage import Stage
from t5style.run_dir import PathLike, RunDir, UserError, atomic_write, now

REPORT = "data_report.html"
CROISSANT = "croissant.json"
CARD = "README.md"

EXAMPLES = 5  # dropped documents shown of each reason
REASONS = 80  # reasons with examples
TEXT = 700  # characters of each example
FILES = 20  # unreadable files shown of each reason
CLUSTERS = 12  # groups of duplicates shown
COPIES = 2  # copies of each compared with the one that was kept
ROWS = 15  # of a table before the rest is folded away
MORE_ROWS = 400  # in the folded part
NGRAMS = 20
# Lines read of the files of examples: enough for every reason, and seconds at most.
LINES = 100_000
CLUSTER_LINES = 2_000

_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
_NUMBER = re.compile(r"\+?\d(?:[ ().-]{0,2}\d){8,40}")  # nine digits or more: dates stay

# What a card of before these were counted says about them.
_DEFAULTS: dict[str, Any] = {"cut_in_two": 0, "copies": 0, "quarantined": 0, "extends": None, "erased": ()}


@dataclasses.dataclass(frozen=True)
class DataReport:
    """Write the report of a prepared corpus into the corpus's folder, anew if it is there.

    Attributes:
      corpus: run folder of the corpus, or 'run:' and the name of its stage.
    """

    corpus: str

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.corpus:
            raise UserError("DataReport.corpus is empty: name the run folder of a prepared corpus")

    def inputs(self) -> list[str]:
        return [self.corpus]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """The report, the metadata and the dataset card lie beside the documents that they describe.

        Raises:
          UserError: the folder holds no prepared corpus, or a damaged one.
        """
        path = write(self.corpus)
        console.say(f"    open {os.path.abspath(path)} in a browser")
        run.create()
        return {"report": os.fspath(path), "bytes": path.stat().length}


def write(folder: PathLike) -> epath.Path:
    """Writes the report, the Croissant metadata and the dataset card into a corpus's folder.

    Returns:
      The page's path.

    Raises:
      UserError: there is no data_card.json, or a file is damaged.
    """
    run = RunDir(folder)
    stage = Stage(os.path.basename(os.path.abspath(run.path)), run.path, run.read_manifest() or {})
    card = stage.json("data_card.json")
    if card is None:
        raise UserError(
            f"{run.path} has no data_card.json, so no corpus was prepared there: name another folder"
        )
    context = build(stage, _DEFAULTS | card)
    html = environment()
    html.filters["short"] = pictures.short
    page = html.get_template("data_report.html.jinja").render(context)
    facts = {name: context[name] for name in ("description", "version", "date", "citation")}
    metadata = croissant.describe(run.path, card, stage.name, facts)
    for name, text in (
        (CROISSANT, json.dumps(metadata, indent=1, ensure_ascii=False) + "\n"),
        (CARD, dataset_card.render(context)),
        (REPORT, page),
    ):
        # Texts cut in the middle of a surrogate pair cannot be said in UTF-8.
        atomic_write(run.path / name, text.encode("utf-8", "replace").decode())
    return run.path / REPORT


def build(stage: Stage, card: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the templates show."""
    stages = stage_rows(stage, card)
    seconds = sum(row["seconds"] for row in stages)
    for row in stages:
        row["time"] = row["seconds"] / seconds if seconds else 0.0
    lineage = sections.lineage([stage])
    date = (stage.manifest.get("finished") or now())[:10]
    reasons = why(stage, card, stages)
    context = {
        "name": stage.name,
        "made": now(),
        "date": date,
        "card": card,
        "kept_bytes": _total(card, "bytes"),
        "kept_characters": _total(card, "characters"),
        "dropped": sum((card.get("dropped") or {}).values()),
        "seconds": (stage.json("timings.json") or card).get("seconds"),
        "stages": stages,
        "stage_seconds": seconds,
        "stream": pictures.stream(stages),
        "reasons": reasons,
        "tables": tables(card),
        "histograms": measures(card),
        "duplicates": duplicates(stage, card),
        "ngrams": ngrams(card),
        "pii": sorted((card.get("pii") or {}).items(), key=lambda item: -item[1]["found"]),
        "searched": croissant.searched(card),
        "quarantine": quarantine(stage, card),
        "lineage": lineage,
        "settings": sections.tree(card["stages"]) if card.get("stages") else "",
        "version": f"1.{len(card.get('erased') or ())}.0",
    }
    context["description"] = (
        f"{card['documents']:,} documents, {size(context['kept_bytes'])} of text, kept of "
        f"{card['documents_in']:,} documents read; prepared with t5style."
    )
    context["citation"] = _citation(stage, card, lineage, date)
    context["tiles"] = tiles(context)
    context["findings"] = findings(context)
    return context


def stage_rows(stage: Stage, card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each stage did, in order. Times lie in a file of their own: the card has none."""
    timings = (stage.json("timings.json") or {}).get("stages", {})
    rows: list[dict[str, Any]] = []
    for index, row in enumerate(card.get("stages_table") or ()):
        dropped = row.get("dropped") or {}
        came, kept = row["in"], row["kept"]
        if not came and dropped:  # it was told of no more than what it left out
            came = rows[-1]["kept"] if rows else card["documents_in"]
            kept = came - sum(dropped.values())
        seconds = row.get("seconds") or timings.get(f"{index} {row['name']}") or 0.0
        amount = row.get("bytes_in") or row.get("characters") or 0
        rows.append(
            {
                "name": row["name"],
                "in": came,
                "kept": kept,
                "lost": came - kept,
                "share": (came - kept) / max(came, 1),
                "dropped": dropped,
                "changed": row.get("changed") or 0,
                "seconds": seconds,
                "amount": amount,
                "unit": "B" if row.get("bytes_in") else "characters",
                "speed": amount / 1e6 / seconds if seconds and amount else None,
            }
        )
    return rows


def measures(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Histograms: sizes and scores first, then what differs most between the documents read and kept."""

    def rank(item: tuple[str, Mapping[str, Any]]) -> tuple[bool, float, str]:
        name, counts = item
        sums = [max(sum(counts[key]), 1) for key in ("read", "kept")]
        pairs = zip(counts["read"], counts["kept"], strict=True)
        moved = sum(abs(read / sums[0] - kept / sums[1]) for read, kept in pairs)
        first = name in ("characters", "words", "language_probability") or "score" in name
        return not first, -moved, name

    # A sample may have been measured: the pictures are scaled to all documents.
    kept = max(card["documents_in"] - sum((card.get("dropped") or {}).values()), 0)
    return [
        figure
        for name, counts in sorted((card.get("histograms") or {}).items(), key=rank)
        if (figure := pictures.histogram(name.replace("_", " "), counts, card["documents_in"], kept))
    ]


def _total(card: Mapping[str, Any], unit: str) -> int:
    return sum(row[unit] for row in card["splits"].values())


def tiles(context: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The corpus at a glance: (figure, what it is)."""
    card = context["card"]
    found = [
        (f"{card['documents']:,}", "documents kept"),
        (percent(1 - context["dropped"] / max(card["documents_in"], 1)), "of those read"),
        (size(context["kept_bytes"]), "of text"),
    ]
    for table, word in (("languages", "language"), ("sources", "source")):
        names = [name for name in card.get(table) or {} if name != "unknown"]
        if names:
            found.append((f"{len(names):,}", word + ("s" if len(names) > 1 else "")))
    # "duplicate 5-grams" are inside one document: the stage tells, and without stages the reason alone.
    copies = sum(
        row["count"]
        for row in context["reasons"]
        if "Duplicate" in row["stage"] or (not row["stage"] and row["reason"].endswith("duplicate"))
    )
    if copies:
        found.append((f"{copies:,}", "duplicates removed"))
    if context["pii"]:
        found.append((f"{sum(row['found'] for _, row in context['pii']):,}", "pieces of personal data found"))
    found.append((f"{card.get('quarantined', 0):,}", "unreadable files or records"))
    if seconds := context["seconds"]:
        speed = card["bytes_in"] / 1e6 / seconds
        found.append((f"{speed:.3g} MB/s", f"read in {console.duration(seconds)}"))
    return found


def findings(context: Mapping[str, Any]) -> list[str]:
    """What a reader of this corpus had better know, worst first; empty if nothing stands out."""
    card, found = context["card"], []
    for row in context["stages"]:
        failed = sum(n for reason, n in row["dropped"].items() if " failed: " in reason)
        if failed:
            found.append(f"{row['name']} failed on {failed:,} documents, which were left out.")
        if row["share"] > 0.5 and row["in"] >= 100:
            found.append(f"{row['name']} alone left out {percent(row['share'])} of what reached it.")
    total = max(card["documents_in"], 1)
    if card.get("quarantined", 0) > 0.01 * total:
        found.append(f"{card['quarantined']:,} files or records could not be read: their content is missing.")
    size_of = max(context["kept_bytes"], 1)
    for table, word in (("licenses", "licence"), ("languages", "language")):
        unknown = (card.get(table) or {}).get("unknown")
        if unknown and unknown["bytes"] > 0.01 * size_of:
            share = unknown["bytes"] / size_of
            part = f"{percent(share)} of the text" if share < 0.9995 else "the text"
            found.append(f"The {word} of {part} is not known.")
    sources = card.get("sources") or {}
    for name, row in sources.items():
        if len(sources) > 1 and row["bytes"] > 0.9 * size_of:
            found.append(f"{percent(row['bytes'] / size_of)} of the text comes from one source, {name}.")
    for name, row in card["splits"].items():
        if row["documents"] < 100:
            plural = "s" if row["documents"] != 1 else ""
            found.append(
                f"The split {name} has only {row['documents']} document{plural}: figures on it are rough."
            )
    if context["stages"] and not context["searched"]:
        found.append("No stage looked for personal data.")
    return found[:8]


def tables(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the corpus is made of, by source and so on, largest first."""
    found = []
    for key, one, many in (
        ("languages", "language", "languages"),
        ("sources", "source", "sources"),
        ("licenses", "licence", "licences"),
        ("splits", "split", "splits"),
    ):
        rows = sorted((card.get(key) or {}).items(), key=lambda item: -item[1]["bytes"])
        if not rows:
            continue
        total = max(sum(row["bytes"] for _, row in rows), 1)
        shown = [(name, row, row["bytes"] / total) for name, row in rows[: ROWS + MORE_ROWS]]
        name, _, share = shown[0]
        known = [name for name, _ in rows if name != "unknown"]
        title = f"{len(known):,} {many if len(known) != 1 else one}" if known else f"No {one} is known"
        if len(rows) > 1:
            title += f"; {name} is {percent(share)} of the text"
        found.append(
            {
                "key": key,
                "head": one.capitalize(),
                "title": title,
                "rows": shown[:ROWS],
                "more": shown[ROWS:],
                "omitted": max(len(rows) - ROWS - MORE_ROWS, 0),
                "widest": max(share, 1e-9),
            }
        )
    return found


def why(stage: Stage, card: Mapping[str, Any], stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every reason for leaving documents out, commonest first, with a few of its documents."""
    counts: dict[tuple[str, str], int] = {}
    for row in stages:
        for reason, n in row["dropped"].items():
            counts[row["name"], reason] = counts.get((row["name"], reason), 0) + n
    told = collections.Counter(reason for _, reason in counts)
    counts |= {("", reason): n for reason, n in (card.get("dropped") or {}).items() if not told[reason]}
    ranked = sorted(((n, *key) for key, n in counts.items() if n), key=lambda item: -item[0])
    examples: dict[tuple[str, str], list[dict[str, Any]]] = {
        (name, reason): [] for _, name, reason in ranked[:REASONS]
    }
    missing = sum(min(EXAMPLES, counts[key]) for key in examples)
    alone = {reason: (name, reason) for name, reason in reversed(examples)}
    for line in _lines(stage, "dropped.jsonl", LINES):
        key = (str(line.get("stage") or ""), str(line.get("reason") or ""))
        # A stage that the card does not tell of: the reason says enough.
        shown = examples.get(key if key in examples else alone.get(key[1], key))
        if shown is not None and len(shown) < EXAMPLES:
            shown.append(_example(line))
            missing -= 1
            if not missing:
                break
    widest = ranked[0][0] if ranked else 1
    return [
        {
            "stage": name,
            "reason": reason,
            "count": n,
            "share": n / max(card["documents_in"], 1),
            "bar": n / widest,
            "examples": examples.get((name, reason), []),
        }
        for n, name, reason in ranked
    ]


def masked(text: str) -> str:
    """The text with what may be an e-mail address or the number of a phone, card, account or person masked:
    examples show documents from before such things were redacted, and a page is passed on more than files.
    """
    return _NUMBER.sub("‹number›", _EMAIL.sub("‹e-mail›", text))


def _example(line: Mapping[str, Any]) -> dict[str, Any]:
    text = masked(str(line.get("text") or ""))
    return {
        "id": str(line.get("id") or ""),
        "url": str(line.get("url") or ""),
        "detail": masked(str(line.get("detail") or "")),
        "characters": line.get("characters"),
        "text": text[:TEXT],
        "cut": len(text) > TEXT or (line.get("characters") or 0) > len(text),
    }


def duplicates(stage: Stage, card: Mapping[str, Any]) -> dict[str, Any] | None:
    """Groups of documents found to be the same: how many of what size, and some compared word by word."""
    sizes = {int(k): n for k, n in ((card.get("clusters") or {}).get("sizes") or {}).items() if n}
    if not sizes:
        return None
    bins = [(2, 2), (3, 3), (4, 5), (6, 10), (11, 100), (101, 1000), (1001, max(*sizes, 1001))]
    rows = [
        (
            str(low) if low == high else f"{low:,} to {high:,}",
            sum(n for k, n in sizes.items() if low <= k <= high),
        )
        for low, high in bins
    ]
    widest = max(n for _, n in rows) or 1
    shown = sorted(
        (line for line in _lines(stage, "clusters.jsonl", CLUSTER_LINES) if line.get("dropped")),
        key=lambda line: (
            all(copy.get("text") == line["kept"].get("text") for copy in line["dropped"]),
            -line["size"],
        ),
    )[:CLUSTERS]
    return {
        "groups": sum(sizes.values()),
        "documents": sum(k * n for k, n in sizes.items()),
        "removed": sum((k - 1) * n for k, n in sizes.items()),
        "largest": max(sizes),
        "rows": [(name, n, n / widest) for name, n in rows if n],
        "shown": [_cluster(line) for line in shown],
    }


def _cluster(line: Mapping[str, Any]) -> dict[str, Any]:
    kept = line["kept"]
    pairs = []
    different_texts = {str(copy.get("text", "")): copy for copy in reversed(line["dropped"])}
    for copy in list(different_texts.values())[::-1][:COPIES]:
        left, right, different = diff.sides(
            *(masked(str(document.get("text", ""))) for document in (kept, copy))
        )
        pairs.append({"dropped": copy, "left": left, "right": right, "different": different})
    return {"size": line["size"], "kept": kept, "pairs": pairs}


def ngrams(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The commonest word n-grams of the sample, by length."""
    return [
        {
            "title": {"1": "Words", "2": "Pairs of words", "3": "Triples of words"}.get(n, f"{n}-grams"),
            "rows": [(text, count, count / max(rows[0][1], 1)) for text, count in rows[:NGRAMS]],
        }
        for n, rows in sorted((card.get("ngrams") or {}).items(), key=lambda item: int(item[0]))
        if rows
    ]


def quarantine(stage: Stage, card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reasons why files or records could not be read, commonest first, with some of the places."""
    if not card.get("quarantined"):
        return []
    known = card.get("quarantine_reasons")
    counted: collections.Counter[str] = collections.Counter()
    places: dict[str, list[dict[str, Any]]] = {}
    for line in _lines(stage, "quarantine.jsonl", LINES):
        reason = str(line.get("reason", ""))
        counted[reason] += 1
        if len(shown := places.setdefault(reason, [])) < FILES:
            shown.append({key: str(line.get(key, "")) for key in ("file", "position", "detail")})
        elif known and all(len(places.get(name, ())) >= min(FILES, n) for name, n in known.items()):
            break
    reasons = collections.Counter(known or counted)
    return [
        {"reason": reason, "count": n, "places": places.get(reason, [])}
        for reason, n in reasons.most_common()
    ]


def _lines(stage: Stage, name: str, limit: int) -> Iterator[dict[str, Any]]:
    """The first ``limit`` objects of a JSON-lines file, none where there is no file."""
    file = stage.folder / name
    if not file.exists():
        return
    with file.open("rb") as stream:
        for number, line in enumerate(itertools.islice(stream, limit), start=1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise UserError(
                    f"{file}, line {number}: not a JSON object ({error}): prepare the corpus again"
                ) from None
            yield record


def _citation(stage: Stage, card: Mapping[str, Any], lineage: Mapping[str, Any], date: str) -> str:
    """BibTeX of this very corpus."""
    (_, print_, codes, _) = lineage["stages"][0]
    key = re.sub(r"[^A-Za-z0-9]+", "-", stage.name).strip("-") or "corpus"
    note = [f"{card['documents']} documents, prepared with t5style" + (f" {codes[-1]}" if codes else "")]
    note += [f"fingerprint {print_}"] if print_ else []
    name = re.sub(r"([\\{}%&$#_^~])", r"\\\1", stage.name)
    return (
        f"@misc{{{key},\n  title = {{{name}}},\n  year = {{{date[:4]}}},\n  note = {{{'; '.join(note)}}}\n}}"
    )


__all__ = ["CARD", "CROISSANT", "REPORT", "DataReport", "build", "write"]
