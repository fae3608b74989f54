"""Rollouts: answers to prompts, drawn by the decoding engine; as training batches, and on disk.

Every rollout is a file of one JSON object for each answer. A resumed run reads the batch that it had not
finished from there, bit for bit; people read the same file, and the newest as a page.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from etils import epath

from t5style.corpus.vocabulary import Vocabulary
from t5style.data.pipeline import Batch, empty_batch
from t5style.data.random import seed_of
from t5style.infer.answers import answer_all
from t5style.infer.engine import Engine
from t5style.infer.settings import Settings
from t5style.run_dir import UserError, atomic_write
from t5style.tune.prompts import Prompt

FOLDER = "rollouts"
PAGE = "latest.html"
SHOWN = 12  # prompts on the page


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
      max_new_tokens: of an answer, the token that ends it included.
      temperature: what the logits are divided by, in training too. At 1 the policy is the model itself.
      batch_size: answers that are decoded together.
      stop_tokens: ids that end an answer; None: the vocabulary's end of sequence.
    """

    max_new_tokens: int = 128
    temperature: float = 1.0
    batch_size: int = 128
    stop_tokens: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "temperature", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0.")


@dataclasses.dataclass
class Sample:
    """One answer.

    Attributes:
      example: the prompt's number in the split; sample: the answer's among those to it.
      prompt, completion: texts; prompt_tokens, tokens: ids, the answer's with what ended it.
      finish: 'stop', or 'length': it was cut at max_new_tokens.
      sampler_log_likelihoods: the sampler's, of `tokens`, at the temperature.
      log_likelihoods: the trainer's; reference_log_likelihoods, values: where there are such.
      rewards: by name, before weights; None where one failed. reward: what is learnt from; failed: what
        happened to one of them.
      advantages, returns: of `tokens`.
      learned: whether it is learnt from.
      figures: of the rollout: see policy.FIGURES.
    """

    example: int
    sample: int
    prompt: str
    completion: str
    prompt_tokens: list[int]
    tokens: list[int]
    finish: str
    sampler_log_likelihoods: list[float]
    reward: float = 0.0
    rewards: dict[str, float | None] = dataclasses.field(default_factory=dict)
    failed: str | None = None
    learned: bool = True
    advantages: list[float] = dataclasses.field(default_factory=list)
    returns: list[float] = dataclasses.field(default_factory=list)
    log_likelihoods: list[float] = dataclasses.field(default_factory=list)
    reference_log_likelihoods: list[float] = dataclasses.field(default_factory=list)
    values: list[float] = dataclasses.field(default_factory=list)
    kl_coefficient: float = 0.0
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    step: int = 0
    policy: float = 0.0


def draw(
    engine: Engine, prompts: Sequence[Prompt], vocabulary: Vocabulary, how: Sampling, n: int, seed: int
) -> list[list[Sample]]:
    """n answers to each prompt, from the whole distribution at the temperature.

    seed: with a prompt's place it decides its answers, whatever else is decoded beside them.
    """
    settings = [
        Settings(
            max_new_tokens=how.max_new_tokens,
            temperature=how.temperature,
            n=n,
            seed=seed_of(seed, place) % 2**32,
            logprobs=0,
            tempered=True,
            stop_tokens=how.stop_tokens,
        )
        for place in range(len(prompts))
    ]
    return _answered(engine, prompts, vocabulary, settings, max(how.batch_size, n))


def greedy(
    engine: Engine, prompts: Sequence[Prompt], vocabulary: Vocabulary, how: Sampling
) -> list[list[Sample]]:
    """To each prompt one answer, of the most probable token at each place."""
    settings = [Settings(max_new_tokens=how.max_new_tokens, stop_tokens=how.stop_tokens)] * len(prompts)
    return _answered(engine, prompts, vocabulary, settings, how.batch_size)


def _answered(
    engine: Engine,
    prompts: Sequence[Prompt],
    vocabulary: Vocabulary,
    settings: Sequence[Settings],
    batch_size: int,
) -> list[list[Sample]]:
    found: dict[tuple[int, int], Sample] = {}
    for batch in answer_all(engine, [p.tokens for p in prompts], settings, vocabulary, batch_size):
        for answer, _ in batch:
            prompt = prompts[answer.request]
            found[answer.request, answer.sample] = Sample(
                example=prompt.example,
                sample=answer.sample,
                prompt=prompt.text,
                completion=vocabulary.decode(answer.tokens),
                prompt_tokens=prompt.tokens.tolist(),
                tokens=[*answer.tokens, *([] if answer.end is None else [answer.end])],
                finish=answer.finish_reason or "length",
                sampler_log_likelihoods=[float(value) for value in answer.logprobs or []],
            )
    return [[found[i, j] for j in range(row.n)] for i, row in enumerate(settings)]


# ------------------------------------------------------------------------------------------------------- rows


def lay_out(samples: Sequence[Sample], lengths: Mapping[str, int], start_id: int) -> Batch:
    """The answers as a training batch, int32 `[samples, length]`, each in a row of its own, loss weights 1 on
    its tokens.

    Of a decoder-only model prompt and answer stand in the decoder's row: inputs all but the last token,
    targets all but the first. An encoder reads the prompt, and its decoder starts with `start_id`.
    """
    batch = empty_batch(len(samples), lengths)
    for row, sample in enumerate(samples):
        prompt, answer = sample.prompt_tokens, sample.tokens
        if "encoder" in lengths:
            _fill(batch, "encoder", row, "input_tokens", prompt)
            inputs, targets, before = [start_id, *answer[:-1]], answer, 0
        else:
            whole = [*prompt, *answer]
            inputs, targets, before = whole[:-1], whole[1:], len(prompt) - 1
        _fill(batch, "decoder", row, "input_tokens", inputs)
        batch["decoder_target_tokens"][row, : len(targets)] = targets
        if sample.learned:
            batch["decoder_loss_weights"][row, before : len(targets)] = 1
    return batch


def _fill(batch: Batch, side: str, row: int, name: str, tokens: Sequence[int]) -> None:
    count, width = len(tokens), batch[f"{side}_{name}"].shape[1]
    if count > width:
        raise UserError(
            f"an example has {count} tokens for the {side}, but lengths[{side!r}] is {width}: raise it, or "
            "lower max_new_tokens."
        )
    batch[f"{side}_{name}"][row, :count] = tokens
    batch[f"{side}_segment_ids"][row, :count] = 1
    batch[f"{side}_positions"][row, :count] = np.arange(count)


def places(samples: Sequence[Sample], lengths: Mapping[str, int]) -> list[slice]:
    """Where each answer's tokens stand among the decoder's targets."""
    starts = [0 if "encoder" in lengths else len(sample.prompt_tokens) - 1 for sample in samples]
    return [slice(start, start + len(sample.tokens)) for start, sample in zip(starts, samples, strict=True)]


def of_tokens(samples: Sequence[Sample], field: str, lengths: Mapping[str, int]) -> np.ndarray:
    """A field of the answers' tokens, f32 `[samples, length]`, 0 elsewhere and where there is none."""
    result = np.zeros((len(samples), lengths["decoder"]), np.float32)
    for row, (sample, where) in enumerate(zip(samples, places(samples, lengths), strict=True)):
        values = getattr(sample, field)
        if values:
            result[row, where] = values
    return result


# ------------------------------------------------------------------------------------------------------- disk


def file_of(run: epath.Path, batch: int) -> epath.Path:
    """The rollout whose first update is of this batch."""
    return run / FOLDER / f"step_{batch:08d}.jsonl"


def write(file: epath.Path, samples: Sequence[Sample]) -> None:
    """Writes a rollout, at once; float32 numbers come back as they were."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(vars(sample), ensure_ascii=False) for sample in samples]
    atomic_write(file, "\n".join(lines) + "\n")


def read(file: epath.Path) -> list[Sample] | None:
    """The rollout in a file; None where there is none, or it is damaged."""
    if not file.exists():
        return None
    try:
        return [Sample(**json.loads(line)) for line in file.read_text().splitlines()]
    except (ValueError, TypeError):
        return None


def write_page(file: epath.Path, samples: Sequence[Sample], title: str) -> None:
    """The first prompts of a rollout with all their answers, best first, as a page."""
    groups: dict[tuple[int, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.example, sample.prompt), []).append(sample)
    parts = [_HEAD.format(title=html.escape(title))]
    for (_, prompt), answers in list(groups.items())[:SHOWN]:
        parts.append(f"<h2><pre>{html.escape(prompt)}</pre></h2>\n<table><tr>{_TITLES}</tr>")
        parts += [_row(answer) for answer in sorted(answers, key=lambda answer: -answer.reward)]
        parts.append("</table>")
    atomic_write(file, "\n".join(parts) + "\n")


_HEAD = (
    '<!doctype html><meta charset="utf-8"><title>{title}</title><style>'
    "body{{font:14px sans-serif;margin:2em}}table{{border-collapse:collapse}}.n{{text-align:right}}"
    "td,th{{border:1px solid #ccc;padding:3px 8px;vertical-align:top;text-align:left}}"
    "pre{{margin:0;white-space:pre-wrap;max-width:60em}}</style><h1>{title}</h1>"
)
_TITLES = "".join(f"<th>{name}</th>" for name in ("reward", "parts", "advantage", "tokens", "answer"))


def _row(sample: Sample) -> str:
    parts = ", ".join(
        f"{name} {'failed' if value is None else f'{value:.3g}'}" for name, value in sample.rewards.items()
    )
    advantage = float(np.mean(sample.advantages)) if sample.advantages else 0.0
    end = "" if sample.finish == "stop" else " …"
    failed = "" if sample.failed is None else f"<br>{html.escape(sample.failed)}"
    cells: Iterable[str] = (
        f'<td class="n">{sample.reward:.3g}</td>',
        f"<td>{html.escape(parts)}{failed}</td>",
        f'<td class="n">{advantage:+.3f}</td>',
        f'<td class="n">{len(sample.tokens)}</td>',
        f"<td><pre>{html.escape(sample.completion)}{end}</pre></td>",
    )
    return f"<tr>{''.join(cells)}</tr>"


# -------------------------------------------------------------------------------------------------- overlong


def soft_overlong(tokens: int, limit: int, buffer: int) -> float:
    """What an answer's length costs: nothing up to limit - buffer tokens, 1 beyond the limit, linear between
    (DAPO, Yu et al. 2025, equation 13).
    """
    return -float(np.clip((tokens - (limit - buffer)) / max(buffer, 1), 0.0, 1.0))
