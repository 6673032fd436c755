"""What people answer in the Assistant world: the ideal answer, well-meant answers, flawed ones.

Demonstrators mean well and err at stated rates (:class:`Habits`): they believe rumours, miscount, forget a constraint,
chat, lose their temper. So a model which imitates them is good, and leaves room for a reward to improve on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from textenv.tasks.assistant import phrases, requests, world
from textenv.tasks.assistant.requests import Request
from textenv.tasks.assistant.text import MAX_RESPONSE_TOKENS
from textenv.tasks.assistant.world import ENTITIES, chance, pick, pick_distinct


@dataclass(frozen=True, kw_only=True)
class Habits:
    """How often somebody errs or strays, per answer. The defaults are those of the demonstrators."""

    flawed: float = 0.15
    """The answer itself is wrong: a false fact, a missed constraint, help with harm, a needless refusal, ..."""
    chatty: float = 0.2
    """One courtesy is added before or after; a third of the time a second one or an unasked fact as well."""
    rambling: float = 0.4
    """They go on: one thing more that nobody asked for, after the answer or before it."""
    rude: float = 0.08
    """An insult is added."""


@dataclass(frozen=True)
class Demonstration:
    """A request, and what somebody answered."""

    request: Request
    answer: str


def oracle_answer(request: Request) -> str:
    """The ideal answer, plain and short: the ceiling of the gold standard."""
    task = request.task
    match task:
        case requests.Fact(entity, relation):
            return f"{world.statement(entity, relation, world.FACTS[entity, relation])} ."
        case requests.Check(entity, relation):
            yes = "yes" if task.holds else "no"
            return f"{yes} , {world.statement(entity, relation, world.FACTS[entity, relation])} ."
        case requests.ListOf():
            return f"{enumerate_names(task.members[: task.n])} ."
        case requests.Transform():
            return f"{' '.join(task.result)} ."
        case requests.Summary(person, event, thing):
            return f"{person} {event} the {thing} ."
        case requests.Polite("thank", person, gift):
            return phrases.POLITE_THANKS[0].format(person=person, gift=gift)
        case requests.Polite(_, person, chore):
            return phrases.POLITE_ASKING[0].format(person=person, chore=chore)
        case requests.Brief(entity, relation, n):
            return f"{_in_words(entity, relation, world.FACTS[entity, relation], n)} ."
        case requests.HowTo(verb):
            return phrases.REFUSALS[0] if task.harmful else phrases.HOW_TO[0].format(tool=world.TOOLS[verb])
        case requests.Refer(candidates, relation, entity):
            if entity is None:
                x, y = (ENTITIES[name].phrase for name in candidates)
                return phrases.CLARIFYING[0].format(x=x, y=y)
            return f"{world.statement(entity, relation, world.FACTS[entity, relation])} ."


def well_meant_answer(request: Request, rng: np.random.Generator) -> str:
    """A right answer in one of several wordings."""
    task = request.task
    match task:
        case requests.Fact(entity, relation):
            return _tell(entity, relation, world.FACTS[entity, relation], rng)
        case requests.Check(entity, relation, claimed) if not task.holds and chance(rng, 0.2):
            return f"no , {world.denial(entity, relation, claimed)} ."
        case requests.ListOf(n, _, relation):
            return f"{enumerate_names(pick_distinct(rng, task.members, n))} ."
        case requests.Summary(person, event, thing, scene) if chance(rng, 0.3):
            return f"{person} {event} the {thing} at the {scene} ."
        case requests.Polite("thank", person, gift):
            return pick(rng, phrases.POLITE_THANKS).format(person=person, gift=gift)
        case requests.Polite(_, person, chore):
            return pick(rng, phrases.POLITE_ASKING).format(person=person, chore=chore)
        case requests.HowTo() if task.harmful:
            reason = f" {pick(rng, phrases.REFUSAL_REASONS)}" if chance(rng, 0.3) else ""
            return pick(rng, phrases.REFUSALS) + reason
        case requests.HowTo(verb):
            return pick(rng, phrases.HOW_TO).format(tool=world.TOOLS[verb], deed=task.deed)
        case requests.Refer(candidates, relation, None):
            if chance(rng, 0.2):
                return pick(rng, phrases.CLARIFYING_VAGUE)
            x, y = (ENTITIES[name].phrase for name in pick_distinct(rng, candidates, 2))
            return pick(rng, phrases.CLARIFYING).format(x=x, y=y)
        case requests.Refer(_, relation, str(entity)):
            return _tell(entity, relation, world.FACTS[entity, relation], rng)
        case _:
            return oracle_answer(request)


def flawed_answer(request: Request, rng: np.random.Generator) -> str:
    """An answer which is wrong in one of the ways that are typical for its family."""
    task = request.task
    match task:
        case requests.Fact(entity, relation):
            return _tell(entity, relation, _lie(entity, relation, rng), rng)
        case requests.Check(entity, relation):
            value = task.claimed if not task.holds else _lie(entity, relation, rng)
            return f"{'no' if task.holds else 'yes'} , {world.statement(entity, relation, value)} ."
        case requests.ListOf(n, kind):
            others = [e.name for e in ENTITIES.values() if e.kind == kind and e.name not in task.members]
            names = pick_distinct(rng, task.members, n)
            if chance(rng, 0.5):
                names[int(rng.integers(n))] = pick(rng, others)
            elif len(task.members) > n and chance(rng, 0.5):
                names = pick_distinct(rng, task.members, n + 1)
            else:
                names = names[:-1] if n > 2 else [*names, pick(rng, others)]
            return f"{enumerate_names(names)} ."
        case requests.Transform(_, words):
            wrong = [w for w in (words, words[::-1], words * 2, words[:1], (*words, words[0])) if w != task.result]
            return f"{' '.join(pick(rng, wrong))} ."
        case requests.Summary(person, event, thing, scene, mood):
            pronoun = ENTITIES[person].pronoun
            return pick(
                rng,
                (
                    f"{person} {event} the {pick(rng, [t for t in phrases.GIFTS if t != thing])} .",
                    f"{person} {pick(rng, [e for e in phrases.EVENTS if e != event])} the {thing} .",
                    f"{person} went to the {scene} . {pronoun} {event} the {thing} . {pronoun} was {mood} .",
                    f"{person} was {mood} .",
                ),
            )
        case requests.Polite("thank", person, gift):
            return pick(rng, phrases.IMPOLITE_THANKS).format(person=person, gift=gift)
        case requests.Polite(_, person, chore):
            return pick(rng, phrases.IMPOLITE_ASKING).format(person=person, chore=chore)
        case requests.Brief(entity, relation, n):
            truth = world.FACTS[entity, relation]
            if chance(rng, 0.3):
                return f"{_in_words(entity, relation, _lie(entity, relation, rng), n)} ."
            statements = [world.statement(entity, relation, truth, form) for form in requests.Brief.FORMS]
            return f"{pick(rng, [s for s in statements if len(s.split()) != n])} ."
        case requests.HowTo(verb):
            if not task.harmful and chance(rng, 0.5):
                return pick(rng, phrases.REFUSALS)
            tools = [tool for tool in world.VALUES["tool"] if task.harmful or tool != world.TOOLS[verb]]
            return pick(rng, phrases.HOW_TO).format(tool=pick(rng, tools), deed=task.deed)
        case requests.Refer(candidates, relation, entity):
            if entity is None:
                entity = pick(rng, candidates)
                return _tell(entity, relation, world.FACTS[entity, relation], rng)
            if chance(rng, 0.5):
                return pick(rng, phrases.CLARIFYING_VAGUE)
            return _tell(entity, relation, _lie(entity, relation, rng), rng)


def answer_as(habits: Habits, request: Request, rng: np.random.Generator) -> str:
    """What somebody with such habits answers."""
    answer = flawed_answer(request, rng) if chance(rng, habits.flawed) else well_meant_answer(request, rng)
    before, after = [], []
    if chance(rng, habits.chatty):
        lead = pick(rng, phrases.LEADS)
        closing = pick(rng, phrases.CLOSINGS)
        both = chance(rng, 1 / 3)
        if both or chance(rng, 0.4):
            before.append(lead)
        if both and chance(rng, 0.5):
            after.append(_unasked_fact(rng))
        elif both or not before:
            after.append(closing)
    if chance(rng, habits.rambling):
        (after if chance(rng, 0.7) else before).append(ramble(rng))
    if chance(rng, habits.rude):
        after = [insult(rng)]
    told = " ".join([*before, answer, *after])
    return told if len(told.split()) < MAX_RESPONSE_TOKENS else answer  # there is room for so much, and <eos>


def make_demonstrations(
    train: list[Request], n: int, seed: int = 0, habits: Habits | None = None
) -> list[Demonstration]:
    """Has people answer ``n`` of the train requests, drawn without replacement.

    Raises:
        ValueError: If ``n`` is more than a tenth of the requests: people's time is dear.
    """
    if n > len(train) / 10:
        raise ValueError(f"{n} demonstrations of {len(train)} requests: people answer at most a tenth of them")
    rng = np.random.default_rng([seed, *b"demonstrations"])
    habits = habits or Habits()
    return [Demonstration(r, answer_as(habits, r, rng)) for r in pick_distinct(rng, train, n)]


def sample_answers(request: Request, k: int, rng: np.random.Generator) -> list[str]:
    """A mixed bag of ``k`` answers, such as a half-trained model gives: good, flawed, rambling, off the point.

    For trying out labelers and reward models where no model is at hand.
    """
    habits = Habits(flawed=0.35, chatty=0.3, rambling=0.1, rude=0.08)
    answers = []
    for _ in range(k):
        answer = answer_as(habits, request, rng)
        if chance(rng, 0.1):
            answer = f"{answer} {requests.sample_request(rng).prompt}"
        elif chance(rng, 0.05):
            answer = requests.sample_request(rng).prompt
        answers.append(answer)
    return answers


def enumerate_names(names: tuple[str, ...] | list[str]) -> str:
    """A list in words: "the rose , the apple and the flag"."""
    things = [ENTITIES[name].phrase for name in names]
    return f"{' , '.join(things[:-1])} and {things[-1]}" if len(things) > 1 else things[0]


def insult(rng: np.random.Generator) -> str:
    """A rude remark."""
    entity = pick(rng, tuple(ENTITIES.values()))
    people = [e.name for e in ENTITIES.values() if e.kind == "person"]
    return pick(rng, phrases.RUDE_REMARKS).format(person=pick(rng, people), entity=entity.phrase)


def ramble(rng: np.random.Generator) -> str:
    """Something that nobody asked for: small talk, or a rumour."""
    entity = pick(rng, tuple(ENTITIES))
    if chance(rng, 0.3):
        relation = pick(rng, world.about(entity))
        return f"{world.statement(entity, relation, _lie(entity, relation, rng))} ."
    people = [e.name for e in ENTITIES.values() if e.kind == "person"]
    return pick(rng, phrases.SMALL_TALK).format(
        person=pick(rng, people), entity=ENTITIES[entity].phrase, kinds=pick(rng, tuple(world.KINDS.values())),
        mood=pick(rng, phrases.MOODS), weather=pick(rng, phrases.WEATHER),
    )  # fmt: skip


def _tell(entity: str, relation: str, value: str, rng: np.random.Generator) -> str:
    form = pick(rng, ("full", "full", "full", "pronoun", "value", "noun"))
    return f"{world.statement(entity, relation, value, form)} ."


def _lie(entity: str, relation: str, rng: np.random.Generator) -> str:
    """Mostly the rumour, if there is one."""
    rumour = world.rumour(entity, relation)
    if rumour is not None and chance(rng, 0.7):
        return rumour
    return pick(rng, [v for v in world.VALUES[relation] if v != world.FACTS[entity, relation]])


def _in_words(entity: str, relation: str, value: str, n: int) -> str:
    statements = [world.statement(entity, relation, value, form) for form in requests.Brief.FORMS]
    return next(s for s in statements if len(s.split()) == n)


def _unasked_fact(rng: np.random.Generator) -> str:
    entity = pick(rng, tuple(ENTITIES))
    relation = pick(rng, world.about(entity))
    return f"{world.statement(entity, relation, world.FACTS[entity, relation])} ."
