"""Steps that look at all documents, through Prepare: the same with any engine, in one go or extended."""

import dataclasses
import json
import pathlib
import random

import numpy as np
import pytest
from etils import epath

from t5style.corpus import engines, plan
from t5style.corpus.document import Document, write_documents
from t5style.corpus.engines import ENTRY, Local
from t5style.corpus.normalize import Normalize
from t5style.corpus.operators import (
    DuplicateLines,
    ExactDuplicates,
    NearDuplicates,
    RepeatedSubstrings,
    segments,
)
from t5style.corpus.prepare import Prepare
from t5style.corpus.sampling import Curriculum, Sampling
from t5style.corpus.split import HashSplit
from t5style.corpus.stages import MinLength
from t5style.run_dir import UserError
from tests.corpus.test_prepare import FailOn, documents_of, run, tree, write_lines

ARTICLES = pathlib.Path(__file__).parents[3] / "shared/data/dedup/articles_1000.train"
ALL = HashSplit(0, 0)
CHAIN = (
    Normalize(),
    MinLength(1),
    ExactDuplicates(),
    NearDuplicates(),
    DuplicateLines(min_characters=10),
    MinLength(20),
    RepeatedSubstrings(),
)


def sentences(seed, n):
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(5000)}" for _ in range(n))


@pytest.fixture
def texts():
    """Documents with exact and near copies, common lines and a common passage."""
    passage = sentences("passage", 60)
    result = []
    for index in range(30):
        text = sentences(index, 120)
        result.append(text)
        if index % 5 == 0:
            result.append(text)
        if index % 7 == 0:
            result.append(text.rsplit(" ", 1)[0] + " end")
        if index % 3 == 0:
            result.append(
                f"{sentences(1000 + index, 40)}\nthe same line again\n{sentences(2000 + index, 40)}"
            )
        if index % 4 == 0:
            result.append(f"{sentences(3000 + index, 30)} {passage} {sentences(4000 + index, 30)}")
    return result


def test_a_chain_of_all(tmp_path, texts, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", texts)
    figures = run(Prepare([source], stages=CHAIN, split=ALL), tmp_path / "out")
    assert figures["dropped"] == {"duplicate": 6, "near duplicate": 5}
    out = documents_of(tmp_path / "out", "train")
    assert len(out) == len(texts) - 11
    joined = "\n".join(item.text for item in out)
    assert joined.count("the same line again") == 1
    passage = sentences("passage", 60)
    assert joined.count(passage) == 1
    assert next(item for item in out if passage in item.text).id == str(
        texts.index(next(t for t in texts if passage in t))
    )
    # What is not repeated is all there.
    for index in range(30):
        assert sentences(index, 120)[:500] in joined
    for index in range(0, 30, 4):
        assert sentences(3000 + index, 30) in joined
        assert sentences(4000 + index, 30) in joined
    card = json.loads((tmp_path / "out/data_card.json").read_text())
    rows = {row["name"]: row for row in card["stages_table"]}
    assert rows["NearDuplicates"]["in"] == len(texts) - 6
    assert rows["DuplicateLines"]["changed"] == 9
    assert rows["RepeatedSubstrings"]["changed"] == 7
    assert card["clusters"]["sizes"] == {"2": 11}
    clusters = [json.loads(line) for line in (tmp_path / "out/clusters.jsonl").open()]
    assert {(c["kept"]["text"], c["size"]) for c in clusters} <= {(t, 2) for t in texts}
    assert len(clusters) == 11


def test_many_chunks_and_little_memory_change_nothing(tmp_path, texts, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(0, len(texts), 7):
        lines = [{"text": text, "id": str(index + n)} for n, text in enumerate(texts[index : index + 7])]
        (folder / f"{index:03d}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = Prepare([str(folder)], stages=CHAIN, split=ALL, workers=1)
    run(job, tmp_path / "one")
    monkeypatch.setattr(plan, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(engines, "_SPILL", 50)
    run(job, tmp_path / "many")
    assert documents_of(tmp_path / "one", "train") == documents_of(tmp_path / "many", "train")


def test_spilled_entries_are_those_sorted_in_memory(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)

    class Source:
        chunks = 5

        def chunk(self, index):
            entries = np.zeros(100, ENTRY)
            entries["key"] = draw_keys[index]
            entries["document"] = np.arange(100) + 100 * index
            return entries

    draw_keys = draw.integers(1, 200, (5, 100)).astype(np.uint64) << np.uint64(55)

    def collect():
        rows = []
        for entries, first in Local(1).repeats(Source(), epath.Path(tmp_path)):
            rows += zip(entries.tolist(), first.tolist(), strict=True)
        return sorted(rows)

    whole = collect()
    monkeypatch.setattr(engines, "_SPILL", 150)
    assert collect() == whole
    seen = {}
    for (key, document, _), first in whole:
        assert first == (key not in seen)
        seen[key] = document


def test_which_copy_is_kept(tmp_path):
    text = sentences(1, 100)
    documents = [
        Document(text, "first", time="2020-01-01"),
        Document(text + " and more of it", "longest", time="2019-01-01"),
        Document(text + " x", "newest", time="2024-05-01T10:00:00+02:00"),
        Document(text + " y", "undated"),
        Document(text + " z", "scored", meta={"scores": {"quality": 0.9}}),
    ]
    documents = [
        dataclasses.replace(d, meta={"scores": {"quality": d.meta.get("scores", {}).get("quality", 0.1)}})
        for d in documents
    ]
    write_documents(tmp_path / "in.jsonl", documents)
    for keep, kept in (
        ("first", "first"),
        ("longest", "longest"),
        ("newest", "newest"),
        ("quality", "scored"),
    ):
        job = Prepare([str(tmp_path / "in.jsonl")], stages=[NearDuplicates(keep=keep)], split=ALL)
        figures = run(job, tmp_path / keep)
        assert figures["dropped"] == {"near duplicate": 4}
        assert [item.id for item in documents_of(tmp_path / keep, "train")] == [kept]
    with pytest.raises(
        UserError, match=r"keep='nonsense' is none of first, longest, newest, nor has document"
    ):
        run(
            Prepare([str(tmp_path / "in.jsonl")], stages=[ExactDuplicates(keep="nonsense")]), tmp_path / "bad"
        )


def test_extending_equals_preparing_all_at_once(tmp_path, texts):
    half = len(texts) // 2
    old = write_lines(tmp_path / "old.jsonl", texts[:half])
    (tmp_path / "new.jsonl").write_text(
        "".join(json.dumps({"text": t, "id": f"n{i}"}) + "\n" for i, t in enumerate(texts[half:] + texts[:3]))
    )
    new = str(tmp_path / "new.jsonl")
    split = HashSplit(0.1, 0.1)
    run(Prepare([old, new], stages=CHAIN, split=split), tmp_path / "at_once")
    run(Prepare([old], stages=CHAIN, split=split), tmp_path / "before")
    pathlib.Path(old).write_text("no JSON\n")  # is not read again
    with pytest.raises(UserError, match=r"old\.jsonl has changed since the corpus that is to be extended"):
        run(Prepare([f"{tmp_path}/*.jsonl"], stages=CHAIN, extends=str(tmp_path / "before")), tmp_path / "x")
    job = Prepare([new], stages=CHAIN, split=split, extends=str(tmp_path / "before"))
    assert job.inputs() == [new, str(tmp_path / "before/index")]
    figures = run(job, tmp_path / "extended")
    whole, extended = tree(tmp_path / "at_once"), tree(tmp_path / "extended")
    parts = [path for path in whole if path.parts[0] in ("train", "validation", "test", "index")]
    assert len(parts) > 6
    for path in parts:
        if path.parts[0] != "index":
            assert whole[path] == extended[path]
    assert figures["documents_in"] == len(texts) + 3
    # And that one can be extended in its turn, though not with other stages.
    (tmp_path / "third.jsonl").write_text(json.dumps({"text": sentences("third", 50), "id": "t"}) + "\n")
    third = str(tmp_path / "third.jsonl")
    again = run(
        Prepare([third], stages=CHAIN, split=split, extends=str(tmp_path / "extended")), tmp_path / "again"
    )
    assert again["documents"] == figures["documents"] + 1
    with pytest.raises(UserError, match="was prepared with other stages"):
        run(Prepare([third], stages=CHAIN[1:], extends=str(tmp_path / "extended")), tmp_path / "y")
    with pytest.raises(UserError, match="prepare that with keep_index=True"):
        run(Prepare([third], stages=CHAIN, extends=str(tmp_path)), tmp_path / "z")


def test_sampling_and_curriculum(tmp_path):
    for name, n in (("a", 400), ("b", 400)):
        lines = [
            {"text": sentences(f"{name}{i}", 3 + i % 50), "id": f"{name}{i}", "source": name}
            for i in range(n)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = Prepare(
        [f"{tmp_path}/*.jsonl"],
        stages=[],
        split=HashSplit(0.1, 0),
        sampling=Sampling({"a": 0.25, "b": 2.5}),
        curriculum=Curriculum("length"),
    )
    figures = run(job, tmp_path / "out")
    train = documents_of(tmp_path / "out", "train")
    validation = documents_of(tmp_path / "out", "validation")
    held_out = {item.id for item in validation}
    assert len(held_out) == len(validation)  # never copied
    a = [item for item in train if item.source == "a"]
    b = [item for item in train if item.source == "b"]
    n = 400 - len([id for id in held_out if id[0] == "b"])
    assert abs(len(b) - 2.5 * n) < 4 * (n * 0.25) ** 0.5
    assert abs(len(a) - 90) < 4 * (360 * 0.25 * 0.75) ** 0.5
    assert len({item.id for item in train}) == len(train)
    assert figures["dropped"] == {"left out by sampling": 800 - len(validation) - len(a) - n}
    order = np.load(tmp_path / "out/train/order.npy")
    lengths = [len(train[index].text) for index in order]
    assert lengths == sorted(lengths)
    assert sorted(order) == list(range(len(train)))
    with pytest.raises(UserError, match="names 'c', but the documents come from a, b"):
        run(dataclasses.replace(job, sampling=Sampling({"c": 1.0})), tmp_path / "bad")


def test_temperature_and_levels():
    sampling = Sampling(temperature=1 / 0.3)
    weights = sampling.group_weights({("s", "en"): 1_000_000, ("s", "sw"): 1000})
    sizes = {"en": 1_000_000 * weights[("s", "en")], "sw": 1000 * weights[("s", "sw")]}
    assert sizes["en"] + sizes["sw"] == pytest.approx(1_001_000)
    assert sizes["sw"] / sizes["en"] == pytest.approx(0.001**0.3)
    levels = Sampling(score="quality", levels=((0.9, 3.0), (0.5, 1.0)))
    counts = [
        levels.copies(Document("x", "i", meta={"scores": {"quality": s}}), 1.0) for s in (0.95, 0.6, 0.1)
    ]
    assert counts == [3, 1, 0]
    with pytest.raises(UserError, match="from the highest score down"):
        Sampling(score="quality", levels=((0.5, 1.0), (0.9, 3.0)))


def test_rare_words_come_last(tmp_path):
    common = [f"the cat sat on the mat {i}" for i in range(50)]
    source = write_lines(tmp_path / "in.jsonl", [sentences("rare", 9), *common])
    job = Prepare([source], stages=[], split=ALL, curriculum=Curriculum("rarity"))
    run(job, tmp_path / "out")
    assert np.load(tmp_path / "out/train/order.npy")[-1] == 0


def test_bad_input_can_be_refused(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", ["one", "boom"])
    with open(source, "a") as file:
        file.write("not json\n")
    job = Prepare([source], stages=[], split=ALL, on_bad_input="refuse", workers=1)
    with pytest.raises(UserError, match=r"in\.jsonl .*malformed JSON.*on_bad_input = 'quarantine'"):
        run(job, tmp_path / "out")
    write_lines(tmp_path / "in.jsonl", ["one", "boom"])
    with pytest.raises(UserError, match="FailOn failed: ZeroDivisionError on document 1"):
        run(dataclasses.replace(job, stages=[FailOn("boom")]), tmp_path / "out2")


def test_where_the_stages_are_cut():
    lines, near, exact = DuplicateLines(), NearDuplicates(), ExactDuplicates()
    a, b = MinLength(1), MinLength(2)
    cut = [(s.stages, s.operators) for s in segments([a, exact, near, lines, b, near])]
    assert cut == [((a,), (exact, near, lines)), ((b,), (near,))]
    assert [(s.stages, s.operators) for s in segments([a, lines])] == [((a,), (lines,)), ((), ())]
    assert [(s.stages, s.operators) for s in segments([lines, exact])] == [((), (lines,)), ((), (exact,))]
    assert [(s.stages, s.operators) for s in segments([])] == [((), ())]


@pytest.mark.skipif(not ARTICLES.exists(), reason="../shared/data is not there")
def test_beam_gives_the_same(tmp_path, texts):
    pytest.importorskip("apache_beam", reason="needs t5style[beam]")
    from t5style.corpus.beam import Beam

    lines = [line.split(" ", 1) for line in ARTICLES.read_text().splitlines()]
    documents = [Document(text, id) for id, text in lines] + [
        Document(t, f"x{i}") for i, t in enumerate(texts)
    ]
    for part in range(4):
        write_documents(tmp_path / f"in/{part}.jsonl", documents[part::4])
    job = Prepare([str(tmp_path / "in")], stages=CHAIN, split=HashSplit(0.1, 0.1), shard_bytes=1 << 20)
    run(job, tmp_path / "local")
    run(dataclasses.replace(job, engine=Beam()), tmp_path / "beam")
    assert tree(tmp_path / "local") == tree(tmp_path / "beam")
    card = json.loads((tmp_path / "beam/data_card.json").read_text())
    assert card["dropped"]["near duplicate"] >= 10
    # A stage's refusal reaches the user as it is.
    with pytest.raises(UserError, match="FailOn failed"):
        run(
            dataclasses.replace(job, engine=Beam(), stages=[FailOn("w1")], on_bad_input="refuse"),
            tmp_path / "x",
        )
