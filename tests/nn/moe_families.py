"""The families' experts, tiny: settings, weights, inputs, and the same layer of transformers.

python -m tests.nn.moe_families writes tests/nn/golden/moe.json, what transformers' layers make of them.
"""

import json
import pathlib

import numpy as np

from t5style.nn.settings import MoE

GOLDEN = pathlib.Path(__file__).parent / "golden" / "moe.json"
WIDTH, HIDDEN, SHARED, EXPERTS = 8, 6, 10, 8
SWIGLU = ("silu", "linear")
# Name: settings, activations, clamp.
FAMILIES = {
    "switch_transformers": (MoE(EXPERTS, 1, HIDDEN, capacity=2), ("relu",), None),
    "mixtral": (MoE(EXPERTS, 2, HIDDEN, normalize=True), SWIGLU, None),
    "qwen2_moe": (MoE(EXPERTS, 3, HIDDEN, shared_d_ff=SHARED, shared_gate=True), SWIGLU, None),
    "qwen3_moe": (MoE(EXPERTS, 3, HIDDEN, normalize=True), SWIGLU, None),
    "deepseek_v2": (
        MoE(EXPERTS, 3, HIDDEN, scale=2.5, groups=4, groups_per_token=2, shared_d_ff=2 * HIDDEN),
        SWIGLU,
        None,
    ),
    "deepseek_v3": (
        MoE(
            EXPERTS,
            3,
            HIDDEN,
            router="sigmoid",
            correction_bias=True,
            normalize=True,
            scale=2.5,
            groups=4,
            groups_per_token=2,
            group_score="top2",
            shared_d_ff=2 * HIDDEN,
        ),
        SWIGLU,
        None,
    ),
    "gpt_oss": (
        MoE(EXPERTS, 2, HIDDEN, choose_first=True, bias=True),
        ("silu_1702", "linear_plus_one"),
        1.5,  # low enough to be met often
    ),
}


def inputs(batch: int = 2, length: int = 9, seed: int = 1) -> np.ndarray:
    """`[batch, length, embed]`."""
    return np.random.default_rng(seed).normal(size=(batch, length, WIDTH)).astype(np.float32)


def weights(moe: MoE, activations: tuple[str, ...], seed: int = 0) -> dict:
    """Parameters of MoeMlp as nested dicts of f32 arrays."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def linear(inner: int, outer: int, *lead: int, bias: bool = False) -> dict:
        kernel = {"kernel": draw(*lead, inner, outer)}
        return kernel | ({"bias": draw(*lead, outer)} if bias else {})

    def mlp(hidden: int, *lead: int, bias: bool = False) -> dict:
        tree = {f"inputs_{i}": linear(WIDTH, hidden, *lead, bias=bias) for i in range(len(activations))}
        return tree | {"output": linear(hidden, WIDTH, *lead, bias=bias)}

    tree = {
        "router": linear(WIDTH, moe.experts, bias=moe.bias),
        "experts": mlp(moe.d_ff, moe.experts, bias=moe.bias),
    }
    if moe.correction_bias:
        tree["router_bias"] = draw(moe.experts) * 0.3
    if moe.shared_d_ff:
        tree["shared"] = mlp(moe.shared_d_ff)
    if moe.shared_gate:
        tree["shared_gate"] = linear(WIDTH, 1)
    return tree


def transformers_output(name: str, x: np.ndarray, params: dict) -> np.ndarray:
    """What transformers' layer of that family makes of x with our parameters."""
    import torch

    moe = FAMILIES[name][0]
    block = _block(name, moe)
    state = {}
    experts = params["experts"]
    kernels = [experts[key]["kernel"] for key in sorted(experts) if key.startswith("inputs")]

    def copy(key: str, value: np.ndarray) -> None:
        state[key] = torch.from_numpy(np.ascontiguousarray(value))

    router = {"switch_transformers": "router.classifier", "gpt_oss": "router"}.get(name, "gate")
    copy(f"{router}.weight", params["router"]["kernel"].T)
    if name == "switch_transformers":
        for i in range(moe.experts):
            copy(f"experts.expert_{i}.wi.weight", kernels[0][i].T)
            copy(f"experts.expert_{i}.wo.weight", experts["output"]["kernel"][i].T)
    elif name == "gpt_oss":
        copy(f"{router}.bias", params["router"]["bias"])
        biases = [experts[f"inputs_{i}"]["bias"] for i in range(2)]
        copy("experts.gate_up_proj", np.stack(kernels, axis=-1).reshape(moe.experts, WIDTH, -1))
        copy("experts.gate_up_proj_bias", np.stack(biases, axis=-1).reshape(moe.experts, -1))
        copy("experts.down_proj", experts["output"]["kernel"])
        copy("experts.down_proj_bias", experts["output"]["bias"])
    else:
        copy("experts.gate_up_proj", np.concatenate(kernels, axis=-1).swapaxes(1, 2))
        copy("experts.down_proj", experts["output"]["kernel"].swapaxes(1, 2))
    if moe.correction_bias:
        copy(f"{router}.e_score_correction_bias", params["router_bias"])
    if moe.shared_d_ff:
        shared = "shared_expert" if name == "qwen2_moe" else "shared_experts"
        for ours, theirs in (("inputs_0", "gate"), ("inputs_1", "up"), ("output", "down")):
            copy(f"{shared}.{theirs}_proj.weight", params["shared"][ours]["kernel"].T)
    if moe.shared_gate:
        copy("shared_expert_gate.weight", params["shared_gate"]["kernel"].T)
    block.load_state_dict(state)
    with torch.no_grad():
        out = block.eval()(torch.from_numpy(x))
    return (out[0] if isinstance(out, tuple) else out).numpy()


def _block(name: str, moe: MoE):
    import importlib

    def part(module: str, attribute: str):
        return getattr(importlib.import_module(f"transformers.models.{name}.{module}_{name}"), attribute)

    common = {
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "num_experts_per_tok": moe.per_token,
        "hidden_act": "silu",
    }
    fine = {"num_experts": moe.experts, "moe_intermediate_size": moe.d_ff, "norm_topk_prob": moe.normalize}
    deepseek = {
        "n_routed_experts": moe.experts,
        "moe_intermediate_size": moe.d_ff,
        "n_shared_experts": moe.shared_d_ff // moe.d_ff,
        "n_group": moe.groups,
        "topk_group": moe.groups_per_token,
        "routed_scaling_factor": moe.scale,
        "norm_topk_prob": moe.normalize,
    }
    config, block, fields = {
        "switch_transformers": (
            "SwitchTransformersConfig",
            "SwitchTransformersSparseMLP",
            {"d_model": WIDTH, "d_ff": moe.d_ff, "num_experts": moe.experts, "expert_capacity": moe.capacity},
        ),
        "mixtral": (
            "MixtralConfig",
            "MixtralSparseMoeBlock",
            common | {"num_local_experts": moe.experts, "intermediate_size": moe.d_ff},
        ),
        "qwen2_moe": (
            "Qwen2MoeConfig",
            "Qwen2MoeSparseMoeBlock",
            common | fine | {"shared_expert_intermediate_size": moe.shared_d_ff},
        ),
        "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", common | fine),
        "deepseek_v2": (
            "DeepseekV2Config",
            "DeepseekV2Moe",
            common | deepseek | {"topk_method": "group_limited_greedy"},
        ),
        "deepseek_v3": ("DeepseekV3Config", "DeepseekV3MoE", common | deepseek),
        "gpt_oss": (
            "GptOssConfig",
            "GptOssMLP",
            common
            | {
                "num_local_experts": moe.experts,
                "intermediate_size": moe.d_ff,
                "swiglu_limit": FAMILIES[name][2],
            },
        ),
    }[name]
    settings = part("configuration", config)(**fields)
    settings._experts_implementation = "eager"
    return part("modeling", block)(settings)


def main() -> None:
    """Writes the golden outputs."""
    golden = {}
    for name, (moe, activations, _) in FAMILIES.items():
        golden[name] = transformers_output(name, inputs(), weights(moe, activations)).round(6).tolist()
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
