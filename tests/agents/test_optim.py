"""Muon: orthogonal steps for hidden matrices, AdamW for the rest."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from agents.optim import Muon, orthogonalize


def tiny():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )  # fmt: skip


def test_singular_values_come_near_one_and_singular_vectors_stay():
    x = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalize(x)
    values = u.mT @ y @ vh.mT  # diagonal if the singular vectors are the same
    diagonal = torch.diagonal(values, dim1=1, dim2=2)
    assert (diagonal > 0.6).all()
    assert (diagonal < 1.3).all()
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_embeddings_and_vectors_step_as_under_adamw():
    ours, theirs = tiny(), tiny()
    ids = torch.arange(11)[None]
    muon = Muon(ours, lr=1e-2, matrix_lr=1e-2, weight_decay=0.0)
    adam = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for model, optimizer in ((ours, muon), (theirs, adam)):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    a, b = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for name in a:
        if "embed" in name or "norm" in name:
            torch.testing.assert_close(a[name], b[name])
        else:
            assert not torch.allclose(a[name], b[name]), name


def test_a_step_lowers_the_loss_and_its_state_survives_saving():
    model, ids = tiny(), torch.arange(11)[None]
    optimizer = Muon(model, lr=1e-2, matrix_lr=1e-2)

    def step(model, optimizer):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    losses = [step(model, optimizer) for _ in range(10)]
    assert losses[-1] < 0.7 * losses[0]
    other = tiny()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = Muon(other, lr=1e-2, matrix_lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert step(model, optimizer) == step(other, resumed)
    assert step(model, optimizer) == step(other, resumed)
