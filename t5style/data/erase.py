"""The job that erases documents on request, as privacy law asks: from a corpus and the token stores of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from etils import epath

from t5style import console
from t5style.corpus import erase
from t5style.corpus.engines import Local
from t5style.data.erasure import erase_examples, examples_of
from t5style.data.token_store import TokenStore
from t5style.run_dir import RunDir, UserError


@dataclasses.dataclass(frozen=True)
class Erase:
    """Takes the documents that were asked for, their copies and their near-duplicates out of a corpus
    (shards, index, examples, cards, report) and out of token stores, in place.

    The manifests then say when how many were erased, and not which. Original files, checkpoints trained on
    the documents and corpora that were made from this one are not touched. Keep the requests outside of run
    folders, and delete them afterwards: they are the last place that names the documents.

    Attributes:
      corpus: run folder of Prepare.
      requests: JSON lines of {"id": ...} or {"text": ...}.
      stores: token stores made of the corpus.
      similarity: least Jaccard similarity of word 5-grams of a near-duplicate.
      workers: processes; 0 means one per core.
    """

    corpus: str
    requests: str
    stores: Sequence[str] = ()
    similarity: float = 0.7
    workers: int = dataclasses.field(default=0, metadata={"affects_result": False})

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.stores, str):
            raise UserError(f"stores must be a list, not the string {self.stores!r}: write [{self.stores!r}]")
        if not 0 < self.similarity <= 1:
            raise UserError(f"Erase.similarity must lie in (0, 1], not {self.similarity}")

    def inputs(self) -> Sequence[str]:
        return [self.requests]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Erases; a second start finishes what a killed one began.

        Returns:
          Figures: documents erased from shards and index, examples erased from the stores.

        Raises:
          UserError: an id is not in the corpus, a request cannot be read, or a store does not know which
            documents its examples come from.
        """
        corpus = epath.Path(self.corpus)
        if not (corpus / "data_card.json").exists():
            raise UserError(f"{corpus} is no prepared corpus: it has no data_card.json")
        requests = erase.read_requests(self.requests)
        unfinished = erase.pending(corpus)
        wanted = dataclasses.replace(requests, ids=requests.ids - set(map(erase.base_id, unfinished)))
        stores = [TokenStore.open(store) for store in self.stores]
        with contextlib.closing(Local(self.workers)) as engine:
            found = erase.find(corpus, wanted, self.similarity, engine)
        written = frozenset(document.id for document in found) | unfinished | wanted.ids
        ids = frozenset(map(erase.base_id, written))
        if not ids:
            console.say("nothing in the corpus is like what was asked for")
            return {"documents": 0, "index": 0, "examples": 0, "store_examples": 0}
        erase.begin(corpus, written)
        erase.remember(corpus, ids, [document.text for document in found])
        examples = 0
        for folder, store in zip(self.stores, stores, strict=True):
            matches = {split: examples_of(store, split, written) for split in store.splits}
            erase_examples(folder, matches)  # also where there are none: it finishes what was interrupted
            examples += sum(len(indices) for indices in matches.values())
        figures = erase.erase(corpus, ids, [document.text for document in found])
        from t5style.report import data_report

        data_report.write(corpus)
        console.say(
            f"erased {figures['documents']} documents from the shards, {figures['index']} from the index and "
            f"{examples} examples from {len(stores)} token stores"
        )
        return figures | {"store_examples": examples}
