"""Files of examples to token stores: both architectures, with and without a chat template; and tuned on."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import pytest

import t5style
from t5style.data.objectives import Preferences
from t5style.data.pipeline import BatchSource
from t5style.data.replay import describe
from t5style.data.task import Task
from t5style.data.token_store import TokenStore
from t5style.infer import chat_template
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, UserError
from t5style.tune.examples import Examples
from t5style.tune.supervised import Finetune, objective_of
from tests.tune import tiny_models

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
WORDS = (("hi", "ho", "he", "ha"), ("no", "on", "go", "do"), ("a", "b", "c", "d"))
ROLES = ("user", "assistant") * 2
CHAT = [
    {"messages": [{"role": role, "content": text} for role, text in zip(ROLES, words, strict=True)]}
    for words in WORDS
]
PAIRS = [{"prompt": f"q{x}", "chosen": f"yes {x}", "rejected": f"no {x}"} for x in "abcd"]


def lines(path: pathlib.Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def shown(store: str, architecture: str) -> set[tuple[str | None, str]]:
    """Every training example as (inputs, targets), what is not learnt marked."""
    source = BatchSource(
        Task("t", store, objective_of(TokenStore.open(store))), "train", 1, {"encoder": 80, "decoder": 80},
        architecture, pack=False,
    )  # fmt: skip
    batches = [source.evaluation_batch_at(n) for n in range(source.evaluation_batches)]
    return {(s.inputs, s.targets) for batch in batches for s in describe(batch, source.vocabulary)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A decoder-only model with a chat template, and an encoder-decoder without."""
    folder = tmp_path_factory.mktemp("models")
    decoder = tiny_models.save(folder / "decoder", decoder_only=True)
    template = chat_template.ChatTemplate(TEMPLATE, {"eos_token": "</s>"})
    chat_template.save({"default": template}, decoder)
    return decoder, tiny_models.save(folder / "both", decoder_only=False)


def test_chats_of_both_architectures(models: tuple[str, str], tmp_path: pathlib.Path) -> None:
    data = lines(tmp_path / "chat.jsonl", [*CHAT, {"text": "no chat"}, {"messages": CHAT[0]["messages"][:1]}])
    run = RunDir(tmp_path / "decoder").create()
    figures = Examples(data, models[0], validation=0.0)(run)
    assert figures["examples"] == {"train": 3}
    assert sum(figures["set_aside"].values()) == 2
    assert len((run.path / "quarantine.jsonl").read_text().splitlines()) == 2
    assert (None, "⟦: hi</s>\na: ⟧ho</s>⟦\nu: he</s>\na: ⟧ha</s>") in shown(str(run.path), "decoder_only")
    both = RunDir(tmp_path / "both").create()
    Examples(data, models[1], validation=0.0, system="s")(both)
    found = shown(str(both.path), "encoder_decoder")
    assert ("system: s\nuser: hi</s>", "ho</s>") in found
    assert ("system: s\nuser: hi\nassistant: ho\nuser: he</s>", "ha</s>") in found
    assert len(found) == 6
    last = RunDir(tmp_path / "last").create()
    Examples(data, models[0], validation=0.0, learn="completion", template="")(last)
    assert (None, "⟦user: hi\nassistant: ho\nuser: he⟧ha</s>") in shown(str(last.path), "decoder_only")


def test_a_tuned_model_keeps_its_template_and_what_ends_its_answers(
    models: tuple[str, str], tmp_path: pathlib.Path
) -> None:
    store = RunDir(tmp_path / "data").create()
    closed = TEMPLATE.replace("{{ eos_token }}", "<unk>")  # an end of turn that the parent does not know
    figures = Examples(lines(tmp_path / "chat.jsonl", CHAT), models[0], template=closed)(store)
    assert figures["examples"] == {"train": 2, "validation": 1}
    run = RunDir(tmp_path / "tuned").create()
    mesh = MeshConfig(devices=1)
    job = Finetune(
        init_from=models[0], store=str(store.path), steps=2, batch_size=2, mesh=mesh, lengths={"decoder": 64}
    )
    assert job(run)["eval/examples/tokens"] > 0
    assert chat_template.of(run.path)["default"].source == closed
    parents, tuned = t5style.load(models[0]), t5style.load(run.path)
    assert tuned.ids == dataclasses.replace(parents.ids, eos=(*parents.ids.eos, parents.vocabulary.unk_id))


def test_what_comes_of_one_record_is_in_one_split(models: tuple[str, str], tmp_path: pathlib.Path) -> None:
    replies = [{"text": x, "role": "assistant"} for x in "abc"]
    trees = [{"prompt": {"text": f"q{x}", "role": "prompter", "replies": replies}} for x in "abcdefgh"]
    data = lines(tmp_path / "trees.jsonl", trees)
    for share in (0.4, 1e-9):  # by the draw; and at least one
        run = RunDir(tmp_path / str(share)).create()
        counts = Examples(data, models[1], validation=share)(run)["examples"]
        assert counts["train"] + counts["validation"] == 24
        assert counts["validation"] == 3 if share < 0.1 else counts["validation"] > 0
        store = TokenStore.open(str(run.path))
        asked = [
            {tuple(ids) for ids in store.examples(split, "inputs", range(counts[split]))} for split in counts
        ]
        assert not asked[0] & asked[1]
    with pytest.raises(UserError, match=r"all 3 examples .* set validation = 0\.0"):
        Examples(lines(tmp_path / "one.jsonl", trees[:1]), models[1])(RunDir(tmp_path / "one").create())


def test_what_is_longer_than_the_context_is_counted(tmp_path: pathlib.Path) -> None:
    model = tiny_models.save(tmp_path / "short", decoder_only=True, context_length=7)
    data = lines(tmp_path / "p.jsonl", [{"prompt": "hi", "completion": "ho" * n} for n in (1, 2)])
    figures = Examples(data, model, validation=0.0)(RunDir(tmp_path / "run").create())
    assert (figures["examples"], figures["longer_than_context"]) == ({"train": 2}, 1)


def test_pairs_and_phrasings(models: tuple[str, str], tmp_path: pathlib.Path) -> None:
    same = {"prompt": "q", "chosen": "x", "rejected": "x "}
    run = RunDir(tmp_path / "pairs").create()
    figures = Examples(lines(tmp_path / "pairs.jsonl", [*PAIRS, same]), models[0], validation=0.0)(run)
    assert figures["set_aside"] == {"chosen and rejected are the same": 1}
    better = [{**pair, "margin": 0.5 + n} for n, pair in enumerate(PAIRS)] + [same, {**PAIRS[0], "id": "n"}]
    margins = RunDir(tmp_path / "margins").create()
    figures = Examples(lines(tmp_path / "better.jsonl", better), models[0], validation=0.0)(margins)
    assert figures["set_aside"]["a pair without a margin"] == 1
    task = Task("t", str(margins.path), Preferences())
    batch = BatchSource(task, "train", 4, {"decoder": 40}, "decoder_only").evaluation_batch_at(0)
    assert sorted(batch["margin"].tolist()) == [0.5, 1.5, 2.5, 3.5]
    found = shown(str(run.path), "decoder_only")
    assert {(None, "⟦: qa</s>\na: ⟧yes a</s>"), (None, "⟦: qa</s>\na: ⟧no a</s>")} <= found
    facts = lines(tmp_path / "facts.jsonl", [{"id": x, "x": x, "y": x + x} for x in "abcdefgh"])
    phrasings = [{"prompt": "twice {x}", "completion": "{y}"}, {"prompt": "{x} two", "completion": "is {y}"}]
    run = RunDir(tmp_path / "facts").create()
    Examples(facts, models[1], phrasings=phrasings, validation=0.0)(run)
    found = shown(str(run.path), "encoder_decoder")
    assert {inputs.split()[0] == "twice" for inputs, _ in found} == {True, False}
    assert all(("twice" in inputs) == ("is" not in targets) for inputs, targets in found)
    # Fields that are put into words are not learnt a second time, nor others in their place; null is none.
    raw = [{"id": x, "prompt": "no", "context": x, "output": "no"} for x in "ab"] + [
        {"id": "c", "context": None}
    ]
    run = RunDir(tmp_path / "raw").create()
    phrasing = [{"inputs": "read {context}", "targets": "got {context}"}]
    figures = Examples(lines(tmp_path / "raw.jsonl", raw), models[1], phrasings=phrasing, validation=0.0)(run)
    assert figures["set_aside"] == {"no context for phrasing 0": 1}
    assert shown(str(run.path), "encoder_decoder") == {(f"read {x}</s>", f"got {x}</s>") for x in "ab"}


def test_what_is_refused(models: tuple[str, str], tmp_path: pathlib.Path) -> None:
    run = RunDir(tmp_path / "run").create()
    nothing = lines(tmp_path / "nothing.jsonl", [{"text": "a", "meta": 1}])
    with pytest.raises(
        UserError, match=r"no example .*no known shape \(keys: meta, text\).* Known are messages"
    ):
        Examples(nothing, models[0])(run)
    with pytest.raises(UserError, match="no example to learn from"):
        Examples(
            lines(tmp_path / "same.jsonl", [{"prompt": "q", "chosen": "x", "rejected": "x"}]), models[0]
        )(run)
    chat = lines(tmp_path / "chat.jsonl", CHAT)
    deaf = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match=r"leaves the assistant's turns out"):
        Examples(chat, models[0], template=deaf)(run)
    strict = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not so') }}{% endif %}" + TEMPLATE
    figures = Examples(chat, models[0], template=strict, validation=0.0)(run)
    assert figures["examples"] == {"train": 2}
    assert list(figures["set_aside"]) == ["the chat template, line 1: not so"]
    aside = json.loads((run.path / "quarantine.jsonl").read_text())
    assert (aside["file"], aside["line"]) == (chat, 2)
    with pytest.raises(UserError, match=r"no example to learn from .*3 the chat template, line 1: never"):
        Examples(chat, models[0], template="{{ raise_exception('never') }}")(run)
    with pytest.raises(UserError, match="there is no model"):
        Examples(chat, str(tmp_path / "absent"))(run)
    with pytest.raises(ValueError, match=r"kind is 'chats'; it must be one of chat, pairs"):
        Examples(chat, models[0], kind="chats")
