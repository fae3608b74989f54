import errno
import gzip
import json
import os

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from t5style.corpus import document
from t5style.corpus.document import (
    Document,
    DocumentWriter,
    ShardWriter,
    count_documents,
    open_lines,
    read_documents,
    read_ids,
    write_documents,
)
from t5style.run_dir import UserError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
DOCUMENTS = [
    Document(
        "text with\nlines\tand 日本語 🙂",
        "a/1",
        "book",
        "https://example.org/1",
        "CC0-1.0",
        "ja",
        {"n": 1, "l": ["x"]},
    ),
    Document("", "a/2"),
    Document("\u2028\x00 odd \u2581", "a/3", meta={"deep": {"er": None}}),
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_back_what_was_written(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    assert write_documents(path, iter(DOCUMENTS)) == 3
    assert list(read_documents(path)) == DOCUMENTS
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_documents_give_the_same_bytes(tmp_path, suffix):
    first, second = tmp_path / f"x{suffix}", tmp_path / f"y{suffix}"
    write_documents(first, DOCUMENTS)
    write_documents(second, DOCUMENTS)
    assert first.read_bytes() == second.read_bytes()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(),
            st.dictionaries(st.text(), st.one_of(st.none(), st.integers(-9, 9), st.text()), max_size=3),
        )
    )
)
def test_any_text_and_meta_survive_parquet_and_json(tmp_path_factory, items):
    folder = tmp_path_factory.mktemp("documents")
    documents = [Document(text, str(index), meta=meta) for index, (text, meta) in enumerate(items)]
    for suffix in (".parquet", ".jsonl"):
        write_documents(folder / f"x{suffix}", documents)
        assert list(read_documents(folder / f"x{suffix}")) == documents


def test_many_row_groups_keep_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "_GROUP_ROWS", 7)
    documents = [Document(str(index), f"id{index}") for index in range(50)]
    write_documents(tmp_path / "x.parquet", documents)
    assert list(read_documents(tmp_path / "x.parquet")) == documents
    assert list(read_ids(tmp_path / "x.parquet")) == [f"id{index}" for index in range(50)]


def test_folder_and_pattern_are_read_in_order_of_names(tmp_path):
    for name in ("b", "a", "c"):
        write_documents(tmp_path / f"{name}.jsonl", [Document(name, name)])
    (tmp_path / "dropped.jsonl").write_text('{"id": "gone", "text": "gone"}\n')
    assert [item.id for item in read_documents(tmp_path)] == ["a", "b", "c"]
    assert [item.id for item in read_documents(str(tmp_path / "[bc].jsonl"))] == ["b", "c"]


def test_shards_are_named_by_their_number_and_full(tmp_path):
    documents = [Document("x" * 10, str(index)) for index in range(25)]
    with ShardWriter(tmp_path / "train", shard_bytes=100) as writer:
        for item in documents:
            writer.write(item)
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == [
        f"documents-{index:05d}-of-00003.parquet" for index in range(3)
    ]
    assert list(read_documents(tmp_path / "train")) == documents
    assert count_documents(tmp_path / "train") == 25


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write_documents(path, DOCUMENTS)
    before = path.read_bytes()

    def failing():
        yield DOCUMENTS[0]
        raise ValueError("in the middle")

    with pytest.raises(ValueError, match="in the middle"):
        write_documents(path, failing())
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, suffix):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(document.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_documents(tmp_path / f"x{suffix}", DOCUMENTS)
    assert list(tmp_path.iterdir()) == []


def test_missing_and_wrong_paths_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no documents at .*nowhere"):
        list(read_documents(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no document files"):
        list(read_documents(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="folders train: name one"):
        list(read_documents(tmp_path))
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"must end in one of \.parquet"):
        list(read_documents(tmp_path / "x.csv"))
    with pytest.raises(UserError, match=r"must end in one of \.parquet"):
        DocumentWriter(tmp_path / "y.csv")


def test_a_file_of_something_else_is_named_with_its_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": "1", "text": "t"}\n{"id": "2"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl, line 2"):
        list(read_documents(tmp_path / "x.jsonl"))
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        list(read_documents(tmp_path / "x.parquet"))
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"id": ["1"], "content": ["t"]}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"no column 'text'.*id, content"):
        list(read_documents(tmp_path / "y.parquet"))


def test_parquet_is_plain_for_other_programs(tmp_path):
    import pyarrow.parquet

    write_documents(tmp_path / "x.parquet", DOCUMENTS)
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet").to_pydict()
    assert table["text"] == [item.text for item in DOCUMENTS]
    assert json.loads(table["meta"][0]) == {"n": 1, "l": ["x"]}


def test_zstd_of_several_frames_is_read_whole_and_a_cut_one_is_noticed(tmp_path):
    data = bytes(range(256)) * 4000
    frame = zstandard.ZstdCompressor().compress(data)
    (tmp_path / "x.zst").write_bytes(frame + frame)
    with open_lines(tmp_path / "x.zst") as file:
        assert file.read() == data + data
    (tmp_path / "x.zst").write_bytes(frame + frame[:-5])
    with open_lines(tmp_path / "x.zst") as file, pytest.raises(EOFError, match="inside a zstd frame"):
        file.read()
    (tmp_path / "x.gz").write_bytes(gzip.compress(data)[:-12])
    with open_lines(tmp_path / "x.gz") as file, pytest.raises(EOFError):
        file.read()


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_broken_compression_is_named_with_its_file(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write_documents(path, [Document(os.urandom(500).hex(), str(n)) for n in range(2000)])
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=rf"x{suffix} cannot be decompressed after line \d{{4}} \(EOFError"):
        list(read_documents(path))
    path.write_bytes(b"this is not compressed at all")
    with pytest.raises(UserError, match=r"cannot be decompressed after line 0 .*copy or make it again"):
        list(read_documents(path))
