"""All families by model_type. A model is saved as the first one of these that computes the same."""

from t5style.models.convert_rows import Family
from t5style.models.families import (
    bert,
    deepseek,
    gemma,
    gpt2,
    gpt_neox,
    gpt_oss,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen,
    smollm3,
    switch_transformers,
    t5,
)

FAMILIES: dict[str, Family] = {
    **t5.FAMILIES,
    **switch_transformers.FAMILIES,
    **llama.FAMILIES,
    **mistral.FAMILIES,
    **qwen.FAMILIES,
    **smollm3.FAMILIES,
    **gemma.FAMILIES,
    **olmo2.FAMILIES,
    **phi3.FAMILIES,
    **deepseek.FAMILIES,
    **gpt_oss.FAMILIES,
    **gpt2.FAMILIES,
    **gpt_neox.FAMILIES,
    **bert.FAMILIES,
}
