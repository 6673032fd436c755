"""Learned rewards: :class:`RewardModel`, and :class:`Classifier` for what others have trained for other ends.

A reward model is a ``transformers`` sequence classifier with one label.

The format is the one that TRL and OpenRLHF read and write: the trunk of a language model and a linear head without
bias (``score``) on its last hidden state. Two entries are added to ``config.json`` and ignored by other readers:

- ``reward_offset``: **subtracted** from the head's output, so that human demonstrations score 0 on average
  (Ouyang et al. 2022, section 3.5). It has no effect on rankings, and keeps rewards near the scale on which a
  penalty or a baseline of 0 makes sense.
- ``reward_append_eos``: whether plain texts are read with an EOS token at their end.

Where the score is read. ``transformers`` looks for the last token that differs from the pad token. That is the wrong
one in silence when the two happen to coincide (pad = EOS, a policy that produces pads). Here lengths are known, so
the score is read at the true last token, and padding is nobody's business but ours.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rewards.base import Completion, RewardError, completion_text, did_you_mean, shorten


class RewardModel:
    """A sequence classifier with one label, used as a reward.

    A plain text is read as prompt, completion, EOS: its tokens are those of the prompt, then those of the completion
    (encoded separately, as a policy sees them), then exactly one EOS unless ``append_eos`` is off. A conversation is
    read as the tokenizer's chat template writes it, and nothing is added.

    Args:
        model: A sequence classifier (``*ForSequenceClassification`` of a decoder) with ``num_labels=1``.
        tokenizer: Its tokenizer.
        max_tokens_per_batch: Tokens, padding included, in one forward pass at most; by default 1,024 on a CPU (small
            batches of like lengths waste little on padding) and 16,384 elsewhere. Scores do not depend on it (1e-5 in
            float32).

    Attributes:
        append_eos: Kept in the model's config. Unless the config says otherwise, on if there is an EOS token that
            differs from the pad token: where both are one, other readers see neither.

    Raises:
        RewardError: The model is no classifier of that kind.

    Example:
        >>> reward = RewardModel.from_pretrained("path/to/reward-model")
        >>> reward(prompts=["what color is the sky ?"], completions=["the sky is blue ."])
        [1.31]
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens_per_batch: int | None = None) -> None:
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        if labels != 1 or not hasattr(model, "score"):
            raise RewardError(
                f"{type(model).__name__} has num_labels={labels} and {'a' if hasattr(model, 'score') else 'no'} "
                "`score` head; expected a decoder's sequence classifier with num_labels=1. For a language model, "
                "use RewardModel.from_language_model(model, tokenizer) and train_reward_model(...); for any other "
                "classifier, Classifier(model, tokenizer, label)"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens_per_batch = max_tokens_per_batch
        # Some tokenizers end every text with an EOS of their own; between prompt and completion it has no place.
        self._closes_texts = self._tokens("a", add_special_tokens=True)[-1:] == [tokenizer.eos_token_id]
        self.offset = float(getattr(model.config, "reward_offset", 0.0))
        eos, pads = tokenizer.eos_token_id, (tokenizer.pad_token_id, model.config.get_text_config().pad_token_id)
        self.append_eos = bool(getattr(model.config, "reward_append_eos", eos is not None and eos not in pads))

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **kwargs: Any) -> RewardModel:
        """Load a reward model and its tokenizer.

        Args:
            name_or_path: A directory, or a name on the Hugging Face hub.
            **kwargs: To ``AutoModelForSequenceClassification.from_pretrained`` (``dtype``, ``revision``, ...).

        Returns:
            The reward model.

        Raises:
            RewardError: The checkpoint has no trained head, or not one label.
        """
        return cls(_load_classifier(name_or_path, **kwargs), AutoTokenizer.from_pretrained(name_or_path))

    @classmethod
    def from_language_model(cls, model: Any, tokenizer: Any = None, *, seed: int = 0) -> RewardModel:
        """Make an untrained reward model: a copy of the trunk, and a new head in place of the unembedding.

        The head's weights are drawn from N(0, 1 / (d + 1)), d the width (Ziegler et al. 2019,
        https://arxiv.org/abs/1909.08593, section 2.1): scores start with a standard deviation of about 1.

        Args:
            model: A causal language model, or a name or directory to load one from. Not changed.
            tokenizer: Its tokenizer; may be left out if ``model`` is a name or directory.
            seed: Of the head.

        Returns:
            The reward model.

        Raises:
            RewardError: No tokenizer.
        """
        if isinstance(model, (str, os.PathLike)):
            tokenizer = AutoTokenizer.from_pretrained(model) if tokenizer is None else tokenizer
            model = AutoModelForCausalLM.from_pretrained(model)
        if tokenizer is None:
            raise RewardError("from_language_model got a loaded model without a tokenizer; pass its tokenizer")
        config = copy.deepcopy(model.config)
        config.num_labels = 1
        if tokenizer.pad_token_id is not None:  # other readers find the last token by it
            config.get_text_config().pad_token_id = tokenizer.pad_token_id
        with torch.random.fork_rng(devices=[]):  # building a model draws weights; spare the caller's generator
            classifier = AutoModelForSequenceClassification.from_config(config, dtype=model.dtype)
        classifier.base_model.load_state_dict(model.base_model.state_dict())
        generator = torch.Generator().manual_seed(seed)
        head = torch.randn(classifier.score.weight.shape, generator=generator)
        with torch.no_grad():
            classifier.score.weight.copy_(head / (head.shape[-1] + 1) ** 0.5)
        return cls(classifier.to(model.device), tokenizer)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write model and tokenizer.

        Args:
            directory: Where to; readable by :meth:`from_pretrained` and by
                ``AutoModelForSequenceClassification.from_pretrained`` (which ignores the offset).
        """
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    @property
    def offset(self) -> float:
        """Subtracted from the head's output; the config's ``reward_offset``."""
        return float(self.model.config.reward_offset)

    @offset.setter
    def offset(self, value: float) -> None:
        self.model.config.reward_offset = float(value)

    @property
    def append_eos(self) -> bool:
        """Whether plain texts are read with an EOS at their end; the config's ``reward_append_eos``."""
        return bool(self.model.config.reward_append_eos)

    @append_eos.setter
    def append_eos(self, value: bool) -> None:
        self.model.config.reward_append_eos = bool(value)

    def __call__(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Score completions.

        Args:
            prompts: B texts or conversations.
            completions: B texts or messages.
            completion_ids: B lists of token ids; see :meth:`encode`.
            **columns: Ignored.

        Returns:
            B scores: the head's outputs minus the offset.
        """
        return self.score(self.encode(prompts, completions, completion_ids))

    def encode(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[list[int]]:
        """Turn prompts and completions into the token sequences that are scored.

        Args:
            prompts: B texts or conversations.
            completions: B texts or messages.
            completion_ids: B lists of token ids of the completions. They are used where this tokenizer decodes them
                to the completion: then they tell exactly what was produced, special tokens included. Where it does
                not (a policy with another tokenizer), the text is encoded instead. Conversations always are.

        Returns:
            B sequences.

        Raises:
            RewardError: A conversation without a chat template, or a sequence that is empty or too long.
        """
        ids = [None] * len(completions) if completion_ids is None else completion_ids
        sequences = [
            self._encode_text(prompt, completion, tokens)
            if isinstance(prompt, str) and isinstance(completion, str)
            else self._encode_conversation(prompt, completion)
            for prompt, completion, tokens in zip(prompts, completions, ids, strict=True)
        ]
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for sequence, completion in zip(sequences, completions, strict=True):
            if not sequence or (longest is not None and len(sequence) > longest):
                raise RewardError(
                    f"prompt and completion {str(completion)[:80]!r} make {len(sequence)} tokens; expected 1 to "
                    f"{longest}, the context of the reward model. Shorten the prompts or the completions"
                )
        return sequences

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Score token sequences as they are.

        Args:
            sequences: N non-empty lists of token ids.

        Returns:
            N scores: the head's outputs minus the offset.
        """
        with torch.no_grad():
            outputs = self.outputs(sequences).double() - self.offset
        return [float(value) for value in outputs.tolist()]

    def outputs(self, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
        """Compute the head's outputs at the last tokens, without the offset; differentiable.

        Dropout is off, in training too: the same text must have the same score each time it is read.

        Args:
            sequences: N non-empty lists of token ids.

        Returns:
            The outputs. Shape: (N,), float32.
        """
        self.model.eval()
        device = self.model.device
        sizes = [len(sequence) for sequence in sequences]
        order = sorted(range(len(sequences)), key=sizes.__getitem__)
        outputs = [torch.empty(0, device=device)]
        budget = self.max_tokens_per_batch or (1024 if device.type == "cpu" else 16384)
        for chunk in _chunks(order, sizes, budget):
            lengths = torch.tensor([len(sequences[index]) for index in chunk])
            ids = torch.zeros(len(chunk), int(lengths.max()), dtype=torch.long)
            for row, index in enumerate(chunk):
                ids[row, : len(sequences[index])] = torch.tensor(sequences[index])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            hidden = self.model.base_model(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            ).last_hidden_state
            last = hidden[torch.arange(len(chunk), device=device), lengths.to(device) - 1]
            outputs.append(self.model.score(last)[:, 0].float())
        # order[k] is the sequence behind output k; argsort inverts it
        return torch.cat(outputs)[torch.tensor(order, dtype=torch.long, device=device).argsort()]

    def _encode_text(self, prompt: str, completion: str, ids: Sequence[int] | None) -> list[int]:
        """Tokens of the prompt, of the completion, and one EOS (or none)."""
        head = self._tokens(prompt, add_special_tokens=True)
        if self._closes_texts:
            head.pop()
        if ids is not None and self._spells(ids, completion):
            tail = list(ids)
        else:
            tail = self._tokens(completion, add_special_tokens=False)
        eos = self.tokenizer.eos_token_id
        while tail and tail[-1] == eos:
            tail.pop()
        return [*head, *tail, *([eos] if self.append_eos else [])]

    def _spells(self, ids: Sequence[int], completion: str) -> bool:
        """Whether the ids are this tokenizer's, and those of the completion."""
        vocabulary = self.model.config.get_text_config().vocab_size
        return all(0 <= token < vocabulary for token in ids) and any(
            self.tokenizer.decode(list(ids), skip_special_tokens=skip).strip() == completion.strip()
            for skip in (True, False)  # completions may be written without or with their special tokens
        )

    def _tokens(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def _encode_conversation(self, prompt: Completion, completion: Completion) -> list[int]:
        messages = [
            *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt),
            *([{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion),
        ]
        if not getattr(self.tokenizer, "chat_template", None):
            raise RewardError(
                "the reward model's tokenizer has no chat template; expected one to read conversations with. Set "
                "`tokenizer.chat_template`, or give prompts as plain texts"
            )
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        return self._tokens(text, add_special_tokens=False)


READS, OUTPUTS = ("completion", "text", "pair"), ("logit", "probability")


class Classifier:
    """Any sequence classifier of ``transformers`` as a reward: what it thinks of one label.

    Encoders and decoders alike: sentiment, toxicity, entailment, or reward models with another head than
    :class:`RewardModel` expects.

    Args:
        model: A sequence classifier.
        tokenizer: Its tokenizer.
        label: The name or number of the label that is rewarded; may be left out if there is just one.
        output: ``"logit"``, or ``"probability"`` (softmax over the labels; sigmoid if there is one, or if the model says that
            several may apply).
        reads: ``"completion"`` alone, the ``"text"`` of prompt and completion as one, or both as the ``"pair"`` that the
            tokenizer makes of two texts.
        max_tokens_per_batch: Tokens, padding included, in one forward pass at most.

    Raises:
        RewardError: The model is no sequence classifier, or has no such label; or another ``output`` or ``reads``.

    Example:
        >>> kind = Classifier.from_pretrained("path/to/sentiment-model", label="positive", reads="text")
        >>> WeightedSum({"kind": (kind, 1.0), "brief": (LengthPenalty(target=32), 0.1)})
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        label: str | int | None = None,
        *,
        output: str = "logit",
        reads: str = "completion",
        max_tokens_per_batch: int = 4096,
    ) -> None:
        names = getattr(getattr(model, "config", None), "id2label", None)
        if not names or not type(model).__name__.endswith("ForSequenceClassification"):
            raise RewardError(
                f"Classifier got a {type(model).__name__}; expected a *ForSequenceClassification of transformers"
            )
        for name, value, known in (("output", output, OUTPUTS), ("reads", reads, READS)):
            if value not in known:
                raise RewardError(
                    f"Classifier got {name}={value!r}; expected one of {known}.{did_you_mean(str(value), known)}"
                )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.label = _label_number(label, {int(number): str(name) for number, name in names.items()})
        self.output, self.reads, self.max_tokens_per_batch = output, reads, max_tokens_per_batch

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], label: str | int | None = None, **kwargs: Any
    ) -> Classifier:
        """Load a classifier and its tokenizer.

        Args:
            name_or_path: A directory, or a name on the Hugging Face hub.
            label: See the class.
            **kwargs: ``output``, ``reads`` and ``max_tokens_per_batch`` go to the class, the rest to
                ``AutoModelForSequenceClassification.from_pretrained`` (``dtype``, ``revision``, ...).

        Returns:
            The classifier.

        Raises:
            RewardError: The checkpoint has no trained head, or as the class.
        """
        own = {name: kwargs.pop(name) for name in ("output", "reads", "max_tokens_per_batch") if name in kwargs}
        return cls(_load_classifier(name_or_path, **kwargs), AutoTokenizer.from_pretrained(name_or_path), label, **own)

    def __call__(
        self, completions: Sequence[Completion], prompts: Sequence[Completion] | None = None, **columns: Any
    ) -> list[float]:
        """Score completions.

        Args:
            completions: B texts or messages.
            prompts: B texts or conversations; not needed where it reads the completion alone.
            **columns: Ignored.

        Returns:
            B logits or probabilities of the label.

        Raises:
            RewardError: A text that is longer than the model can read, or prompts that are needed and missing.
        """
        texts = [completion_text(completion) for completion in completions]
        if self.reads == "completion":
            encoded = [self.tokenizer(text) for text in texts]
        elif prompts is None:
            raise RewardError(
                f"this classifier reads the {self.reads} of prompt and completion; expected prompts, got none"
            )
        else:
            heads = [completion_text(prompt) for prompt in prompts]
            pairs = zip(heads, texts, strict=True)
            encoded = [self.tokenizer(a, b) if self.reads == "pair" else self.tokenizer(a + b) for a, b in pairs]
        known = inspect.signature(self.model.forward).parameters  # some tokenizers give more than the model takes
        encoded = [{name: row for name, row in item.items() if name in known} for item in encoded]
        lengths = [len(item["input_ids"]) for item in encoded]
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or max(
            lengths, default=0
        )
        longest = min(longest, self.tokenizer.model_max_length)
        for text, length in zip(texts, lengths, strict=True):
            if not 0 < length <= longest:
                raise RewardError(
                    f"the classifier reads completion {shorten(text)!r} as {length} tokens; expected 1 to {longest}. Shorten "
                    "the completions, or the prompts if it reads those"
                )
        values = [0.0] * len(texts)
        # Without a pad token nothing can be padded: one at a time.
        budget = self.max_tokens_per_batch if self.tokenizer.pad_token_id is not None else 0
        for chunk in _chunks(sorted(range(len(texts)), key=lengths.__getitem__), lengths, budget):
            if len(chunk) == 1:
                batch = {name: torch.tensor([row]) for name, row in encoded[chunk[0]].items()}
            else:
                batch = dict(self.tokenizer.pad([encoded[index] for index in chunk], return_tensors="pt"))
            with torch.no_grad():
                logits = self.model(**{name: tensor.to(self.model.device) for name, tensor in batch.items()}).logits
            for index, value in zip(chunk, self._read(logits.double()).tolist(), strict=True):
                values[index] = value
        return values

    def _read(self, logits: torch.Tensor) -> torch.Tensor:
        """Shape: (B, labels) -> (B,)."""
        if self.output == "probability":
            several = self.model.config.problem_type == "multi_label_classification"
            logits = logits.sigmoid() if several or logits.shape[1] == 1 else logits.softmax(1)
        return logits[:, self.label]


def _label_number(label: str | int | None, names: dict[int, str]) -> int:
    if label is None and len(names) == 1:
        return 0
    if isinstance(label, int) and label in names:
        return label
    for number, name in names.items():
        if isinstance(label, str) and name.casefold() == label.casefold():
            return number
    hint = did_you_mean(label, names.values()) if isinstance(label, str) else ""
    raise RewardError(f"Classifier got label={label!r}; expected one of {list(names.values())}, or its number.{hint}")


def _load_classifier(name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a sequence classifier whose weights are all there."""
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name_or_path, output_loading_info=True, **kwargs
        )
    except OSError as error:
        raise RewardError(
            f"could not load a sequence classifier from {str(name_or_path)!r} ({str(error).splitlines()[0]}); expected a directory "
            "that save_pretrained has written, or a name that the hub knows. Remedy: check the name, your connection and HF_HUB_OFFLINE"
        ) from None
    if missing := sorted(loading["missing_keys"]):
        raise RewardError(
            f"{str(name_or_path)!r} lacks the weights {missing[:3]}, so its scores would be random; expected a "
            "trained sequence classifier. For a language model, use RewardModel.from_language_model(...) and "
            "train_reward_model(...)"
        )
    return model


def _chunks(order: Iterable[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Cut sequences sorted by length into batches of at most ``budget`` tokens with padding."""
    chunk: list[int] = []
    for index in order:
        if chunk and (len(chunk) + 1) * lengths[index] > budget:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk
