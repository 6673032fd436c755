import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rewards import Batch, Classifier, RewardError, RewardModel, WeightedSum, bind, check_reward

PROMPTS = ["what is blue ?", "sky ?", "what ?", "is sky blue ?"]
COMPLETIONS = ["sky .", "good sky is blue .", "", "bad dull bad dull bad dull bad dull ."]
EOS = 1


@pytest.fixture
def reward(language_model, tokenizer):
    return RewardModel.from_language_model(language_model, tokenizer)


def plain_scores(model, sequences):
    """What any reader of the format computes: one unpadded row at a time."""
    with torch.no_grad():
        return [model.eval()(torch.tensor([ids])).logits[0, 0].item() for ids in sequences]


def test_scores_are_those_of_plain_transformers_on_unpadded_rows(reward, tokenizer):
    sequences = [
        [*tokenizer(prompt)["input_ids"], *tokenizer(completion)["input_ids"], EOS]
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert reward.encode(PROMPTS, COMPLETIONS) == sequences
    scores = reward(prompts=PROMPTS, completions=COMPLETIONS)
    assert scores == pytest.approx(plain_scores(reward.model, sequences), abs=1e-5)
    assert len({round(score, 4) for score in scores}) == 4
    assert all(type(score) is float for score in scores)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_padding_side_batch_size_and_order_do_not_matter(reward, tokenizer, padding_side, budget):
    expected = [reward(prompts=[p], completions=[c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    other = copy.deepcopy(tokenizer)
    other.padding_side = padding_side
    model = RewardModel(reward.model, other, max_tokens_per_batch=budget)
    assert model(prompts=PROMPTS, completions=COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    backwards = model(prompts=PROMPTS[::-1], completions=COMPLETIONS[::-1])
    assert backwards[::-1] == pytest.approx(expected, abs=1e-5)


def test_the_score_is_read_at_the_last_token_even_where_that_looks_like_padding(reward, language_model, tokenizer):
    # A pad or an EOS that the policy produced is a token like any other to us. transformers' own pooling would
    # step back over it; alone and without a pad id it reads the true last token, as we do.
    sequences = [[3, 4, 5, 0, 0], [3, 4, 5], [0, 0], [6, EOS]]
    unpadded = copy.deepcopy(reward.model)
    unpadded.config.pad_token_id = None
    assert reward.score(sequences) == pytest.approx(plain_scores(unpadded, sequences), abs=1e-5)
    assert abs(reward.score(sequences)[0] - plain_scores(reward.model, sequences)[0]) > 1e-3  # theirs differs


def test_where_pad_is_eos_no_eos_is_read_so_that_all_readers_agree(language_model, tokenizer):
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    reward = RewardModel.from_language_model(language_model, same)
    assert not reward.append_eos
    sequences = reward.encode(PROMPTS, COMPLETIONS)
    assert not any(EOS in ids for ids in sequences)
    assert reward.score(sequences) == pytest.approx(plain_scores(reward.model, sequences), abs=1e-5)
    with_eos = [[*same(c)["input_ids"], EOS] for c in COMPLETIONS]
    assert reward(PROMPTS, COMPLETIONS, with_eos) == reward(PROMPTS, COMPLETIONS)


def test_dropout_is_off_even_if_someone_switches_it_on(reward):
    first = reward(prompts=PROMPTS, completions=COMPLETIONS)
    reward.model.train()
    assert reward(prompts=PROMPTS, completions=COMPLETIONS) == first


def test_the_offset_is_subtracted(reward):
    before = reward(prompts=PROMPTS, completions=COMPLETIONS)
    reward.offset = 2.5
    assert reward(prompts=PROMPTS, completions=COMPLETIONS) == pytest.approx([s - 2.5 for s in before], abs=1e-9)


def test_round_trip_and_other_readers(reward, tmp_path):
    reward.offset = 2.5
    reward.save_pretrained(tmp_path)
    again = RewardModel.from_pretrained(tmp_path)
    scores = reward(prompts=PROMPTS, completions=COMPLETIONS)
    assert again(prompts=PROMPTS, completions=COMPLETIONS) == pytest.approx(scores, abs=1e-5)
    assert again.offset == 2.5
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["reward_offset"] == 2.5
    assert config["reward_append_eos"] is True

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.num_labels == 1
    assert plain.score.bias is None
    sequences = reward.encode(PROMPTS, COMPLETIONS)
    raw = plain_scores(plain, sequences)
    assert [score - 2.5 for score in raw] == pytest.approx(scores, abs=1e-5)
    # TRL scores right-padded batches, with the pad id of the config
    padded = again.tokenizer.pad({"input_ids": sequences}, padding=True, return_tensors="pt")
    with torch.no_grad():
        batched = plain(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits[:, 0]
    assert batched.tolist() == pytest.approx(raw, abs=1e-5)


def test_from_language_model_copies_the_trunk_and_draws_the_head_as_ziegler(language_model, tokenizer):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    reward = RewardModel.from_language_model(language_model, tokenizer, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, weight in language_model.base_model.state_dict().items():
        copied = reward.model.base_model.state_dict()[name]
        assert torch.equal(copied, weight)
        assert copied.data_ptr() != weight.data_ptr()
    assert not hasattr(language_model.config, "reward_offset")
    heads = torch.cat(
        [RewardModel.from_language_model(language_model, tokenizer, seed=s).model.score.weight for s in range(40)]
    )
    # standard error of a standard deviation from 40 * 32 draws: 1 / sqrt(2 * 1280) = 2%
    assert heads.std().item() == pytest.approx(33**-0.5, rel=0.08)
    assert torch.equal(heads[1:2], reward.model.score.weight)


def test_from_a_directory(language_model, tokenizer, tmp_path):
    language_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = RewardModel.from_language_model(language_model, tokenizer)(PROMPTS, COMPLETIONS)
    assert RewardModel.from_language_model(tmp_path)(PROMPTS, COMPLETIONS) == expected
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), type(language_model))


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_without_a_head_is_refused(language_model, tokenizer, tmp_path):
    config = copy.deepcopy(language_model.config)
    config.num_labels = 1
    language_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"(?s)lacks the weights \['score.weight'\].*from_language_model"):
        RewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("load", [RewardModel.from_pretrained, Classifier.from_pretrained])
def test_a_checkpoint_that_does_not_exist_is_refused(load):
    with pytest.raises(RewardError, match=r"could not load a sequence classifier from '/nowhere'.*check the name"):
        load("/nowhere")


def test_what_is_no_classifier_is_refused(language_model, tokenizer):
    with pytest.raises(RewardError, match=r"no `score` head; .*from_language_model"):
        RewardModel(language_model, tokenizer)
    with pytest.raises(RewardError, match="pass its tokenizer"):
        RewardModel.from_language_model(language_model)
    config = copy.deepcopy(language_model.config)
    config.num_labels = 3
    with pytest.raises(RewardError, match="num_labels=3"):
        RewardModel(AutoModelForSequenceClassification.from_config(config), tokenizer)


# Token ids -------------------------------------------------------------------------------------------------------


def test_token_ids_give_the_score_of_their_text(reward, tokenizer):
    from_text = reward(PROMPTS, COMPLETIONS)
    ids = tokenizer(COMPLETIONS)["input_ids"]
    assert reward(PROMPTS, COMPLETIONS, ids) == from_text
    assert reward(PROMPTS, COMPLETIONS, [[*tokens, EOS] for tokens in ids]) == from_text


def test_token_ids_tell_what_the_text_hides(reward, tokenizer):
    # the policy produced a pad in the middle; the text does not show it, the reward model must see it
    tokens = [tokenizer.convert_tokens_to_ids("sky"), 0, tokenizer.convert_tokens_to_ids("."), EOS]
    (sequence,) = reward.encode(["sky ?"], ["sky ."], [tokens])
    assert sequence == [*tokenizer("sky ?")["input_ids"], *tokens]


def test_token_ids_of_another_tokenizer_are_not_used(reward):
    for strange in ([3, 3, 3], [10**6], [-1], []):
        assert reward(["sky ?"], ["good sky ."], [strange]) == reward(["sky ?"], ["good sky ."])


def test_completions_written_with_their_special_tokens(reward, tokenizer):
    ids = [*tokenizer("sky .")["input_ids"], EOS]
    assert reward(["sky ?"], ["sky . <eos>"], [ids]) == reward(["sky ?"], ["sky ."])


def test_too_long_or_empty(reward, tokenizer):
    with pytest.raises(RewardError, match=r"make 102 tokens; expected 1 to 64"):
        reward(["sky ?"], ["good " * 99])
    reward.append_eos = False
    with pytest.raises(RewardError, match=r"make 0 tokens"):
        reward([""], [""])


# Conversations ---------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{{ m['content'] }} <eos> {% endfor %}"


def test_conversations_go_through_the_chat_template(reward, tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = TEMPLATE
    model = RewardModel(reward.model, chat)
    prompt = [{"role": "user", "content": "sky ?"}]
    completion = [{"role": "assistant", "content": "blue ."}]
    expected = tokenizer("sky ? <eos> blue . <eos>")["input_ids"]
    assert model.encode([prompt], [completion], [[5]]) == [expected]
    assert model([prompt], [completion]) == pytest.approx(plain_scores(model.model, [expected]), abs=1e-5)
    with pytest.raises(RewardError, match="no chat template"):
        reward([prompt], [completion])


# As a reward -----------------------------------------------------------------------------------------------------


def test_plugs_in(reward, tokenizer):
    ids = tokenizer(COMPLETIONS)["input_ids"]
    bound = bind(WeightedSum({"model": (reward, 2.0)}), ["answer"])
    scores = bound(Batch(PROMPTS, COMPLETIONS, ids, {"answer": list("abcd")}))
    assert scores.total.tolist() == pytest.approx([2 * score for score in reward(PROMPTS, COMPLETIONS)])
    assert bind(reward, []).names == ("RewardModel",)
    copy.deepcopy(bound)


def test_passes_the_checker(reward):
    examples = [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert len(check_reward(reward, examples).scores) == 4


def test_scoring_leaves_training_possible(reward):
    reward(PROMPTS, COMPLETIONS)
    reward.outputs(reward.encode(PROMPTS, COMPLETIONS)).sum().backward()
    assert reward.model.score.weight.grad is not None


def test_an_eos_that_the_tokenizer_adds_does_not_come_between_prompt_and_completion(language_model, tokenizer):
    from tokenizers.processors import TemplateProcessing

    closing = copy.deepcopy(tokenizer)
    closing.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", EOS)]
    )
    assert closing("sky ?")["input_ids"][-1] == EOS
    expected = RewardModel.from_language_model(language_model, tokenizer).encode(PROMPTS, COMPLETIONS)
    assert RewardModel.from_language_model(language_model, closing).encode(PROMPTS, COMPLETIONS) == expected


# Classifiers that others have trained ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["bert", "llama"])
def classifier_dir(request, tokenizer, tmp_path_factory):
    """An encoder and a decoder with three labels, on disk."""
    from transformers import BertConfig, LlamaConfig

    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "id2label": {0: "bad", 1: "good", 2: "dull"},
    }
    torch.manual_seed(0)
    config = BertConfig(**sizes) if request.param == "bert" else LlamaConfig(**sizes)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def logits_one_by_one(path, tokenizer, texts):
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        return torch.stack([model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts])


def test_a_classifier_by_directory_is_what_transformers_computes_one_by_one(classifier_dir, tokenizer):
    texts = ["sky .", "good sky is blue .", "bad", "dull dull dull"]
    expected = logits_one_by_one(classifier_dir, tokenizer, texts)
    for label, number in (("good", 1), ("DULL", 2), (0, 0)):
        for budget in (1, 8, 4096):
            reward = Classifier.from_pretrained(classifier_dir, label, max_tokens_per_batch=budget)
            assert reward(completions=texts) == pytest.approx(expected[:, number].tolist(), abs=1e-5)
    probability = Classifier.from_pretrained(classifier_dir, "good", output="probability")
    assert probability(completions=texts) == pytest.approx(expected.softmax(1)[:, 1].tolist(), abs=1e-5)
    examples = [{"prompt": "what ?", "completion": text} for text in texts]
    assert check_reward(probability, examples).names == ("Classifier",)
    chat = [[{"role": "assistant", "content": text}] for text in texts]
    assert probability(completions=chat) == probability(completions=texts)


def test_what_a_classifier_reads(classifier_dir, tokenizer):
    prompts, texts = ["what is", "sky"], [" blue ?", " dull ."]
    expected = logits_one_by_one(classifier_dir, tokenizer, ["what is blue ?", "sky dull ."])[:, 1].tolist()
    reward = Classifier.from_pretrained(classifier_dir, "good", reads="text")
    assert reward(prompts=prompts, completions=texts) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(RewardError, match="expected prompts, got none"):
        reward(completions=texts)
    pair = Classifier.from_pretrained(classifier_dir, "good", reads="pair")
    assert len(pair(prompts=prompts, completions=texts)) == 2
    with pytest.raises(RewardError, match=r"as 17 tokens; expected 1 to 16"):
        reward(prompts=["sky " * 16], completions=["."])


def test_without_a_pad_token_texts_are_read_one_at_a_time(classifier_dir, tokenizer):
    texts = ["sky .", "good sky is blue ."]
    reward = Classifier.from_pretrained(classifier_dir, "good")
    expected = reward(completions=texts)
    reward.tokenizer.pad_token = None
    assert reward(completions=texts) == pytest.approx(expected, abs=1e-5)


def test_classifiers_refused(classifier_dir, language_model, tokenizer, tmp_path):
    for label, message in ((None, "expected one of"), ("god", "Did you mean `good`"), (7, "label=7; expected one of")):
        with pytest.raises(RewardError, match=message):
            Classifier.from_pretrained(classifier_dir, label)
    with pytest.raises(RewardError, match=r"output='logits'.*Did you mean `logit`"):
        Classifier.from_pretrained(classifier_dir, "good", output="logits")
    with pytest.raises(RewardError, match=r"expected a \*ForSequenceClassification"):
        Classifier(language_model, tokenizer)
    language_model.save_pretrained(tmp_path)
    with pytest.raises(RewardError, match=r"lacks the weights .*'score.weight'"):
        Classifier.from_pretrained(tmp_path, 0)


def test_a_reward_model_is_a_classifier_with_one_label(reward, tokenizer):
    classifier = Classifier(reward.model, tokenizer)
    reward.append_eos = False
    texts = ["good sky .", "sky"]
    expected = reward(prompts=["", ""], completions=texts)
    if (
        "GPT2" not in type(reward.model).__name__
    ):  # which adds an embedding for the token types that this tokenizer makes up
        assert classifier(completions=texts) == pytest.approx(expected, abs=1e-5)
    probability = Classifier(reward.model, tokenizer, output="probability")(completions=texts)
    assert probability == pytest.approx(torch.tensor(classifier(completions=texts)).sigmoid().tolist(), abs=1e-5)
