"""A tiny world: a dozen words, models of two layers built from configs, rewards that count words, and wrappers."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorWrapper

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "?"]
PROMPTS = ["a", "b c", "d e f", "g h"]


def word_tokenizer(words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<eos>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=words[-1]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token=words[-1])


def build_model(kind="llama", vocab_size=10, seed=0, width=16, layers=1, **kwargs):
    """Random weights, wide enough apart that some words are much likelier than others."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    common = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.3} | kwargs
    if kind == "gpt2":  # dropout 0.1, as in GPT-2: agents have to switch it off
        return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=2, n_positions=64, **common))
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, max_position_embeddings=64, **shape, **common))


def count_a(prompts, completions, **columns):
    """Words `a`, less a little for each other word: the reward depends on content and on length."""
    return [sum(1.0 if word == "a" else -0.1 for word in text.split()) for text in completions]


class PassThrough(VectorWrapper):
    """Changes nothing, which an agent cannot know: it has to take the step lane."""


class Truncate(VectorWrapper):
    """Cuts lanes after `limit` tokens, in the fashion of its environment: a `TimeLimit` for vector environments."""

    def __init__(self, env, limit):
        super().__init__(env)
        self.limit = limit
        self.same_step = env.metadata["autoreset_mode"] is gym.vector.AutoresetMode.SAME_STEP
        self.elapsed = np.zeros(env.num_envs, int)
        self.ended = self.cut = np.zeros(env.num_envs, bool)  # at the last step

    def reset(self, *, seed=None, options=None):
        self.elapsed[:] = 0
        self.ended = self.cut = np.zeros(self.num_envs, bool)
        return self.env.reset(seed=seed, options=options)

    def step(self, actions):
        observations, rewards, terminations, _, info = self.env.step(actions)
        if not self.same_step:  # lanes that were cut one step ago are reset by this one
            observations = self.restart(self.cut, observations, info)
            rewards[self.cut], terminations[self.cut] = 0.0, False
            self.elapsed = np.where(self.ended, 0, self.elapsed + 1)
        else:
            self.elapsed += 1
        self.cut = (self.elapsed >= self.limit) & ~terminations
        self.ended = self.cut | terminations
        if self.same_step:
            final_obs = info.get("final_obs", np.full(self.num_envs, None, object))
            for lane in np.flatnonzero(self.cut):
                final_obs[lane] = observations[lane].copy()
            info |= {"final_obs": final_obs, "_final_obs": self.ended.copy()}
            observations = self.restart(self.cut, observations, info)
            self.elapsed[self.ended] = 0
        return observations, rewards, terminations, self.cut.copy(), info

    def restart(self, lanes, observations, info):
        if not lanes.any():
            return observations
        observations, started = self.env.reset(options={"reset_mask": lanes})
        info["prompt_id"] = np.where(lanes, started["prompt_id"], info.get("prompt_id", -1))
        info["_prompt_id"] = info.get("_prompt_id", False) | lanes
        return observations


def plain_logits(model, tokens, prompt_length):
    """Logits at each response position by one plain forward pass. Shape: (n, V)."""
    ids = torch.from_numpy(np.asarray(tokens))[None]
    return model(input_ids=ids, use_cache=False).logits[0, prompt_length - 1 : -1]


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
