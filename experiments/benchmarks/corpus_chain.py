"""The whole chain from raw documents to a deduplicated corpus, by t5style and by datatrove.

    python experiments/benchmarks/corpus_chain.py --data=../shared/data
    python experiments/benchmarks/corpus_chain.py --data=../shared/data --copies=4 --processes

The documents are real: news pages (`extract/html`), and articles, books and encyclopaedia text (`dedup`,
`pretrain`) in pieces. Both sides extract the pages' text with trafilatura, apply Gopher's quality and
repetition rules, C4's and FineWeb's, redact personal data, and remove near-duplicates by MinHash with 14
bands of 8 rows of word 5-grams. Each side does what its own stages do, with their defaults; t5style also
identifies languages, removes exact duplicates, splits, and writes its report, which datatrove does not (its
language filter would have to download a model). CPU time is of the process and its children, one process
each; megabytes are of the raw input, HTML markup included. --processes compares one process with two,
and with two programs of one process each, side by side.
--copies multiplies the texts, each copy with other words in places, to show how the cost grows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import pathlib
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterator


def cpu() -> float:
    """Seconds of CPU time of this process and of the children that have ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def pages(data: pathlib.Path) -> Iterator[str]:
    for path in sorted((data / "extract/html").glob("*.html.gz")):
        yield gzip.decompress(path.read_bytes()).decode("utf-8", "replace")


def texts(data: pathlib.Path) -> Iterator[str]:
    for line in (data / "dedup/articles_1000.train").read_text().splitlines():
        yield line.split(" ", 1)[1]
    for path in sorted((data / "pretrain/gutenberg").glob("*.txt")):
        piece: list[str] = []
        for paragraph in path.read_text(errors="replace").split("\n\n"):
            piece.append(paragraph)
            if sum(map(len, piece)) > 4000:
                yield "\n\n".join(piece)
                piece = []
    wiki = (data / "pretrain/wikitext2-valid.txt").read_text()
    yield from (part for part in wiki.split("\n = ") if len(part) > 500)


def make(data: pathlib.Path, folder: pathlib.Path, copies: int) -> int:
    """Writes html.jsonl and text.jsonl; returns their texts' bytes."""
    draw, size = random.Random(0), 0
    for name, documents in (("html", list(pages(data))), ("text", list(texts(data)))):
        with (folder / f"{name}.jsonl").open("w") as file:
            for copy in range(copies):
                for number, text in enumerate(documents):
                    if copy:
                        words = text.split(" ")
                        for _ in range(len(words) // 8):
                            words[draw.randrange(len(words))] = f"w{draw.randrange(10**6)}"
                        text = " ".join(words)
                    size += len(text.encode())
                    meta = {"meta": {"format": "html"}} if name == "html" else {}
                    file.write(json.dumps({"text": text, "id": f"{name}-{copy}-{number}"} | meta) + "\n")
    return size


def ours(folder: pathlib.Path, out: pathlib.Path, workers: int = 1) -> tuple[int, dict[str, float]]:
    """Documents kept, and each stage's seconds."""
    from t5style.corpus import extract, language, normalize, operators, prepare, privacy, quality, stages
    from t5style.run_dir import RunDir

    chain = [
        extract.Html(),
        normalize.Normalize(),
        stages.MinLength(),
        language.Identify(),
        quality.Gopher(),
        quality.C4(),
        quality.FineWeb(),
        privacy.Redact(),
        operators.ExactDuplicates(),
        operators.NearDuplicates(),
    ]
    job = prepare.Prepare([str(folder)], stages=chain, workers=workers, shard_bytes=8 << 20)
    figures = job(RunDir(str(out)).create())
    return figures["documents"], json.loads((out / "timings.json").read_text())["stages"]


def in_new_processes(folder: pathlib.Path, out: pathlib.Path, workers: int, copies: int) -> int:
    """The chain as its user starts it: imports and compiled kernels are loaded anew."""
    context = multiprocessing.get_context("spawn")
    runs = [context.Process(target=ours, args=(folder, out / str(copy), workers)) for copy in range(copies)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
        if run.exitcode:
            raise RuntimeError(f"a run ended with {run.exitcode}")
    return int(json.loads((out / "0/data_card.json").read_text())["documents"])


def datatrove(folder: pathlib.Path, out: pathlib.Path) -> int:
    """Documents kept."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    def run(*pipeline: object, tasks: int = 1) -> None:
        logs = tempfile.mkdtemp(dir=out)
        LocalPipelineExecutor(
            list(pipeline), tasks=tasks, workers=1, skip_completed=False, logging_dir=logs
        ).run()

    for name in ("html", "text"):
        run(
            JsonlReader(str(folder), glob_pattern=f"{name}.jsonl"),
            *([Trafilatura()] if name == "html" else []),
            GopherRepetitionFilter(),
            GopherQualityFilter(),
            C4QualityFilter(),
            FineWebQualityFilter(),
            PIIFormatter(),
            JsonlWriter(str(out / "filtered"), output_filename=f"{name}.jsonl", compression=None),
        )
    config = minhash.MinhashConfig()
    read = JsonlReader(str(out / "filtered"))
    run(read, minhash.MinhashDedupSignature(str(out / "signatures"), config=config))
    buckets = minhash.MinhashDedupBuckets(str(out / "signatures"), str(out / "buckets"), config=config)
    run(buckets, tasks=config.num_buckets)
    run(minhash.MinhashDedupCluster(str(out / "buckets"), str(out / "remove"), config=config))
    kept = out / "kept"
    write = JsonlWriter(str(kept), output_filename="kept.jsonl", compression=None)
    run(read, minhash.MinhashDedupFilter(str(out / "remove")), write)
    return sum(len(path.read_text().splitlines()) for path in kept.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--processes", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "in").mkdir()
        size = make(options.data, folder / "in", options.copies)
        print(f"{size / 1e6:.1f} MB of raw documents")

        def measure(label: str, work: Callable[[pathlib.Path], int], copies: int = 1) -> float:
            out = pathlib.Path(tempfile.mkdtemp(dir=folder))
            began, wall = cpu(), time.monotonic()
            kept = work(out)
            seconds, wall = cpu() - began, time.monotonic() - wall
            speed = copies * size / 1e6 / seconds
            print(f"{label:24} {speed:8.2f} MB per CPU second, {wall:7.1f} s, {kept} documents kept")
            return wall if options.processes else seconds

        stages: dict[str, float] = {}

        def one(out: pathlib.Path) -> int:
            kept, seconds = ours(folder / "in", out)
            stages.update(seconds)
            return kept

        measure("t5style, first (compiles)", one)
        if options.processes:
            best = {"one process": float("inf"), "two processes": float("inf"), "two programs": float("inf")}
            for _ in range(options.rounds):
                for label in best:
                    workers = 2 if label == "two processes" else 1
                    copies = 2 if label == "two programs" else 1

                    def work(out: pathlib.Path, workers: int = workers, copies: int = copies) -> int:
                        return in_new_processes(folder / "in", out, workers, copies)

                    best[label] = min(best[label], measure(f"t5style, {label}", work, copies))
            print(f"two processes are {best['one process'] / best['two processes']:.2f} times as fast as one")
            limit = 2 * best["one process"] / best["two programs"]
            print(f"two programs of one process, side by side, {limit:.2f} times: the machine's own limit")
            return
        times: dict[str, list[float]] = {"t5style": [], "datatrove": []}
        for _ in range(options.rounds):
            times["t5style"].append(measure("t5style", one))
            try:
                times["datatrove"].append(measure("datatrove", lambda out: datatrove(folder / "in", out)))
            except ImportError as error:
                print(f"datatrove is not here ({error}): pip install 'datatrove[processing]==0.10.1'")
                break
        for stage, seconds in stages.items():
            print(f"  {stage:24} {seconds:8.2f} s  {100 * seconds / sum(stages.values()):5.1f} %")
        if times["datatrove"]:
            ratio = min(times["datatrove"]) / min(times["t5style"])
            print(f"t5style is {ratio:.1f} times as fast as datatrove")


if __name__ == "__main__":
    main()
