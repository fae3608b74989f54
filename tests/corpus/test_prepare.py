import dataclasses
import errno
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from t5style.corpus import deal, document, plan
from t5style.corpus.cleaners import StripGutenberg
from t5style.corpus.document import Document, read_documents
from t5style.corpus.normalize import Normalize
from t5style.corpus.operators import ExactDuplicates
from t5style.corpus.prepare import Prepare
from t5style.corpus.sampling import Curriculum
from t5style.corpus.sources import JsonLines, TextFiles
from t5style.corpus.split import HashSplit, TailSplit
from t5style.corpus.stages import Drop, MaxLength, MinLength, Where
from t5style.run_dir import RunDir, UserError, fingerprint, path_fingerprint

SHAKESPEARE = pathlib.Path(__file__).parents[3] / "shared/data/pretrain/tinyshakespeare.txt"
GUTENBERG = pathlib.Path(__file__).parents[3] / "shared/data/pretrain/gutenberg"


def write_lines(path, texts):
    path.write_text(
        "".join(json.dumps({"text": text, "id": str(index)}) + "\n" for index, text in enumerate(texts))
    )
    return str(path)


def run(job, folder):
    run_dir = RunDir(folder).create()
    return job(run_dir)


def tree(folder):
    """Every file but those that say how long it took, or how the folder is called."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in pathlib.Path(folder).rglob("*")
        if path.is_file()
        if path.name not in ("timings.json", "data_report.html", "plan.json", "croissant.json", "README.md")
        if not (path.parts[-3:-1] == ("index", "0") and path.suffix == ".json")
    }


def documents_of(folder, *splits):
    return [item for name in splits for item in read_documents(f"{folder}/{name}")]


@dataclasses.dataclass(frozen=True)
class FailOn:
    """A stage with a defect."""

    word: str

    def __call__(self, document: Document) -> Document | Drop:
        if self.word in document.text:
            raise ZeroDivisionError("in a stage")
        return document


def test_every_document_is_accounted_for(tmp_path):
    texts = [
        "kept one",
        "kept\r\ntwo",
        "kept\ntwo",
        "  ",
        "x" * 50,
        "boom",
        *(f"more {index}" for index in range(60)),
    ]
    source = write_lines(tmp_path / "in.jsonl", texts)
    with open(source, "a") as file:
        file.write("not json\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    job = Prepare(
        [source, str(tmp_path / "bad.txt")],
        stages=(Normalize(), MinLength(1), MaxLength(40), FailOn("boom"), ExactDuplicates()),
        split=HashSplit(0.1, 0.1),
    )
    figures = run(job, tmp_path / "out")
    assert figures["documents_in"] == 66
    assert figures["documents"] == 62
    assert figures["dropped"] == {
        "FailOn failed: ZeroDivisionError": 1,
        "blank": 1,
        "duplicate": 1,
        "longer than 40 characters": 1,
    }
    assert figures["quarantined"] == 2
    out = documents_of(tmp_path / "out", "train", "validation", "test")
    assert len(out) == sum(row["documents"] for row in figures["splits"].values()) == 62
    assert {item.text for item in out} == {"kept one", "kept\ntwo", *texts[6:]}
    dropped = [json.loads(line) for line in (tmp_path / "out/dropped.jsonl").open()]
    assert {(item["reason"], item["id"]) for item in dropped} == {
        ("FailOn failed: ZeroDivisionError", "5"),
        ("blank", "3"),
        ("longer than 40 characters", "4"),
        ("duplicate", "2"),
    }
    assert next(item["detail"] for item in dropped if item["reason"] == "duplicate") == "of 1"
    assert next(item["detail"] for item in dropped if "failed" in item["reason"]) == "in a stage"
    quarantined = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    assert [(item["file"], item["position"]) for item in quarantined] == [
        (source, "line 67"),
        (str(tmp_path / "bad.txt"), "byte 2"),  # behind the mark that says UTF-16
    ]
    card = json.loads((tmp_path / "out/data_card.json").read_text())
    assert card["sources"]["files"]["documents"] == 62
    assert card["dropped"] == figures["dropped"]
    assert card["split"]["validation"] == 0.1
    assert not (tmp_path / "out/.work").exists()


def test_strings_that_are_no_unicode_stop_nothing(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "x.jsonl").write_text('{"text": "one", "url": "\\ud800", "k\\ud800": "\\udfff"}\n')
    try:
        (folder / os.fsdecode(b"\xff.txt")).write_text("two")
    except OSError:
        pytest.skip("this file system refuses names that are not UTF-8")
    (folder / "y.txt").write_text("three")
    job = Prepare([str(folder)], split=HashSplit(0, 0))
    assert path_fingerprint(job.inputs()[0])
    figures = run(job, tmp_path / "out")
    assert (figures["documents"], figures["quarantined"]) == (2, 1)
    assert [item.text for item in documents_of(tmp_path / "out", "train")] == ["one", "three"]
    (quarantined,) = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    assert (quarantined["file"], quarantined["reason"]) == (f"{folder}/\ufffd.txt", "file name not utf-8")


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a", "b", "c", " ", "d e", "é", "e\u0301", "long " * 9]), min_size=1, max_size=40
    ),
    st.booleans(),
    st.booleans(),
)
def test_counts_add_up_whatever_comes(tmp_path_factory, texts, exact, tail):
    folder = tmp_path_factory.mktemp("prepare")
    source = write_lines(folder / "in.jsonl", texts)
    job = Prepare(
        [source],
        stages=(Normalize(), MinLength(1), MaxLength(20), *([ExactDuplicates()] if exact else [])),
        split=TailSplit(0.3) if tail else HashSplit(0, 0),
    )
    kept = [Normalize()(Document(text, "")).text for text in texts if text.strip() and len(text) <= 20]
    kept = list(dict.fromkeys(kept)) if exact else kept
    if not kept:
        with pytest.raises(UserError, match="no document is left"):
            run(job, folder / "out")
    elif tail and len("".join(kept)) * 0.7 < 1:
        with pytest.raises(UserError, match="too few"):
            run(job, folder / "out")
    else:
        figures = run(job, folder / "out")
        out = documents_of(folder / "out", *job.split.names)
        assert "".join(item.text for item in out) == "".join(kept)
        assert figures["documents_in"] + figures["cut_in_two"] == len(out) + sum(figures["dropped"].values())
        assert figures["documents"] == len(out)


def test_the_first_of_duplicates_is_kept_over_all_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_CHUNK_BYTES", 1)  # every file a chunk
    for name in "abc":
        write_lines(tmp_path / f"{name}.jsonl", [f"only {name}", "everywhere"])
    job = Prepare([JsonLines([str(tmp_path)], id_field="none")], split=HashSplit(0, 0), workers=1)
    figures = run(job, tmp_path / "out")
    assert figures["dropped"] == {"duplicate": 2}
    assert [item.id for item in documents_of(tmp_path / "out", "train") if item.text == "everywhere"] == [
        "jsonl/a.jsonl:byte30"
    ]


def test_the_result_does_not_depend_on_processes_nor_on_the_second_time(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_CHUNK_BYTES", 2000)
    for name in range(6):
        write_lines(tmp_path / f"{name}.jsonl", [f"text {name * index} " * 9 for index in range(30)])
    source = JsonLines([f"{tmp_path}/*.jsonl"], id_field="none")
    jobs = [Prepare([source], split=HashSplit(0.1, 0.1), shard_bytes=1000, workers=n) for n in (1, 2)]
    assert fingerprint(jobs[0]) == fingerprint(jobs[1])
    results = []
    for index, job in enumerate((jobs[0], jobs[1], jobs[0])):
        run(job, tmp_path / f"out{index}")
        results.append(tree(tmp_path / f"out{index}"))
    assert results[0] == results[1] == results[2]
    assert len([path for path in results[0] if path.parent.name == "train"]) > 3
    run(jobs[0], tmp_path / "out0")  # over a finished one
    assert tree(tmp_path / "out0") == results[0]


def test_a_killed_run_goes_on_from_finished_chunks(tmp_path):
    for name in range(8):
        write_lines(tmp_path / f"{name}.jsonl", [f"text {name * index} " * 9 for index in range(300)])
    script = tmp_path / "script.py"
    script.write_text(
        "import dataclasses, sys, time\n"
        "from t5style.corpus import plan\n"
        "from t5style.corpus.prepare import Prepare\n"
        "from t5style.corpus.sources import JsonLines\n"
        "from t5style.run_dir import RunDir\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Slow:\n"
        "    def __call__(self, document):\n"
        "        time.sleep(float(sys.argv[2]))\n"
        "        return document\n"
        "plan._CHUNK_BYTES = 1\n"
        "source = JsonLines([sys.argv[3]], id_field='none')\n"
        "Prepare([source], stages=[Slow()], workers=1)(RunDir(sys.argv[1]).create())\n"
    )
    command = [sys.executable, str(script)]
    subprocess.run([*command, str(tmp_path / "straight"), "0", f"{tmp_path}/*.jsonl"], check=True, timeout=60)
    killed = subprocess.Popen([*command, str(tmp_path / "killed"), "0.0005", f"{tmp_path}/*.jsonl"])
    third = tmp_path / "killed/.work/0/000002.json"
    deadline = time.monotonic() + 60
    while not third.exists():
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/train").exists()
    done = third.stat().st_mtime_ns
    result = subprocess.run(
        [*command, str(tmp_path / "killed"), "0", f"{tmp_path}/*.jsonl"],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert "chunks of files are done already" in result.stderr
    assert done < time.time_ns()
    assert tree(tmp_path / "killed") == tree(tmp_path / "straight")


def test_changed_files_are_read_again_after_a_failure(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", ["old"] + [f"t{index}" for index in range(9)])
    job = Prepare([source], split=HashSplit(0, 0))

    def failing(*_):
        raise RuntimeError("power cut")

    monkeypatch.setattr(deal, "count_documents", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        run(job, tmp_path / "out")
    assert (tmp_path / "out/.work/0/000000.json").exists()
    monkeypatch.undo()
    write_lines(tmp_path / "in.jsonl", ["new"] + [f"t{index}" for index in range(9)])
    os.utime(source, ns=(0, 0))
    run(job, tmp_path / "out")
    assert "new" in {item.text for item in documents_of(tmp_path / "out", "train")}


@pytest.mark.parametrize("calls", [1, 3, 5])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing_half_done(tmp_path, monkeypatch, calls):
    source = write_lines(tmp_path / "in.jsonl", [f"t{index}" for index in range(90)])
    job = Prepare([source], split=HashSplit(0.1, 0.1))
    run(job, tmp_path / "out")
    before = tree(tmp_path / "out")
    left = iter(range(calls))
    sync = os.fsync

    def full(descriptor):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(document.os, "fsync", full)
    with pytest.raises(UserError, match=r"the disk of .*out is full.*free space and run again"):
        run(job, tmp_path / "out")
    after = {path: data for path, data in tree(tmp_path / "out").items() if path.parts[0] != ".work"}
    assert {
        path: data for path, data in after.items() if path.parts[0] in ("train", "validation", "test")
    } == {path: data for path, data in before.items() if path.parts[0] in ("train", "validation", "test")}
    assert not [path for path in after if path.name.startswith(".")]
    monkeypatch.undo()
    run(job, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_counts_that_do_not_add_up_are_an_error(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", [f"t{index}" for index in range(9)])
    monkeypatch.setattr(deal, "count_documents", lambda folder: 8)
    with pytest.raises(RuntimeError, match="counts do not add up: 9 documents read"):
        run(Prepare([source], split=HashSplit(0, 0)), tmp_path / "out")
    assert not (tmp_path / "out/train").exists()


def die(document):
    os._exit(1)


@dataclasses.dataclass(frozen=True)
class Die:
    def __call__(self, document: Document) -> Document | Drop:
        os._exit(1)


def test_a_dead_worker_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "_CHUNK_BYTES", 1)
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [name])
    job = Prepare([JsonLines([str(tmp_path)])], stages=[Die()], workers=2)
    with pytest.raises(RuntimeError, match="one of 2 worker processes died"):
        run(job, tmp_path / "out")


def test_wrong_inputs_and_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        run(Prepare([f"{tmp_path}/nowhere"]), tmp_path / "out")
    with pytest.raises(UserError, match="must be a list"):
        Prepare("x.txt")
    with pytest.raises(UserError, match="sources is empty"):
        Prepare([])
    with pytest.raises(UserError, match="'quarantine' or 'refuse', not 'ignore'"):
        Prepare(["x"], on_bad_input="ignore")
    with pytest.raises(UserError, match="workers must be 0 or more, not -1"):
        Prepare(["x"], workers=-1)
    with pytest.raises(UserError, match="shard_bytes must be 1 or more, not 0"):
        Prepare(["x"], shard_bytes=0)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"no document could be read: .*empty\.txt byte 0: empty file"):
        run(Prepare([f"{tmp_path}/empty.txt"]), tmp_path / "out")
    assert len((tmp_path / "out/quarantine.jsonl").read_text().splitlines()) == 1
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="hold no documents"):
        run(Prepare([f"{tmp_path}/blank.jsonl"]), tmp_path / "out2")
    (tmp_path / "x.txt").write_text("x")
    twice = Prepare([TextFiles([f"{tmp_path}/x.txt"]), f"{tmp_path}/x.txt"])
    with pytest.raises(UserError, match=r"x\.txt is named by two sources"):
        run(twice, tmp_path / "out3")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/x.txt").write_text("y")
    clash = Prepare([TextFiles([f"{tmp_path}/x.txt"]), TextFiles([f"{tmp_path}/other/x.txt"])])
    with pytest.raises(UserError, match=r"both be called 'text/x\.txt'.*different values of `source`"):
        run(clash, tmp_path / "out4")


def test_one_long_line_is_no_trouble(tmp_path):
    (tmp_path / "x.txt").write_text("word " * 2_000_000)
    figures = run(Prepare([f"{tmp_path}/x.txt"], split=TailSplit(0.1)), tmp_path / "out")
    assert figures["splits"]["train"]["characters"] == 9_000_000


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="../shared/data is not there")
def test_tail_split_of_shakespeare_is_that_of_nanogpt(tmp_path):
    run(Prepare([str(SHAKESPEARE)], split=TailSplit(0.1)), tmp_path / "out")
    data = SHAKESPEARE.read_text()
    # nanoGPT's data/shakespeare_char/prepare.py: data[:int(n*0.9)] and data[int(n*0.9):].
    (train,) = documents_of(tmp_path / "out", "train")
    (validation,) = documents_of(tmp_path / "out", "validation")
    assert (len(train.text), len(validation.text)) == (1_003_854, 111_540)
    assert train.text + validation.text == data


@pytest.mark.skipif(not GUTENBERG.exists(), reason="../shared/data is not there")
def test_real_books(tmp_path):
    source = TextFiles([f"{GUTENBERG}/*.txt"], source="gutenberg", language="en")
    figures = run(Prepare([source], stages=[StripGutenberg(), Normalize()]), tmp_path / "out")
    assert figures["documents"] + figures["quarantined"] == len(list(GUTENBERG.glob("*.txt")))
    assert figures["quarantined"] == 0
    for item in documents_of(tmp_path / "out", "train", "validation", "test"):
        assert "START OF TH" not in item.text
        assert "Project Gutenberg License" not in item.text
        assert len(item.text) > 100_000


def test_killed_at_any_moment_of_the_end_it_goes_on(tmp_path, monkeypatch):
    """Each renaming and each removal in turn is the last thing that the process does."""
    source = write_lines(tmp_path / "in.jsonl", [f"text {index} " * 9 for index in range(90)])
    job = Prepare([source], split=HashSplit(0.1, 0.1), shard_bytes=2000, curriculum=Curriculum(), workers=1)
    more = dataclasses.replace(
        job, sources=[write_lines(tmp_path / "b.jsonl", ["m 1", "m 2", "text 1 " * 9])]
    )
    more = dataclasses.replace(more, extends=str(tmp_path / "straight"))
    more = dataclasses.replace(more, sources=[JsonLines([str(tmp_path / "b.jsonl")], id_field="none")])
    run(job, tmp_path / "straight")
    run(more, tmp_path / "extended")
    kind = type(epath.Path(tmp_path))
    for each, wanted in ((job, "straight"), (more, "extended")):
        expected, moments = tree(tmp_path / wanted), 0
        while True:
            left = iter(range(moments))

            def dying(self, *arguments, honest, left=left, **named):
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return honest(self, *arguments, **named)

            with monkeypatch.context() as patch:
                for name in ("rename", "rmtree", "unlink"):
                    patch.setattr(kind, name, functools.partialmethod(dying, honest=getattr(kind, name)))
                try:
                    run(each, tmp_path / "x")
                    died = False
                except KeyboardInterrupt:
                    died = True
            if not died:
                break
            work = tmp_path / "x/.work"
            if (work / "out/train").exists() and not (work / "finished.json").exists():
                (work / "out/train/.documents-00000.parquet.1.tmp").write_text("half")
            run(each, tmp_path / "x")
            assert tree(tmp_path / "x") == expected, moments
            shutil.rmtree(tmp_path / "x")
            moments += 1
        assert moments > 8
        shutil.rmtree(tmp_path / "x")


def test_fields_of_the_users_own_do_no_harm(tmp_path):
    odd = [
        {"scores": [1]},
        {"scores": {"q": "high", "n": None}},
        {"language_probability": "0.9"},
        {"pii": True},
    ]
    lines = [{"text": f"text {index}", "meta": meta} for index, meta in enumerate([*odd, {"pii": ["email"]}])]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (
        run(Prepare([str(tmp_path / "in.jsonl")], split=HashSplit(0, 0)), tmp_path / "out")["documents"] == 5
    )


@dataclasses.dataclass(frozen=True)
class Nothing:
    def __call__(self, document: Document) -> None:
        return None


def test_what_is_no_stage_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"which is no stage .* write classes with \(\)"):
        Prepare(["x"], stages=[Normalize])
    with pytest.raises(UserError, match=r"Where.stages has ExactDuplicates.*operators outside of Where"):
        Where(stages=[ExactDuplicates()], source=["a"])
    source = write_lines(tmp_path / "in.jsonl", ["one"])
    with pytest.raises(UserError, match="the stage Nothing returned NoneType for document 0"):
        run(Prepare([source], stages=[Nothing()]), tmp_path / "out")
