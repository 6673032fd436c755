"""Adapters: a policy that trains a few weights beside a frozen base, and shares that base with the reference.

Needs `peft` (`pip install 'textenv[peft]'`). The reference stays the plain model that it is: only the policy's modules are wrapped.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from agents.checkpoints import CheckpointError, check_tensors, read_tensors


def adapted(model: PreTrainedModel, peft_config: Any) -> Any:
    """A `peft` model whose base has the weights of `model`: its modules are copied, its tensors are not.

    Args:
        model: Frozen, in float32. Nothing of it changes.
        peft_config: What and how to adapt: `peft.LoraConfig(...)`, or another that wraps layers.

    Returns:
        A `peft.PeftModel` that says what `model` says until it is trained.

    Raises:
        ValueError: It is no such configuration, or one that would write to the base; or the base is in half precision.
    """
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig) or peft_config.is_prompt_learning:
        raise ValueError(
            "Expected peft_config to be a configuration of peft that adapts layers, as LoraConfig(r=8, target_modules='all-linear'), "
            f"got {type(peft_config).__name__}."
        )
    if model.dtype != torch.float32:  # drawn (merged) and scored (beside) would be two roundings of one policy
        raise ValueError(
            f"Expected a reference in float32 for adapters, got {model.dtype}: load it with dtype=torch.float32. It is the only copy that "
            "there is; rollout_dtype='bfloat16' still draws from a rounded one."
        )
    bias, init = getattr(peft_config, "bias", "none"), getattr(peft_config, "init_lora_weights", True)
    if bias != "none" or init not in (True, "gaussian"):
        raise ValueError(
            "Expected bias='none' and init_lora_weights=True or 'gaussian', which leave the base as it is and begin as it, got "
            f"bias={bias!r} and init_lora_weights={init!r}: the base is the reference's, too."
        )
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that has a successor
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # which it sets right by itself, for GPT-2's layers
        torch.manual_seed(0)  # every run begins with the same weights, as it does without adapters
        return get_peft_model(copy.deepcopy(model, shared), copy.deepcopy(peft_config))


def save_merged(adapter: Any, folder: Path) -> None:
    """The whole model with its adapters added to its weights, in float32, as if it had never had any."""
    copy.deepcopy(adapter).float().merge_and_unload().save_pretrained(folder)


def save_adapter(adapter: Any, folder: Path) -> None:
    """The adapters alone, as `peft` reads them."""
    adapter.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub


def read_adapter_config(folder: Path) -> Any:
    """What `save_adapter` was given; None where nothing has been saved."""
    if not folder.is_dir():
        return None
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise CheckpointError(
            f"{folder} holds adapters, and peft, which reads them, is not installed: pip install 'textenv[peft]'. The whole model loads "
            f"without it from {folder.with_name('policy')}."
        ) from error
    if not (folder / "adapter_config.json").is_file():  # peft would ask the hub for it
        raise CheckpointError(f"{folder} holds no adapter_config.json: it is no whole checkpoint. Take another.")
    try:
        config = PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'} cannot be read ({error}). Take another checkpoint."
        ) from error
    config.inference_mode = False  # peft writes that what it saves has done its training
    return config


def load_adapter(adapter: Any, folder: Path) -> None:
    """Weights that `save_adapter` has written, into adapters of the same shapes.

    Raises:
        CheckpointError: They are missing, damaged or of other shapes.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    file = folder / "adapter_model.safetensors"
    tensors = read_tensors(file)
    check_tensors(tensors, get_peft_model_state_dict(adapter, save_embedding_layers=False), file)
    set_peft_model_state_dict(adapter, tensors)
