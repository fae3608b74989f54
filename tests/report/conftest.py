"""The corpus that the tests of the data report share."""

import time

import pytest

from t5style.report import data_report
from tests.report.made_corpus import Page, make_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus with its report: run folder, card, documents by split, page, what the page holds."""
    run, card, written = make_corpus(tmp_path_factory.mktemp("corpus") / "out")
    began = time.process_time()
    path = data_report.write(run.path)
    seconds = time.process_time() - began
    text = path.read_text()
    return run, card, written, text, Page.of(text), seconds
