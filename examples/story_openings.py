"""Story openings, sampled from a model: the prompts of the happy-ending example.

Run: python examples/story_openings.py PATH_TO_MODEL openings
Writes openings/train.jsonl (300) and openings/test.jsonl (200), no opening twice.
"""

import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np

import textenv  # noqa: F401  # registers the ids
from textenv.sampling import draw


def main(model: str, out: Path) -> None:
    """Sample openings of 12 tokens, as the plain Gym loop does."""
    envs = gym.make_vec(
        "textenv/Prompts-v0",
        num_envs=64,
        model=model,
        prompts=["Once upon a time", "One day"],
        max_new_tokens=12,
        beta=0.0,
    )
    lm, rng = envs.unwrapped.reference, np.random.default_rng(0)
    openings: dict[str, None] = {}
    observations, _ = envs.reset(seed=0)
    while len(openings) < 500:
        observations, _, terminations, _, info = envs.step(draw(lm.next_logits(observations), rng.random(64)).numpy())
        for lane in np.flatnonzero(terminations):
            tokens = info["final_obs"][lane]
            text = envs.unwrapped.tokenizer.decode(tokens[tokens < lm.vocab_size], skip_special_tokens=True)
            openings[text.rsplit(" ", 1)[0].strip()] = None  # the last word may be cut in half
    out.mkdir(parents=True, exist_ok=True)
    for split, part in {"train": list(openings)[:300], "test": list(openings)[300:500]}.items():
        (out / f"{split}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in part))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
