"""What all tests share: one thread, no network, and models small enough to be built on the spot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from .tiny import ARCHITECTURES, char_tokenizer, tiny_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token per character."""
    return char_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> Any:
    """The same, with a chat template."""
    return char_tokenizer(chat=True)


@pytest.fixture(scope="session")
def model() -> Any:
    """A frozen tiny GPT-2, shared: copy it before writing weights."""
    return tiny_model("gpt2").requires_grad_(False)


@pytest.fixture(scope="session")
def other_model() -> Any:
    """The same architecture with other weights: a policy that has moved away from `model`. Frozen and shared."""
    return tiny_model("gpt2", seed=1).requires_grad_(False)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """The name of each architecture in turn, for `tests.tiny.tiny_model`."""
    return str(request.param)


@pytest.fixture
def windowed_mistral() -> Any:
    """A Mistral whose attention reaches back four tokens only."""
    return tiny_model("mistral", sliding_window=4)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> Path:
    """`model` and `tokenizer`, as `save_pretrained` writes them."""
    path = tmp_path_factory.mktemp("tiny-gpt2")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def textenv_data() -> Path:
    """Real public data: the folder that the environment variable TEXTENV_DATA names."""
    folder = os.environ.get("TEXTENV_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TEXTENV_DATA does not name a folder of real data")
    return Path(folder)
