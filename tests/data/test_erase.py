"""The job Erase: nothing of a document is left anywhere, and it does not come back."""

import dataclasses
import json
import pathlib
import random
import shutil

import numpy as np
import pytest
from etils import epath

from t5style.corpus.document import read_documents
from t5style.corpus.normalize import Normalize
from t5style.corpus.operators import ExactDuplicates, NearDuplicates, RepeatedSubstrings
from t5style.corpus.prepare import Prepare
from t5style.corpus.privacy import Redact
from t5style.corpus.sampling import Curriculum, Sampling
from t5style.corpus.split import HashSplit
from t5style.corpus.vocabulary import ByteVocabulary
from t5style.data.erase import Erase
from t5style.data.token_store import TokenStore
from t5style.data.tokenize import Tokenize
from t5style.run_dir import RunDir, UserError


def sentences(seed, n=80):
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(5000)}" for _ in range(n))


SECRET = f"Jane Roe lives at 7 Elm Street. {sentences('secret')}"
NEAR = SECRET.replace("w", "W", 3) + " indeed"
TEXTS = [sentences(index) for index in range(60)]
STAGES = (Normalize(), ExactDuplicates(), NearDuplicates(), RepeatedSubstrings())


def write(path, texts, name="d"):
    lines = (json.dumps({"text": text, "id": f"{name}{index}"}) + "\n" for index, text in enumerate(texts))
    path.write_text("".join(lines))
    return str(path)


def run(job, folder):
    target = RunDir(folder).create()
    figures = job(target)
    target.write_manifest(job, figures=figures)
    return figures


def everything(folder):
    """All text in a folder: of Parquet files their documents, of others their bytes."""
    result = []
    for path in pathlib.Path(folder).rglob("*"):
        if path.suffix == ".parquet":
            result += [f"{item.id} {item.text}" for item in read_documents(path)]
        elif path.is_file():
            result.append(path.read_bytes().decode("utf-8", "replace"))
    return "\n".join(result)


@pytest.mark.parametrize("by", ["id", "text"])
def test_a_document_and_its_copies_leave_everything(tmp_path, by):
    # Without near-duplicate removal, so that the copies are in the shards.
    texts = [*TEXTS[:20], SECRET, *TEXTS[20:], NEAR]
    job = Prepare(
        [write(tmp_path / "in.jsonl", texts)],
        stages=(Normalize(), ExactDuplicates()),
        split=HashSplit(0.1, 0),
        sampling=Sampling({"files": 2.0}),
        curriculum=Curriculum(),
    )
    corpus, store = tmp_path / "corpus", tmp_path / "tokens"
    before = run(job, corpus)
    ByteVocabulary().save(tmp_path / "vocabulary")
    run(Tokenize(str(corpus), str(tmp_path / "vocabulary")), store)
    assert "Elm Street" in everything(corpus)
    (tmp_path / "ask.jsonl").write_text(json.dumps({by: "d20" if by == "id" else SECRET}) + "\n")
    erase = Erase(str(corpus), str(tmp_path / "ask.jsonl"), stores=[str(store)])
    figures = run(erase, tmp_path / "erased")
    assert figures["index"] == 2
    assert 2 <= figures["documents"] == figures["store_examples"] <= 4
    left = everything(corpus) + everything(tmp_path / "erased")
    assert "Elm Street" not in left
    assert '"d20' not in left
    assert "d20 " not in left
    opened = TokenStore.open(str(store), verify=True)
    train = list(read_documents(corpus / "train"))
    assert opened.num_examples("train") == len(train)
    card = json.loads((corpus / "data_card.json").read_text())
    assert card["splits"]["train"]["documents"] == len(train)
    assert card["documents"] == before["documents"] - figures["documents"]
    (entry,) = card["erased"]
    assert entry["documents"] == figures["documents"]
    lengths = [len(train[index].text) for index in np.load(corpus / "train/order.npy")]
    assert lengths == sorted(lengths)
    assert len(lengths) == len(train)
    # A second time there is nothing more to do.
    if by == "text":
        assert run(erase, tmp_path / "again")["documents"] == 0
    else:
        with pytest.raises(UserError, match=r"1 of the ids are not in .*'d20'; nothing was erased"):
            run(erase, tmp_path / "again")


def test_what_was_erased_does_not_come_back(tmp_path):
    texts = [*TEXTS, SECRET, NEAR]
    job = Prepare([write(tmp_path / "in.jsonl", texts)], stages=STAGES, split=HashSplit(0.1, 0))
    run(job, tmp_path / "corpus")
    (tmp_path / "ask.jsonl").write_text(json.dumps({"id": "d60"}) + "\n")
    figures = run(Erase(str(tmp_path / "corpus"), str(tmp_path / "ask.jsonl")), tmp_path / "erased")
    assert (figures["documents"], figures["index"]) == (1, 2)  # the near-duplicate was in the index only
    assert "Elm Street" not in everything(tmp_path / "corpus")
    more = write(tmp_path / "more.jsonl", [SECRET, "something new that is said for the first time"], "m")
    extended = dataclasses.replace(job, sources=[more], extends=str(tmp_path / "corpus"))
    figures = run(extended, tmp_path / "extended")
    assert figures["dropped"]["erased on request"] == 3
    assert figures["documents"] == len(TEXTS) + 1
    assert "Elm Street" not in everything(tmp_path / "extended")


def test_it_is_known_again_as_the_stages_leave_it(tmp_path):
    """The raw record comes once more, under another name; the stages change it as they did before."""
    raw = "Caf\u0065\u0301 talk with jane@example.org.\r\n" + sentences("raw")
    stages = (Normalize(), Redact(), ExactDuplicates())
    job = Prepare([write(tmp_path / "in.jsonl", [*TEXTS, raw])], stages=stages, split=HashSplit(0, 0))
    run(job, tmp_path / "corpus")
    (tmp_path / "ask.jsonl").write_text(json.dumps({"id": "d60"}) + "\n")
    run(Erase(str(tmp_path / "corpus"), str(tmp_path / "ask.jsonl")), tmp_path / "erased")
    again = write(tmp_path / "again.jsonl", [raw], "other")
    job = dataclasses.replace(job, sources=[again], extends=str(tmp_path / "corpus"))
    figures = run(job, tmp_path / "extended")
    assert figures["documents"] == len(TEXTS)
    assert "other0" not in everything(tmp_path / "extended")


def test_an_interrupted_erasure_is_finished(tmp_path, monkeypatch):
    """Each file that it puts into its place is in turn the last."""
    job = Prepare(
        [write(tmp_path / "in.jsonl", [*TEXTS, SECRET])],
        stages=(Normalize(), ExactDuplicates(), RepeatedSubstrings()),
        split=HashSplit(0.1, 0),
        curriculum=Curriculum(),
        shard_bytes=4000,
    )
    run(job, tmp_path / "whole")
    (tmp_path / "ask.jsonl").write_text(json.dumps({"id": "d60"}) + "\n")
    shutil.copytree(tmp_path / "whole", tmp_path / "straight")
    run(Erase(str(tmp_path / "straight"), str(tmp_path / "ask.jsonl")), tmp_path / "erased")

    def state(folder):
        card = json.loads((folder / "data_card.json").read_text())
        arrays = {p.name: np.load(p).tolist() for p in sorted(folder.rglob("*.npy"))}
        texts = {
            str(p.relative_to(folder)): [d.text for d in read_documents(p)] for p in folder.rglob("*.parquet")
        }
        return card["splits"], card["documents"], card["dropped"], arrays, texts

    kind = type(epath.Path(tmp_path))
    honest, moments = kind.replace, 0
    while True:
        corpus = tmp_path / f"corpus{moments}"
        shutil.copytree(tmp_path / "whole", corpus)
        erase = Erase(str(corpus), str(tmp_path / "ask.jsonl"), workers=1)
        left = iter(range(moments))

        def dying(self, target, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return honest(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "replace", dying)
            try:
                run(erase, tmp_path / f"run{moments}")
                break
            except KeyboardInterrupt:
                pass
        run(erase, tmp_path / f"run{moments}")
        assert state(corpus) == state(tmp_path / "straight"), moments
        assert "Elm Street" not in everything(corpus)
        moments += 1
    assert moments > 8


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "holds no requests"),
        ('{"name": "x"}', "line 1: each line must be"),
        ('["id"]', "line 1"),
        ("{", "line 1"),
    ],
)
def test_requests_that_say_nothing_are_refused(tmp_path, line, said):
    run(Prepare([write(tmp_path / "in.jsonl", TEXTS)], stages=[], split=HashSplit(0, 0)), tmp_path / "corpus")
    (tmp_path / "ask.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=said):
        run(Erase(str(tmp_path / "corpus"), str(tmp_path / "ask.jsonl")), tmp_path / "erased")
    with pytest.raises(UserError, match="no prepared corpus"):
        run(Erase(str(tmp_path), str(tmp_path / "ask.jsonl")), tmp_path / "erased2")
    with pytest.raises(UserError, match=r"must lie in \(0, 1\], not 0"):
        Erase("c", "r", similarity=0)
