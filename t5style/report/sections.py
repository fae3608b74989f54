"""The parts of the report, each from the stages whose folders have what it needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t5style.report import charts, evaluation, planning
from t5style.report.stage import Stage
from t5style.run_dir import RunDir

CONFIG = "config.gin"
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "sentencepiece",
    "tensorstore",
)


def build(stages: list[Stage]) -> dict[str, Any]:
    """Everything the template shows; under 'charts', the Plotly figures by the id of their place."""
    figures: dict[str, charts.Figure] = {}
    run = stages[0].folder.parent  # where the stages of one workflow lie, with the run's own config
    return {
        "tiles": tiles(stages),
        "stages": [summary(stage) for stage in stages],
        "total_seconds": sum(stage.seconds or 0.0 for stage in stages),
        "data": [card for stage in stages if (card := data_card(stage))],
        "stores": [store for stage in stages if (store := token_store(stage))],
        "training": [part for stage in stages if (part := training(stage, figures))],
        "plans": planning.plans(stages, figures),
        "evaluations": [part for stage in stages for part in evaluation.evaluations(stage, figures)],
        "samples": [group for stage in stages for group in evaluation.samples(stage)],
        "vocabularies": [facts for stage in stages if (facts := vocabulary(stage))],
        "lineage": lineage(stages),
        "configs": [(stage.name, tree(stage.config)) for stage in stages],
        "gin": (run / CONFIG).read_text() if (run / CONFIG).exists() else "",
        "charts": figures,
    }


def tiles(stages: list[Stage]) -> list[tuple[str, str]]:
    """The run at a glance: (figure, what it is)."""
    found: list[tuple[str, str]] = []
    for stage in stages:
        if (card := stage.json("data_card.json")) is not None:
            found.append((f"{card['documents']:,}", "documents"))
        if stage.json("vocabulary.json") is not None and "vocab_size" in stage.figures:
            found.append((f"{stage.figures['vocab_size']:,}", "ids in the vocabulary"))
    trained = [stage for stage in stages if stage.metrics]
    if trained and isinstance(parameters := trained[0].figures.get("parameters"), int):
        found.append((rounded(parameters), "parameters"))
    for stage in trained:
        tokens = stage.series("train/tokens")[1]
        if tokens:
            found.append((rounded(tokens[-1]), f"tokens read: {stage.name}"))
    return found


def rounded(count: float) -> str:
    """1234567 -> 1.23 M."""
    for unit in ("", " k", " M", " B"):
        if count < 1000 or unit == " B":
            return f"{count:.3g}{unit}"
        count /= 1000
    raise AssertionError("unreachable")


def summary(stage: Stage) -> dict[str, Any]:
    """One line of the table of stages."""
    return {
        "name": stage.name,
        "job": stage.job,
        "folder": str(stage.folder),
        "seconds": stage.seconds,
        "finished": stage.manifest.get("finished", ""),
        "figures": flat(stage.figures),
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A tree of figures as (name, value) with plain values; long lists and texts are left out."""
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += flat(value, f"{name} / ")
        elif (
            value is None
            or isinstance(value, int | float | bool)
            or (isinstance(value, str) and len(value) < 80)
        ):
            rows.append((name.replace("_", " "), value))
    return rows


def data_card(stage: Stage) -> dict[str, Any] | None:
    """What the corpus is made of."""
    card = stage.json("data_card.json")
    if card is None:
        return None
    total = max(sum(row["bytes"] for row in card["sources"].values()), 1)
    return {
        "stage": stage.name,
        "tables": [
            (title, [(name, row, row["bytes"] / total) for name, row in card[key].items()])
            for title, key in (
                ("Source", "sources"),
                ("Licence", "licenses"),
                ("Language", "languages"),
                ("Split", "splits"),
            )
            if card.get(key)
        ],
        "documents_in": card["documents_in"],
        "documents": card["documents"],
        "cut_in_two": card.get("cut_in_two", 0),
        "dropped": card["dropped"],
        "quarantined": card["quarantined"],
    }


def token_store(stage: Stage) -> dict[str, Any] | None:
    """Sizes of a token store: (split, documents, examples, feature, tokens, bytes of text)."""
    if stage.json("store.json") is None:
        return None
    description = stage.config.get("features") or {}
    rows = []
    for split, counts in (stage.figures.get("splits") or {}).items():
        for key, tokens in counts.items():
            if key.endswith("_tokens"):
                feature = key.removesuffix("_tokens")
                rows.append((split, counts.get("examples"), feature, tokens, counts.get(f"{feature}_bytes")))
    return {"stage": stage.name, "features": description, "rows": rows}


def training(stage: Stage, figures: dict[str, charts.Figure]) -> dict[str, Any] | None:
    """Curves, model and time of a stage that trained."""
    if not stage.metrics:
        return None
    places: list[tuple[str, str, str]] = []  # (id, title, wide or narrow)

    def place(key: str, title: str, shape: str, figure: charts.Figure) -> None:
        identity = f"{stage.name}-{key}"
        figures[identity] = figure
        places.append((identity, title, shape))

    evaluated = [name for name in stage.metric_names if name.startswith("eval/") and name.endswith("/loss")]
    losses = {"train": stage.series("train/loss")} | {
        name.removesuffix("/loss"): stage.series(name) for name in evaluated
    }
    losses = {name: series for name, series in losses.items() if series[0]}
    if losses:
        place("loss", "Loss (nats per target token)", "wide", charts.curves(losses, "loss"))
    accuracies = {"train": stage.series("train/accuracy")} | {
        name.removesuffix("/accuracy"): stage.series(name)
        for name in stage.metric_names
        if name.startswith("eval/") and name.endswith("/accuracy")
    }
    if accuracies["train"][0]:
        place("accuracy", "Token accuracy", "narrow", charts.curves(accuracies, "accuracy", 230))
    for name, title in (
        ("train/learning_rate", "Learning rate"),
        ("train/grad_norm", "Gradient norm"),
        ("train/tokens_per_second", "Tokens per second"),
        ("train/mfu", "Model FLOP utilisation"),
    ):
        series = stage.series(name)
        if series[0]:
            place(
                name.rsplit("/", 1)[-1], title, "narrow", charts.curves({title: series}, title.lower(), 230)
            )
    last = {name: stage.series(name) for name in stage.metric_names}
    return {
        "stage": stage.name,
        "places": places,
        "last": [(name, steps[-1], values[-1]) for name, (steps, values) in last.items()],
        "model": stage.json("model.json"),
        "figures": flat(stage.figures),
        "goodput": goodput(stage),
        "preflight_text": stage.text("preflight.txt"),
        "sentence": sentence(stage),
    }


def sentence(stage: Stage) -> str:
    """The model in words, from model.json."""
    model = stage.json("model.json")
    if model is None:
        return ""
    layers = f"{model['decoder_layers']} layers"
    kind = "Decoder-only"
    if model["encoder_layers"]:
        kind, layers = "Encoder-decoder", f"{model['encoder_layers']} + {model['decoder_layers']} layers"
    parameters = stage.figures.get("parameters")
    count = f"{parameters:,} parameters, " if isinstance(parameters, int) else ""
    return (
        f"{kind}, {count}{layers}, width {model['d_model']}, MLP {model['d_ff']} "
        f"({' × '.join(model['activations'])}), "
        f"{model['num_heads']} heads, {model['positions'].replace('_', ' ')} positions, vocabulary "
        f"{model['vocab_size']:,}, {model['dtype']} arithmetic over {model['param_dtype']} parameters."
    )


def vocabulary(stage: Stage) -> dict[str, Any] | None:
    """Facts of a stage that made a vocabulary."""
    if stage.json("vocabulary.json") is None:
        return None
    report = stage.json("vocabulary_report.json") or {}
    return {"stage": stage.name, "rows": flat(stage.figures), "languages": report.get("languages", {})}


def goodput(stage: Stage) -> dict[str, Any] | None:
    """Seconds by category over all starts of the run, with their shares."""
    sessions = stage.json("goodput.json")
    if not sessions:
        return None
    seconds: dict[str, float] = {}
    for session in sessions:
        for name, value in session["seconds"].items():
            seconds[name] = seconds.get(name, 0.0) + value
    total = sum(seconds.values()) or 1.0
    rows = sorted(((name, value, value / total) for name, value in seconds.items()), key=lambda row: -row[1])
    return {
        "rows": rows,
        "sessions": len(sessions),
        "devices": sessions[-1].get("devices", ""),
        "total": total,
    }


def lineage(stages: list[Stage]) -> dict[str, Any]:
    """Where everything came from: the newest session's command, machine and packages; each stage's code and
    inputs.
    """
    sessions = {s.name: RunDir(s.folder).read_lineage().get("sessions", []) for s in stages}
    every = [one for made in sessions.values() for one in made]
    run: dict[str, Any] = max(every, key=lambda one: one["started"], default={})
    packages = run.get("packages", {})
    return {
        "run": [
            (name, run[key])
            for name, key in (
                ("Command", "command"),
                ("Started", "started"),
                ("Machine", "host"),
                ("Platform", "platform"),
                ("Python", "python"),
            )
            if key in run
        ],
        "packages": [(name, packages[name]) for name in PACKAGES if name in packages],
        "stages": [
            (
                stage.name,
                stage.manifest.get("fingerprint", ""),
                list(dict.fromkeys(_code(session["code"]) for session in sessions[stage.name])),
                stage.manifest.get("inputs") or {},
            )
            for stage in stages
        ],
    }


def _code(code: Mapping[str, Any]) -> str:
    """`0.1.0, commit 0123456789, 2 files changed since`."""
    words = [str(code.get("version", ""))]
    if "commit" in code:
        words.append(f"commit {code['commit'][:10]}")
    if changed := len(code.get("changed_files", ())):
        words.append(f"{changed} file{'s' if changed > 1 else ''} changed since")
    return ", ".join(words)


def tree(config: Any, depth: int = 0) -> str:
    """A configuration tree as indented text, class names where dataclasses were."""
    indent = "  " * depth
    if isinstance(config, Mapping):
        if set(config) == {"__name__"}:
            return str(config["__name__"])
        name = str(config.get("__class__", "")).rsplit(".", 1)[-1]
        lines = [
            f"{indent}  {key} = {tree(value, depth + 1)}"
            for key, value in config.items()
            if key != "__class__"
        ]
        return f"{name}(\n" + "\n".join(lines) + f"\n{indent})" if lines else f"{name}()"
    if isinstance(config, list) and any(isinstance(item, Mapping | list) for item in config):
        return "[\n" + "".join(f"{indent}  {tree(item, depth + 1)}\n" for item in config) + f"{indent}]"
    return repr(config)
