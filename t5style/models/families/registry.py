"""All families by model_type. A model is saved as the first one of these that computes the same."""

from t5style.models.convert_rows import Family
from t5style.models.families import llama, t5

FAMILIES: dict[str, Family] = {
    **t5.FAMILIES,
    **llama.FAMILIES,
}
