"""Writes golden_t5_span_corruption.npz from the `t5` package (0.9.4 was used; it needs TensorFlow).

    python tests/data/make_t5_golden.py

For many window lengths: the noise mask that t5 drew, and the inputs and targets t5 made of it, end of
sequence left out; and for many input lengths what t5's `random_spans_helper` says.
"""

import pathlib

import numpy as np
import seqio
import tensorflow as tf
from t5.data import preprocessors

VOCAB_SIZE = 32_100
CASES = [
    (length, density, mean)
    for length in (2, 3, 7, 20, 64, 113, 568)
    for density, mean in ((0.15, 3.0), (0.5, 3.0), (0.3, 8.0), (0.15, 1.0))
]
HELPER_CASES = [
    (length, density, mean)
    for length in (16, 31, 64, 100, 128, 256, 512, 777, 1024, 2048)
    for density, mean in ((0.15, 3.0), (0.5, 3.0), (0.5, 1.0), (0.15, 8.0), (0.3, 5.0))
]


def main() -> None:
    vocabulary = seqio.PassThroughVocabulary(size=VOCAB_SIZE)
    tokens = np.random.default_rng(0).integers(3, 32_000, 568).astype(np.int32)
    arrays: dict[str, np.ndarray] = {
        "tokens": tokens,
        "cases": np.array(CASES),
        "helper_cases": np.array(HELPER_CASES),
    }
    for number, (length, density, mean) in enumerate(CASES):
        seeds = tf.constant([[number, 1], [number, 2]], tf.int32)
        mask = preprocessors.random_spans_noise_mask(length, density, seeds, mean)
        window = tf.constant(tokens[:length])
        arrays[f"mask{number}"] = mask.numpy()
        for name, function in (
            ("inputs", preprocessors.noise_span_to_unique_sentinel),
            ("targets", preprocessors.nonnoise_span_to_unique_sentinel),
        ):
            arrays[f"{name}{number}"] = function(window, mask, vocabulary, seeds).numpy()
    arrays["helper"] = np.array(
        [
            preprocessors.random_spans_helper(int(length), density, mean, 1, 1)
            for length, density, mean in HELPER_CASES
        ]
    )
    np.savez_compressed(pathlib.Path(__file__).with_name("golden_t5_span_corruption.npz"), **arrays)


if __name__ == "__main__":
    main()
