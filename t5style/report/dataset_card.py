"""The dataset card of a corpus: README.md as the Hugging Face Hub shows it, with the head in YAML that makes
`datasets.load_dataset` find the splits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from t5style.report.report import environment

# Identifiers of licences that the Hub knows (its documentation, "Licenses"), of those that texts come under.
_CREATIVE_COMMONS = ("by", "by-sa", "by-nc", "by-nd", "by-nc-sa", "by-nc-nd")
_LICENSES = {f"cc-{kind}-{version}" for kind in _CREATIVE_COMMONS for version in ("2.0", "3.0", "4.0")} | {
    *("apache-2.0", "mit", "isc", "bsd-2-clause", "bsd-3-clause", "zlib", "unlicense", "artistic-2.0"),
    *("cc0-1.0", "cc-by-2.5", "pddl", "odc-by", "odbl", "gfdl", "mpl-2.0"),
    *("gpl-2.0", "gpl-3.0", "lgpl-2.1", "lgpl-3.0", "agpl-3.0"),
}


def render(context: Mapping[str, Any]) -> str:
    """The card as Markdown, from what `data_report.build` found."""
    markdown = environment(autoescape=False)
    # JSON is YAML.
    markdown.filters |= {"cell": _cell, "yaml": lambda value: json.dumps(value, ensure_ascii=False)}
    return markdown.get_template("dataset_card.md.jinja").render(context, head=head(context["card"]))


def head(card: Mapping[str, Any]) -> dict[str, Any]:
    """The head of the dataset card, in the Hub's terms (its documentation, "Dataset cards")."""
    languages = [name for name in card.get("languages") or {} if re.fullmatch(r"[a-z]{2,3}", name)]
    names = {name.lower() for name in card.get("licenses") or {}}
    licenses = sorted({name if name in _LICENSES | {"unknown"} else "other" for name in names})
    bounds = [(1_000 * 10**k, f"{_unit(10**k * 1000 // 10)}<n<{_unit(10**k * 1000)}") for k in range(1, 10)]
    documents = card["documents"]
    category = "n<1K" if documents < 1000 else next((c for bound, c in bounds if documents < bound), "n>1T")
    files = [{"split": split, "path": f"{split}/*.parquet"} for split in card["splits"]]
    return {
        "language": languages,
        "license": licenses or ["unknown"],
        "size_categories": [category],
        "configs": [{"config_name": "default", "data_files": files}],
    }


def _unit(n: int) -> str:
    for unit, value in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= value:
            return f"{n // value}{unit}"
    return str(n)


def _cell(value: Any) -> str:
    """A text for a cell of a Markdown table: no markup of its own, in one line."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)
