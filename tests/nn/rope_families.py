"""Rotary frequencies of published models, as transformers computes them.

`python tests/nn/rope_families.py` writes golden/rope.json, for machines without transformers.
"""

import json
import pathlib

GOLDEN = pathlib.Path(__file__).parent / "golden" / "rope.json"
SHORT = [1.0, 1.05, 1.1, 1.5, 2.0, 2.5]
LONG = [1.1, 1.4, 3.0, 12.0, 30.0, 64.0]

# name: (head_dim, theta, fraction, our RopeScaling, transformers' rope_parameters, length seen there).
CASES = {
    "llama": (128, 10_000.0, 1.0, None, {"rope_type": "default"}, None),
    "phi_3 without scaling": (96, 10_000.0, 1.0, None, {"rope_type": "default"}, None),
    "gemma_3": (
        16,
        1e6,
        1.0,
        {"kind": "linear", "factor": 8.0},
        {"rope_type": "linear", "factor": 8.0},
        None,
    ),
    "llama_3_1": (
        *(128, 500_000.0, 1.0),
        {
            **{"kind": "llama3", "factor": 8.0, "original_length": 8192},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
        {
            **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
            **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        },
        None,
    ),
    "qwen_2_5": (
        *(128, 1e6, 1.0),
        {"kind": "yarn", "factor": 4.0, "original_length": 32768},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        None,
    ),
    "half of a head": (
        *(32, 10_000.0, 0.5),
        {"kind": "yarn", "factor": 2.0, "original_length": 64, "attention_factor": 1.25},
        {
            **{"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
            **{"attention_factor": 1.25, "partial_rotary_factor": 0.5},
        },
        None,
    ),
    "gpt_oss": (
        *(64, 150_000.0, 1.0),
        {"kind": "yarn", "factor": 32.0, "original_length": 4096, "truncate": False},
        {
            **{"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
            **{"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        },
        None,
    ),
    "deepseek_v2": (
        *(64, 10_000.0, 1.0),
        {"kind": "yarn", "factor": 40.0, "original_length": 4096, "mscale": 1.0, "mscale_all_dim": 0.707},
        {
            **{"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096},
            **{"mscale": 1.0, "mscale_all_dim": 0.707},
        },
        None,
    ),
    **{
        f"phi_3, {length} tokens": (
            *(16, 10_000.0, 0.75),
            {
                **{"kind": "longrope", "factor": 32.0, "original_length": 4096, "length_in_use": length},
                **{"short_factors": SHORT, "long_factors": LONG},
            },
            {
                **{"rope_type": "longrope", "factor": 32.0, "original_max_position_embeddings": 4096},
                **{"short_factor": SHORT, "long_factor": LONG, "partial_rotary_factor": 0.75},
            },
            length,
        )
        for length in (4096, 4097)
    },
}


def of_transformers(name: str) -> tuple[list[float], float]:
    """The frequencies and the factor on cosines and sines of a case."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    head_dim, theta, _, _, parameters, length = CASES[name]
    parameters = {"rope_theta": theta, **parameters}
    config = LlamaConfig(head_dim=head_dim, rope_parameters=parameters, max_position_embeddings=131072)
    if parameters["rope_type"] == "default":
        module = LlamaRotaryEmbedding(config)
        return module.inv_freq.tolist(), module.attention_scaling
    compute = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    frequencies, factor = compute(config, None, seq_len=length)
    return frequencies.tolist(), factor


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: of_transformers(name) for name in CASES}) + "\n")
