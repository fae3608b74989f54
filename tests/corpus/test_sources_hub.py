import json
import pickle

import fsspec
import numpy as np
import pytest

from t5style.corpus import hub_sources
from t5style.corpus.document import Document
from t5style.corpus.sources import Files, HuggingFace, JsonLines, Quarantined, TensorFlowDatasets
from t5style.run_dir import UserError, canonical


def read(source):
    """(documents, quarantined) of all parts."""
    items = [item for part in source.parts() for item in pickle.loads(pickle.dumps(part)).read()]
    documents = [item for item in items if isinstance(item, Document)]
    return documents, [item for item in items if isinstance(item, Quarantined)]


@pytest.fixture
def memory():
    """An object store in memory, emptied afterwards."""
    store = fsspec.filesystem("memory")
    yield store
    store.rm("/", recursive=True)


def test_urls_of_an_object_store_are_read_like_folders(tmp_path, memory):
    lines = "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(3))
    files = {"deep/x.jsonl": lines.encode(), "a.txt": b"text", ".hidden": b"no", "deep/b.html": b"<p>page"}
    for name, data in files.items():
        memory.pipe(f"/bucket/{name}", data)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    remote, quarantined = read(Files(["memory://bucket"]))
    local, _ = read(Files([str(tmp_path)]))
    assert quarantined == []
    assert [(item.id, item.text) for item in remote] == [(item.id, item.text) for item in local]
    assert len(remote) == 5
    assert remote[0].meta["file"] == "memory:///bucket/a.txt" or remote[0].url.startswith("memory://")
    some, _ = read(Files(["memory://bucket/**/*.jsonl"]))
    assert [item.id for item in some] == [f"files/deep/x.jsonl:byte{n * 19}" for n in range(3)]
    one, _ = read(JsonLines(["memory://bucket/deep/x.jsonl"]))
    assert [item.id for item in one] == [f"jsonl/x.jsonl:byte{n * 19}" for n in range(3)]
    for path in ("memory://bucket/none.txt", "memory://bucket/*.csv"):
        with pytest.raises(UserError, match="no file or folder 'memory"):
            Files([path]).parts()
    with pytest.raises(UserError, match="nonsense"):
        Files(["nonsense://x/y"]).parts()


def test_large_files_of_an_object_store_are_read_in_pieces(memory, monkeypatch):
    from t5style.corpus import parts, table_sources

    lines = "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(300))
    memory.pipe("/bucket/x.jsonl", lines.encode())
    whole, _ = read(JsonLines(["memory://bucket"]))
    monkeypatch.setattr(parts, "CUT_BYTES", 1)
    monkeypatch.setattr(table_sources, "PIECE_BYTES", 500)
    assert len(JsonLines(["memory://bucket"]).parts()) > 9
    assert read(JsonLines(["memory://bucket"]))[0] == whole
    assert len(whole) == 300


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package datasets: pip install 't5style\["):
        HuggingFace("c4").parts()
    with pytest.raises(UserError, match=r"needs tensorflow-datasets: pip install 't5style\["):
        TensorFlowDatasets("wiki40b").parts()


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match=r"HuggingFace\.name is empty"):
        HuggingFace("")
    with pytest.raises(UserError, match="cannot be streamed"):
        HuggingFace("c4", split="train[:1%]", streaming=True)
    with pytest.raises(UserError, match=r"TensorFlowDatasets\.split is empty"):
        TensorFlowDatasets("x", split="")


def rows():
    texts = [f"text {n}" for n in range(10)]
    return {"text": texts, "url": ["http://x"] * 10, "score": [0.5] * 10, "date": ["2020-01-02"] * 10}


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_datasets(tmp_path, monkeypatch, streaming):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(hub_sources, "_ROWS", 4)
    folder = str(tmp_path / "saved")
    data = datasets.Dataset.from_dict(rows())
    datasets.DatasetDict({"train": data, "test": data.select(range(2))}).save_to_disk(folder)
    source = HuggingFace(folder, streaming=streaming, license="CC0-1.0")
    documents, quarantined = read(source)
    assert quarantined == []
    assert [item.text for item in documents] == rows()["text"]
    path = f"hf-datasets:{folder}/train"
    shard = "/shard0" if streaming else ""
    assert documents[3] == Document(
        "text 3",
        f"saved/train{shard}:row3",
        "saved",
        "http://x",
        "CC0-1.0",
        meta={"file": path, "score": 0.5},
        time="2020-01-02",
    )
    assert len(source.parts()) == (1 if streaming else 3)
    assert all(part.size > 0 for part in source.parts())
    assert source.inputs() == [folder]
    canonical(source)
    assert len(read(HuggingFace(folder, split="test"))[0]) == 2
    with pytest.raises(UserError, match=r"no split 'dev'; it has train, test"):
        HuggingFace(folder, split="dev").parts()
    _, quarantined = read(HuggingFace(folder, split="test", text_field="body"))
    assert [(item.position, item.reason) for item in quarantined] == [
        ("row 0", "no text"),
        ("row 1", "no text"),
    ]


def test_a_hugging_face_dataset_that_is_not_there(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="cannot be loaded"):
        HuggingFace(str(tmp_path / "nothing")).parts()


def test_tensorflow_datasets(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
    for package in ("array_record", "importlib_resources"):  # which making a dataset needs
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.setattr(hub_sources, "_ROWS", 4)

    class Invented(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "text": tfds.features.Text(),
                "id": tfds.features.Text(),
                "n": tfds.features.Scalar(np.int64),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for n in range(10):
                yield n, {"text": f"größer {n}", "id": f"i{n}", "n": n}

    Invented(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = TensorFlowDatasets("invented", data_dir=str(tmp_path), language="de")
    documents, quarantined = read(source)
    assert quarantined == []
    assert sorted(item.text for item in documents) == [f"größer {n}" for n in range(10)]
    assert {item.source for item in documents} == {"invented"}
    assert all(item.meta["n"] == int(item.id[1:]) for item in documents)
    assert {item.meta["position"] for item in documents} == {f"row {n}" for n in range(10)}
    assert len(source.parts()) == 3
    with pytest.raises(UserError, match="cannot be loaded"):
        TensorFlowDatasets("invented", split="dev", data_dir=str(tmp_path)).parts()
    with pytest.raises(UserError, match="cannot be loaded"):
        TensorFlowDatasets("not_invented", data_dir=str(tmp_path)).parts()
