"""What stands on an encoder-only model: a pooled vector, classes, words foretold (Devlin et al. 2019)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from t5style.models.attention_layers import norm, projection
from t5style.models.config import TransformerConfig
from t5style.nn.activations import FUNCTIONS
from t5style.nn.parameter import named, zeros
from t5style.nn.projection import project


class EncoderHeads(nn.Module):
    """The heads that config.pooler, classes and masked_head name.

    Parameters: `pooler/{kernel,bias}` `[embed, embed]`; `classifier/{kernel,bias}` `[embed, classes]`;
    `transform/{kernel,bias}` `[embed, embed]`, `transform_norm/{scale,bias}` and `bias` `[vocab]`, for the
    words, whose kernel is the embedding.
    """

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        width, square = (c.d_model,), ("embed", "latent")
        if c.pooler:
            self.pooler = projection(c, "head", width, width, square, bias=True)
        if c.classes:
            self.classifier = projection(c, "head", width, (c.classes,), ("embed", "one"), bias=True)
        if c.masked_head:
            self.transform = projection(c, "head", width, width, square, bias=True)
            self.transform_norm = norm(c)
            self.bias = self.param(
                "bias", named(zeros, ("vocab",)), (c.vocab_size,), jnp.dtype(c.param_dtype)
            )

    def __call__(self, encoded: jax.Array, embedding: jax.Array) -> dict[str, jax.Array]:
        """Of encoded `[batch, length, embed]` and the embedding `[vocab, embed]`, by the config:

        'pooled': tanh of a projection of each row's first token, `[batch, embed]`;
        'classes': float32 logits, of that `[batch, classes]`, or without it of each token `[batch, length,
          classes]`;
        'logits': of the words, float32 `[batch, length, vocab]`.
        """
        c = self.config
        out: dict[str, jax.Array] = {}
        if c.pooler:
            out["pooled"] = jnp.tanh(self.pooler(encoded[:, 0]))
        if c.classes:
            out["classes"] = self.classifier(out.get("pooled", encoded).astype(jnp.float32))
        if c.masked_head:
            hidden = self.transform_norm(FUNCTIONS[c.activations[0]](self.transform(encoded)))
            words = project(hidden, embedding.T, precision=c.precision, out_dtype=jnp.float32)
            out["logits"] = words + self.bias.astype(jnp.float32)
        return out
