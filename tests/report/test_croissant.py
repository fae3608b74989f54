"""What the Croissant metadata and the dataset card say, and that their readers understand it."""

import hashlib
import json

import pytest

from t5style.report import croissant, dataset_card


def test_croissant_gives_the_documents_back(corpus):
    mlcroissant = pytest.importorskip("mlcroissant", reason="needs the package mlcroissant")
    run, card, written, *_ = corpus
    dataset = mlcroissant.Dataset(jsonld=str(run.path / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    assert not dataset.metadata.ctx.issues.warnings
    for split, documents in written.items():
        read = [
            {name.removeprefix(f"{split}/"): value.decode() for name, value in record.items()}
            for record in dataset.records(split)
        ]
        assert [record["text"] for record in read] == [document.text for document in documents]
        assert [json.loads(record.pop("meta")) for record in read] == [dict(d.meta) for d in documents]
        assert read[0] == {name: getattr(documents[0], name) for name in read[0]}
        assert set(read[0]) == set(croissant.COLUMNS) - {"meta"}
    metadata = dataset.metadata
    assert metadata.license == ["CC-BY-SA-4.0", "PSF-2.0", "Apache-2.0"]
    assert "EMAIL: 9000 found in 7000 of the documents kept" in metadata.personal_sensitive_information
    assert metadata.data_collection.startswith("1000000 documents (6100000000 bytes of text) were read")
    assert metadata.data_limitations[0].startswith(
        f"The licence of {card['licenses']['unknown']['documents']} of"
    )
    assert metadata.data_preprocessing_protocol[0].startswith(
        "ExtractHtml: 1000000 documents in, 988000 kept"
    )


def test_croissant_names_every_file_with_its_checksum(corpus):
    run, *_ = corpus
    metadata = json.loads((run.path / "croissant.json").read_text())
    files = {x["contentUrl"]: x for x in metadata["distribution"] if x["@type"] == "cr:FileObject"}
    on_disk = {path.relative_to(run.path).as_posix(): path for path in run.path.glob("*/*.parquet")}
    assert len(files) > 2
    assert files.keys() == on_disk.keys()
    for name, path in on_disk.items():
        assert files[name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert files[name]["contentSize"] == f"{path.stat().length} B"


def test_dataset_card_is_read_by_the_hub(corpus):
    hub = pytest.importorskip("huggingface_hub", reason="needs the package huggingface_hub")
    run, *_ = corpus
    card = hub.DatasetCard((run.path / "README.md").read_text())
    assert card.data.language[:2] == ["en", "de"]
    assert "unknown" not in card.data.language
    assert card.data.license == ["apache-2.0", "cc-by-sa-4.0", "other", "unknown"]
    assert card.data.size_categories == ["100K<n<1M"]
    (config,) = card.data.to_dict()["configs"]
    for entry in config["data_files"]:
        assert list(run.path.glob(entry["path"])), entry
    assert "| forum &amp; &lt;b&gt;board&lt;/b&gt; |" in card.text
    assert "| URL\\_CREDENTIALS | 1,000 | 777 |" in card.text


@pytest.mark.parametrize(
    ("documents", "category"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (10**6, "1M<n<10M"),
        (10**12 - 1, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_size_categories(documents, category):
    assert dataset_card.head({"documents": documents, "splits": {}})["size_categories"] == [category]
