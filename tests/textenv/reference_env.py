"""The environment written again, as plainly as possible: no cache, no batch, nothing shared with the package."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch


def plain_log_prob(model: Any, tokens: list[int], action: int, temperature: float = 1.0) -> float:
    """log p(action | tokens), by one forward pass over the whole sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens), dtype=torch.long)).logits
    return torch.log_softmax(logits[0, -1].double() / temperature, dim=-1)[action].item()


class ReferenceEnv(gym.Env):
    """One episode at a time: prompt, tokens until the stop token or the budget, reward at the end, KL at each step."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: list[dict[str, Any]],
        reward: Any,
        max_new_tokens: int,
        beta: float = 0.0,
        policy: Any = None,
        temperature: float = 1.0,
    ) -> None:
        self.model, self.tokenizer, self.rows, self.reward = model, tokenizer, prompts, reward
        self.budget, self.beta, self.policy, self.temperature = max_new_tokens, beta, policy, temperature
        self.prompts = [tokenizer(row["prompt"])["input_ids"] for row in prompts]
        self.vocab = model.config.vocab_size
        self.length = max(len(p) for p in self.prompts) + max_new_tokens
        self.observation_space = gym.spaces.Box(0, self.vocab, (self.length,), np.int64)
        self.action_space = gym.spaces.Discrete(self.vocab)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.prompt_id = int(self.np_random.integers(len(self.prompts)))
        self.prompt, self.response, self.kl = self.prompts[self.prompt_id], [], 0.0
        return self.observation(), {"prompt_id": self.prompt_id}

    def observation(self) -> Any:
        tokens = self.prompt + self.response
        return np.array(tokens + [self.vocab] * (self.length - len(tokens)))

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        paid = 0.0
        if self.policy is not None:
            tokens = self.prompt + self.response
            log_ratio = plain_log_prob(self.policy, tokens, action, self.temperature)
            log_ratio -= plain_log_prob(self.model, tokens, action, self.temperature)
            self.kl += log_ratio
            paid = -self.beta * log_ratio
        self.response.append(int(action))
        stopped = action == self.tokenizer.eos_token_id
        if not stopped and len(self.response) < self.budget:
            return self.observation(), paid, False, False, {}
        row = self.rows[self.prompt_id]
        text = self.tokenizer.decode(self.response, skip_special_tokens=True)
        columns = {name: [value] for name, value in row.items() if name != "prompt"}
        (score,) = self.reward(prompts=[row["prompt"]], completions=[text], completion_ids=[self.response], **columns)
        info = {"finish_reason": "stop" if stopped else "length", "task_reward": score, "prompt_id": self.prompt_id}
        info |= {f"reward/{self.reward.__name__}": score} | ({"kl": self.kl} if self.policy is not None else {})
        return self.observation(), paid + score, True, False, info
