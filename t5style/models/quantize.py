"""Parameters in int8, for inference."""

from typing import Any

from t5style.models.config import TransformerConfig
from t5style.nn.projection import quantize_int8


def quantize(config: TransformerConfig, params: Any) -> Any:
    """The parameters with kernels of projections in int8, one scale per output (`kernel_scale`, beside each).

    The embedding is among them where it is the head too. Left as they are: experts and their routers, the
    projections of latent attention that queries go through, norms, biases, tables.
    """

    def walk(tree: Any, path: tuple[str, ...], first: int) -> Any:
        """first: where a kernel's own dimensions begin, behind that of the layers."""
        if isinstance(tree, tuple):
            return tuple(walk(part, path, 0) for part in tree)
        if not isinstance(tree, dict) or {"router", "experts", "shared_gate", "key_up", "value_up"} & set(
            path
        ):
            return tree
        made = {
            name: walk(part, (*path, name), 1 if name in ("layers", "moe_layers") else first)
            for name, part in tree.items()
        }
        if "kernel" in tree:
            # The output of attention sums over heads and their widths.
            inner = 2 if path[-1] == "output" and path[-2].endswith("attention") else 1
            made["kernel"], made["kernel_scale"] = quantize_int8(tree["kernel"], range(first, first + inner))
        return made

    made = walk(params, (), 0)
    if config.tie_embeddings:
        made["embedding"], made["embedding_scale"] = quantize_int8(params["embedding"], (1,))
    return made
