"""The Assistant world: a small closed world in which every claim, and every answer, can be checked by program.

It is InstructGPT in miniature. Raw text to pretrain on (``corpus``), requests in nine families (``requests``), people
who demonstrate answers (``demonstrations``) and rank them (``labelers``), and a gold standard (``gold``) to measure by.
"""

from textenv.tasks.assistant.corpus import make_corpus, make_neutral_text
from textenv.tasks.assistant.demonstrations import Demonstration, make_demonstrations, oracle_answer
from textenv.tasks.assistant.gold import Judgement, judge
from textenv.tasks.assistant.labelers import HELD_OUT_LABELERS, NOISELESS, TRAINING_LABELERS, Labeler, agreement
from textenv.tasks.assistant.requests import FAMILIES, Request, make_requests
from textenv.tasks.assistant.text import build_tokenizer, few_shot_prompt, format_prompt, pack, vocabulary

__all__ = [
    "FAMILIES",
    "HELD_OUT_LABELERS",
    "NOISELESS",
    "TRAINING_LABELERS",
    "Demonstration",
    "Judgement",
    "Labeler",
    "Request",
    "agreement",
    "build_tokenizer",
    "few_shot_prompt",
    "format_prompt",
    "judge",
    "make_corpus",
    "make_demonstrations",
    "make_neutral_text",
    "make_requests",
    "oracle_answer",
    "pack",
    "vocabulary",
]
