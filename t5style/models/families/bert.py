"""BERT and what has its form: MiniLM, E5, BGE, GTE.

Tensors say which heads a checkpoint has, not config.json: a published one often holds more than the class in
`architectures` (bert-base-uncased: a pooler, and BertForMaskedLM has none).
"""

import re
from collections.abc import Mapping
from typing import Any

from t5style.models.config import TransformerConfig
from t5style.models.convert_rows import THEIR_ACTIVATIONS, Family, Fields, Row, Shape, linear, norm
from t5style.run_dir import UserError

_POOLER, _CLASSIFIER = "bert.pooler.dense", "classifier"
_WORDS = "cls.predictions"


def _rows(config: TransformerConfig) -> tuple[Row, ...]:
    del config
    ours, theirs = "encoder/layers", "bert.encoder.layer.{layer}"
    return (
        Row("embedding", "bert.embeddings.word_embeddings.weight"),
        Row("position_embedding", "bert.embeddings.position_embeddings.weight"),
        Row("token_type_embedding", "bert.embeddings.token_type_embeddings.weight"),
        *norm("embedding_norm", "bert.embeddings.LayerNorm"),
        *linear(f"{ours}/attention/query", f"{theirs}.attention.self.query"),
        *linear(f"{ours}/attention/key", f"{theirs}.attention.self.key"),
        *linear(f"{ours}/attention/value", f"{theirs}.attention.self.value"),
        *linear(f"{ours}/attention/output", f"{theirs}.attention.output.dense", 2),
        *norm(f"{ours}/attention_output_norm", f"{theirs}.attention.output.LayerNorm"),
        *linear(f"{ours}/mlp/inputs_0", f"{theirs}.intermediate.dense"),
        *linear(f"{ours}/mlp/output", f"{theirs}.output.dense"),
        *norm(f"{ours}/mlp_output_norm", f"{theirs}.output.LayerNorm"),
        *linear("heads/pooler", _POOLER),
        *linear("heads/classifier", _CLASSIFIER),
        *linear("heads/transform", f"{_WORDS}.transform.dense"),
        *norm("heads/transform_norm", f"{_WORDS}.transform.LayerNorm"),
        Row("heads/bias", f"{_WORDS}.bias"),
    )


def _rename(name: str) -> str:
    """BertModel leaves `bert.` out; files made from TensorFlow's name a norm's parameters otherwise."""
    if not name.startswith(("bert.", "cls.", "classifier.", "qa_outputs.")):
        name = f"bert.{name}"
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{_NORM[m[1]]}", name)


_NORM = {"gamma": "weight", "beta": "bias"}


def _config(fields: Fields) -> TransformerConfig:
    fields.must_be("position_embedding_type", "absolute")
    fields.must_be("is_decoder", False)
    fields.must_be("add_cross_attention", False)
    fields.must_be("tie_word_embeddings", True)
    return fields.config(
        vocab_size=fields.need("vocab_size"),
        d_model=fields.need("hidden_size"),
        d_ff=fields.need("intermediate_size"),
        num_heads=fields.need("num_attention_heads"),
        encoder_layers=fields.need("num_hidden_layers"),
        activations=(fields.activation("hidden_act", "gelu"),),
        positions="learned",
        context_length=fields.need("max_position_embeddings"),
        token_types=fields.get("type_vocab_size", 2),
        embedding_norm=True,
        norm="layer",
        norm_bias=True,
        norm_placement="post",
        norm_eps=fields.get("layer_norm_eps", 1e-12),
        final_norm=False,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        tie_embeddings=True,
        scale_attention=True,
        dropout=fields.dropout("hidden_dropout_prob", "attention_probs_dropout_prob", default=0.1),
        init="normal",
        init_scale=fields.get("initializer_range", 0.02),
    )


def _held(config: TransformerConfig, tensors: Mapping[str, Shape]) -> TransformerConfig:
    classifier = tensors.get(f"{_CLASSIFIER}.weight", (0,))
    return config.replace(
        pooler=f"{_POOLER}.weight" in tensors,
        classes=classifier[0],
        masked_head=f"{_WORDS}.transform.dense.weight" in tensors,
    )


def _save(config: TransformerConfig) -> dict[str, Any]:
    activation = THEIR_ACTIVATIONS.get(config.activations[0])
    if activation is None or config.gated:
        raise UserError(f"a Hugging Face BERT cannot have activations = {config.activations}")
    if config.classes and config.masked_head:
        raise UserError("a Hugging Face BERT cannot have classes and masked_head at once")
    architecture = "BertModel"
    if config.classes:
        architecture = "BertForSequenceClassification" if config.pooler else "BertForTokenClassification"
    elif config.masked_head:
        architecture = "BertForMaskedLM"
    theirs: dict[str, Any] = {
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.encoder_layers,
        "hidden_act": activation,
        "max_position_embeddings": config.context_length,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "initializer_range": config.init_scale if config.init == "normal" else 0.02,
    }
    if config.classes:
        # transformers counts classes by their names.
        theirs["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.classes)}
        theirs["label2id"] = {f"LABEL_{i}": i for i in range(config.classes)}
    return theirs


FAMILIES = {
    "bert": Family(
        architecture="BertModel",
        kind="encoder_only",
        rows=_rows,
        embedding="bert.embeddings.word_embeddings.weight",
        head=None,
        config=_config,
        save_config=_save,
        copies=(f"{_WORDS}.decoder.weight",),
        unused=(
            re.compile(r"bert\.embeddings\.(position_ids|token_type_ids)"),  # 0, 1, 2, ... and zeros
            re.compile(r"cls\.predictions\.decoder\.bias"),  # tied to cls.predictions.bias
            # Whether a sentence follows another: a task of pretraining, which the model is not used for.
            re.compile(r"cls\.seq_relationship\.(weight|bias)"),
        ),
        rename=_rename,
        held=_held,
    ),
}
