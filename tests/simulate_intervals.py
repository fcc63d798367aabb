"""How often stage 06's 95 percent interval excludes 0 although two models are equally good: in at most 5 percent?

    python tests/simulate_intervals.py 5    of five seeds, a minute on one core: 1.4 to 5.5 percent
    python tests/simulate_intervals.py 2    of two up to 11 percent where seeds differ (of three up to 8)

A model is right on an image with probability sigmoid(difficulty[image] + taste[model, image] + seed[model, seed]).
The terms are normal, with the same distribution for both models: over seeds and images the expected difference is 0.
"""

import sys

import numpy as np
from conftest import load_stage

NUM_IMAGES = (500, 2000, 10_000)
NUM_PAIRS = 2000  # of equal models, in each cell of the table
SETTINGS = {  # standard deviations of (difficulty, taste, seed)
    "noise alone": (0, 0, 0),
    "difficulty": (2, 0, 0),
    "tastes": (0, 1, 0),
    "seeds": (0, 0, 0.1),
    "difficulty, tastes": (2, 1, 0),
    "difficulty, weak tastes": (2, 0.5, 0),
    "difficulty, seeds": (2, 0, 0.1),
    "tastes, seeds": (0, 1, 0.1),
    "difficulty, tastes, seeds": (2, 1, 0.1),
    "difficulty, weak tastes, seeds": (2, 0.5, 0.1),
    "difficulty, tastes, strong seeds": (2, 1, 0.3),
}


def draw_difference(rng: np.random.Generator, deviations: tuple, seeds: int, images: int) -> np.ndarray:
    """Where one model alone is right: int8 (seeds, images) of -1, 0 and 1."""
    shapes = [(images,), (2, 1, images), (2, seeds, 1)]
    logits = sum(d * rng.standard_normal(shape, np.float32) for d, shape in zip(deviations, shapes, strict=True))
    right = rng.random((2, seeds, images), np.float32) < 1 / (1 + np.exp(-logits))
    return np.diff(right.astype(np.int8), axis=0)[0]


def main(seeds: int) -> None:
    half_interval = load_stage("06_eval_robustness").half_interval
    print(f"{'percent; images':34}" + "".join(f"{images:>8,}" for images in NUM_IMAGES))
    for number, (name, deviations) in enumerate(SETTINGS.items()):
        print(f"{name:34}", end="", flush=True)
        for images in NUM_IMAGES:
            rng = np.random.default_rng([number, images])
            differences = (draw_difference(rng, deviations, seeds, images) for _ in range(NUM_PAIRS))
            wrong = sum(abs(100 * d.mean()) > half_interval(d) for d in differences)
            print(f"{100 * wrong / NUM_PAIRS:8.1f}", end="", flush=True)
        print()


if __name__ == "__main__":
    main(int(sys.argv[1]))
