"""Standard deviations of the initial parameters, in one table.

't5': Mesh TensorFlow's scales as T5X keeps them (Raffel et al. 2020; the table is also that of transformers'
T5PreTrainedModel._init_weights): a unit-variance input gives unit-variance projections, and queries carry the
1/sqrt(head_dim) that T5's attention leaves out. The untied head follows T5X (fan-in).
'normal': one standard deviation for every matrix (0.02 in LLaMA, GPT-2 and BERT).
"""

import math

from t5style.nn.parameter import Init, normal


def initializer(
    scheme: str, factor: float, part: str, *, d_model: int, d_ff: int, heads: int, head_dim: int
) -> Init:
    """The initializer of one part of a model.

    Args:
      scheme: 't5' or 'normal'.
      factor: multiplies T5's standard deviations, or is the standard deviation for 'normal'.
      part: 'embedding', 'query', 'key', 'value', 'attention_output', 'mlp_input', 'mlp_output', 'router',
        'relative_bias', 'head'.
      d_model, d_ff, heads, head_dim: the model's sizes.
    """
    if scheme == "normal":
        return normal(factor)
    stddev = {
        "embedding": 1.0,
        "query": 1 / math.sqrt(d_model * head_dim),
        "key": 1 / math.sqrt(d_model),
        "value": 1 / math.sqrt(d_model),
        "attention_output": 1 / math.sqrt(heads * head_dim),
        "mlp_input": 1 / math.sqrt(d_model),
        "mlp_output": 1 / math.sqrt(d_ff),
        "router": 1 / math.sqrt(d_model),
        "relative_bias": 1 / math.sqrt(d_model),
        "head": 1 / math.sqrt(d_model),
    }[part]
    return normal(factor * stddev)
