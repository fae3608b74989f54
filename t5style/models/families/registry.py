"""All families by model_type. A model is saved as the first one of these that computes the same."""

from t5style.models.convert_rows import Family
from t5style.models.families import bert, gpt2, gpt_neox, llama, switch_transformers, t5

FAMILIES: dict[str, Family] = {
    **t5.FAMILIES,
    **switch_transformers.FAMILIES,
    **llama.FAMILIES,
    **gpt2.FAMILIES,
    **gpt_neox.FAMILIES,
    **bert.FAMILIES,
}
