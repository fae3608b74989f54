"""A prepared corpus described for machines: Croissant metadata, with its responsible-AI terms.

Croissant 1.0 (MLCommons, http://mlcommons.org/croissant/1.0) is JSON-LD over schema.org; the terms in `rai:`
are those of Croissant RAI 1.0. Each split is a FileSet of its Parquet files, which readers load, and a
RecordSet of its columns; each file is a FileObject too, which holds its checksum. Everything that is said is
a figure of the data card; nothing is guessed.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from t5style.run_dir import is_local

VERSIONS = ("http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0")
COLUMNS = {
    "text": "The document's text.",
    "id": "Unique within the corpus.",
    "source": "The collection that the document comes from.",
    "url": "Where the document can be found.",
    "license": "SPDX identifier or name of the licence; empty where unknown.",
    "language": "ISO 639-1 code; empty where unknown.",
    "time": "When it was published or fetched, ISO 8601; empty where unknown.",
    "meta": "Further fields, a JSON object.",
}
PARQUET = "application/x-parquet"
# The terms of the specification's own context (section "Appendix: JSON-LD context") that may occur here.
_TERMS = (
    *("citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet"),
    *("format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet"),
    *("references", "regex", "repeated", "replace", "samplingRate", "separator", "source", "subField"),
    "transform",
)
CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "sc": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
} | {term: f"cr:{term}" for term in _TERMS}


def shards(folder: epath.Path, split: str) -> list[epath.Path]:
    """The Parquet files of a split, by name."""
    place = folder / split
    if not place.is_dir():
        return []
    return sorted(path for path in place.iterdir() if path.suffix == ".parquet" and path.name[0] != ".")


def describe(
    folder: epath.Path, card: Mapping[str, Any], name: str, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The JSON-LD of a corpus.

    Args:
      folder: where its splits lie. Files on a local disk are read once for their SHA-256; on an object
        store, where that would mean to fetch the whole corpus, they are described by pattern only.
      card: data_card.json.
      name: of the corpus.
      facts: "description", "version", "date" (ISO) and "citation", as texts; an empty one is left out.
    """
    files = {split: shards(folder, split) for split in card["splits"]}
    every = [(split, path) for split, paths in files.items() for path in paths] if is_local(folder) else []
    # hashlib lets other threads run: as fast as the disk gives.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda item: sha256(item[1]), every))
    objects = [
        {
            "@type": "cr:FileObject",
            "@id": f"{split}/{path.name}",
            "name": path.name,
            "contentUrl": f"{split}/{path.name}",
            "contentSize": f"{path.stat().length} B",
            "encodingFormat": PARQUET,
            "sha256": digest,
        }
        for (split, path), digest in zip(every, digests, strict=True)
    ]
    sets = [
        {
            "@type": "cr:FileSet",
            "@id": f"{split}-files",
            "name": f"{split}-files",
            "description": f"The Parquet files of the split {split}.",
            "encodingFormat": PARQUET,
            "includes": f"{split}/*.parquet",
        }
        for split in files
    ]
    description = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": list(VERSIONS),
        "name": name,
        "description": facts["description"],
        "version": facts["version"],
        "datePublished": facts["date"],
        "citeAs": facts["citation"],
        "license": _named(card, "licenses"),
        "inLanguage": _named(card, "languages"),
        "distribution": [*objects, *sets],
        "recordSet": [_records(split, counts) for split, counts in card["splits"].items()],
    } | responsible(card)
    return {key: value for key, value in description.items() if value not in ("", [])}


def sha256(path: epath.Path) -> str:
    """The checksum of a file in hexadecimal digits, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _named(card: Mapping[str, Any], table: str) -> list[str]:
    return [name for name in card.get(table) or {} if name != "unknown"]


def _records(split: str, counts: Mapping[str, int]) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": split,
        "name": split,
        "description": f"{counts['documents']} documents of {counts['characters']} characters.",
        "key": {"@id": f"{split}/id"},
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{split}/{column}",
                "name": column,
                "description": said,
                "dataType": "sc:Text",
                "source": {"fileSet": {"@id": f"{split}-files"}, "extract": {"column": column}},
            }
            for column, said in COLUMNS.items()
        ],
    }


def responsible(card: Mapping[str, Any]) -> dict[str, Any]:
    """The `rai:` terms that the card's figures can fill."""
    documents = card["documents"]
    terms: dict[str, Any] = {
        "rai:dataCollection": (
            f"{card['documents_in']} documents ({card['bytes_in']} bytes of text) were read; "
            f"{documents} were kept."
        ),
        "rai:dataCollectionRawData": "; ".join(
            f"{name}: {row['documents']} documents kept, {row['bytes']} bytes"
            for name, row in _largest(card, "sources")
        ),
        "rai:dataPreprocessingProtocol": [
            _protocol(row) for row in card.get("stages_table") or () if row.get("in")
        ],
    }
    if card.get("quarantined"):
        terms["rai:dataCollectionMissingData"] = (
            f"{card['quarantined']} files or records could not be read and are missing"
            + _because(card.get("quarantine_reasons") or {})
        )
    if dropped := card.get("dropped"):
        terms["rai:dataPreprocessingProtocol"].append(
            f"{sum(dropped.values())} of the documents read were left out{_because(dropped)}"
        )
    if searched(card):
        terms["rai:personalSensitiveInformation"] = [
            f"{kind}: {counts['found']} found in {counts['documents']} of the documents kept"
            for kind, counts in (card.get("pii") or {}).items()
        ] or ["The search for personal information found none in the documents kept."]
    if languages := card.get("languages"):
        total = max(sum(row["bytes"] for row in languages.values()), 1)
        terms["rai:dataBiases"] = [
            f"Language {name}: {100 * row['bytes'] / total:.2f} % of the bytes of text"
            for name, row in _largest(card, "languages")
        ]
    limits = [
        f"The {what} of {row['documents']} of {documents} documents is not known."
        for table, what in (("licenses", "licence"), ("languages", "language"), ("sources", "source"))
        if (row := (card.get(table) or {}).get("unknown"))
    ]
    if limits:
        terms["rai:dataLimitations"] = limits
    if erased := card.get("erased"):
        terms["rai:dataReleaseMaintenancePlan"] = (
            f"Erased on request so far: {sum(entry['documents'] for entry in erased)} documents, last on "
            f"{max(entry['time'] for entry in erased)}."
        )
    return terms


def searched(card: Mapping[str, Any]) -> bool:
    """Whether a stage looked for personal data: that none was found says nothing otherwise."""
    stages = card.get("stages_table") or ()
    return bool(card.get("pii")) or any(row["name"].startswith("Redact") and row["in"] for row in stages)


def _protocol(row: Mapping[str, Any]) -> str:
    words = f"{row['name']}: {row['in']} documents in, {row['kept']} kept"
    return words + (f", {row['changed']} changed" if row.get("changed") else "")


def _because(reasons: Mapping[str, int]) -> str:
    ranked = sorted(reasons.items(), key=lambda item: -item[1])[:20]
    return ": " + "; ".join(f"{reason} ({count})" for reason, count in ranked) if ranked else "."


def _largest(card: Mapping[str, Any], table: str) -> list[tuple[str, Mapping[str, int]]]:
    return sorted((card.get(table) or {}).items(), key=lambda item: -item[1]["bytes"])[:20]
