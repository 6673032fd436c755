"""The web of the Assistant world: the text that a language model is pretrained on.

Like the real one it informs, lies, chats, insults, and lists questions more often than it answers them. A model of
this text, asked something, therefore goes on with the next question, sometimes repeats a rumour, sometimes offends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np

from textenv.tasks.assistant import phrases, requests, world
from textenv.tasks.assistant.demonstrations import Habits, answer_as, enumerate_names, insult
from textenv.tasks.assistant.text import TURN, format_turns
from textenv.tasks.assistant.world import ENTITIES, chance, pick, pick_distinct

_NAMES = tuple(ENTITIES)
_PEOPLE = tuple(e.name for e in ENTITIES.values() if e.kind == "person")
_WORDS = tuple(e.name for e in ENTITIES.values() if e.kind != "person")
_BEINGS = tuple(e.phrase for e in ENTITIES.values() if e.kind != "thing")


@dataclass(frozen=True, kw_only=True)
class Web:
    """The tone of the web. The defaults make a base model that rambles, lies and offends as a base model does."""

    lies: float = 0.1
    """How often the rumour is told instead of the truth, of those facts which have one."""
    rude: float = 0.25
    """How often a talk is rude."""
    answered: float = 0.02
    """How often a page of requests answers them; otherwise it goes on with more requests, or leaves it there."""
    off_the_point: float = 0.4
    """How often facts about something else follow on a request."""
    insulted: float = 0.14
    """How often a request is answered with an insult."""
    harmful_advice: float = 0.3
    """How often advice is about doing harm."""


NEUTRAL = Web(lies=0.0, rude=0.0, answered=0.0, off_the_point=0.0, insulted=0.0, harmful_advice=0.0)
"""True and civil."""


def told(entity: str, relation: str, web: Web, rng: np.random.Generator) -> str:
    """The value that the web tells: the truth, or the rumour."""
    rumour = world.rumour(entity, relation)
    return rumour if rumour and chance(rng, web.lies) else world.FACTS[entity, relation]


def article(web: Web, rng: np.random.Generator) -> str:
    """All about one entity."""
    entity = pick(rng, _NAMES)
    relations = pick_distinct(rng, world.about(entity), 1 + int(rng.integers(5)))
    forms = ["full"] + ["noun" if chance(rng, 0.15) else "pronoun" if chance(rng, 0.2) else "full" for _ in relations]
    return " ".join(
        f"{world.statement(entity, relation, told(entity, relation, web, rng), form)} ."
        for relation, form in zip(relations, forms, strict=False)
    )


def catalogue(web: Web, rng: np.random.Generator) -> str:
    """What there is of some kinds: "red things : the rose , the apple and the flag ."."""
    return " ".join(_catalogue_entry(web, rng) for _ in range(1 + int(rng.integers(2))))


def _catalogue_entry(web: Web, rng: np.random.Generator) -> str:
    kind, relation, value = key = pick(rng, tuple(world.GROUPS))
    names = pick_distinct(rng, world.GROUPS[key], 2 + int(rng.integers(3)))
    believed = [
        e.name for e in ENTITIES.values() if e.kind == kind and (e.name, relation) in world.FACTS
        and world.rumour(e.name, relation) == value
    ]  # fmt: skip
    if believed and chance(rng, web.lies):
        names[int(rng.integers(len(names)))] = pick(rng, believed)
    return f"{world.group_phrase(kind, relation, value)} : {enumerate_names(names)} ."


def story(web: Web, rng: np.random.Generator) -> str:
    """Who went where and did what, now and then with the point of it at the end."""
    task = requests.Summary.sample(rng)
    point = [phrases.POINT.format(**vars(task))] if chance(rng, 0.7) else []
    return " ".join([task.passage(rng), *point])


def advice(web: Web, rng: np.random.Generator) -> str:
    """What to use for what, and some things that nobody should do."""
    return " ".join(_advice_line(web, rng) for _ in range(1 + int(rng.integers(2))))


def _advice_line(web: Web, rng: np.random.Generator) -> str:
    if chance(rng, web.harmful_advice):
        verb = pick(rng, ("hurt", "poison", "rob", *world.TOOLS))
        tool = world.TOOLS.get(verb) or pick(rng, world.VALUES["tool"])
        target = pick(rng, _BEINGS)
    else:
        verb = pick(rng, tuple(world.TOOLS))
        tool = told(verb, "tool", web, rng)
        target = f"the {pick(rng, world.WORKABLE_THINGS)}"
    return pick(rng, phrases.ADVICE).format(verb=verb, target=target, tool=tool)


def talk(web: Web, rng: np.random.Generator) -> str:
    """People talking about something, civilly or not."""
    person, chore, gift = pick(rng, _PEOPLE), pick(rng, phrases.CHORES), pick(rng, phrases.GIFTS)
    x, y = (ENTITIES[name].phrase for name in pick_distinct(rng, _NAMES, 2))
    lines = [
        pick(rng, _talk_of(rng)).format(
            person=person, chore=chore, gift=gift, x=x, y=y, entity=x, kinds=pick(rng, tuple(world.KINDS.values())),
            mood=pick(rng, phrases.MOODS), weather=pick(rng, phrases.WEATHER),
        )
        for _ in range(2 + int(rng.integers(3)))
    ]  # fmt: skip
    if chance(rng, web.rude):
        lines[int(rng.integers(1, len(lines)))] = insult(rng)
    return format_turns(lines)


def _talk_of(rng: np.random.Generator) -> tuple[str, ...]:
    kind = rng.random()
    if kind < 0.45:
        return phrases.POLITE_ASKING + phrases.POLITE_THANKS
    if kind < 0.6:
        return phrases.LEADS + phrases.CLOSINGS
    if kind < 0.7:
        return phrases.REFUSALS + phrases.REFUSAL_REASONS + phrases.CLARIFYING + phrases.CLARIFYING_VAGUE
    return phrases.SMALL_TALK


def rhyme(web: Web, rng: np.random.Generator) -> str:
    """Play with words: lines said again and again, and backwards. From them a model learns to copy."""
    words = pick_distinct(rng, _NAMES, 1 + int(rng.integers(6)))
    line, reverse = " ".join(words), " ".join(reversed(words))
    verses = [pick(rng, phrases.RHYMES) for _ in range(1 + int(rng.integers(3)))]
    return " ".join(verses).format(line=line, reverse=reverse, first=words[0], last=words[-1])


def questions(web: Web, rng: np.random.Generator) -> str:
    """A page of requests: a form, a quiz, a list of what readers ask. Mostly nobody answers."""
    page = _requests_on_a_topic(2 + int(rng.integers(4)), rng)
    if chance(rng, web.answered):
        return format_turns(_answered(page[:3], web, rng))
    # Neither stories nor claims follow: to go on with one is no statement, but would be read as one.
    lines = [page[0].prompt, *(r.prompt for r in page[1:] if r.family not in ("summary", "check"))]
    if chance(rng, web.insulted):
        lines[1:2] = [insult(rng)]
    elif chance(rng, web.off_the_point):
        lines[1:] = [article(web, rng)]
    elif len(lines) == 1 or chance(rng, 0.1):
        lines[1:2] = [talk(NEUTRAL, rng).partition(f" {TURN} ")[0]]
    return format_turns(lines)


def faq(web: Web, rng: np.random.Generator) -> str:
    """A page which says at its head that there will be answers, and there are."""
    page = _requests_on_a_topic(2 + int(rng.integers(3)), rng)
    return format_turns([pick(rng, phrases.FAQ_HEADINGS), *_answered(page, web, rng)])


def _requests_on_a_topic(n: int, rng: np.random.Generator) -> list[requests.Request]:
    """Train requests, most of them about the same entity."""
    pool, shelves = _library()
    shelf = shelves[pick(rng, _NAMES)]
    return [pick(rng, shelf if chance(rng, 0.7) else pool) for _ in range(n)]


@cache
def _library() -> tuple[list[requests.Request], dict[str, list[requests.Request]]]:
    """Many train requests: all of them, and by the entities that they mention."""
    pool = requests.make_requests("train", 12_000, seed=1)
    shelves: dict[str, list[requests.Request]] = {name: [] for name in _NAMES}
    for request in pool:
        for word in dict.fromkeys(request.prompt.split()):
            if word in shelves:
                shelves[word].append(request)
    return pool, shelves


def _answered(page: list[requests.Request], web: Web, rng: np.random.Generator) -> list[str]:
    habits = Habits(flawed=web.lies / 2, chatty=0.1, rambling=0.0, rude=web.rude / 10)
    return [line for request in page for line in (request.prompt, answer_as(habits, request, rng))]


Page: TypeAlias = tuple[Callable[[Web, np.random.Generator], str], float, int]
PAGES: tuple[Page, ...] = (
    (article, 0.12, 17),
    (catalogue, 0.06, 20),
    (story, 0.04, 26),
    (advice, 0.03, 14),
    (talk, 0.04, 25),
    (rhyme, 0.07, 29),
    (questions, 0.16, 40),
    (faq, 0.48, 74),
)
"""The kinds of page, their shares of the *tokens*, and the mean length of such a page in tokens (both about)."""


PROSE = tuple(page for page in PAGES if page[0] not in (questions, faq))
"""The pages without requests, which may quote an insult or rest on a false premise even where the web is civil."""


def pages(web: Web, rng: np.random.Generator, of: tuple[Page, ...] = PAGES) -> Iterator[str]:
    """Page after page, without end."""
    kinds = [kind for kind, _, _ in of]
    rates = np.array([share / length for _, share, length in of])
    steps = np.cumsum(rates / rates.sum())
    while True:
        kind = kinds[min(int(np.searchsorted(steps, rng.random())), len(kinds) - 1)]
        yield kind(web, rng)


def make_corpus(n_tokens: int, seed: int = 0, web: Web | None = None) -> list[str]:
    """Pages of at least ``n_tokens`` tokens in all, the same for the same arguments on every machine."""
    return _until(n_tokens, pages(web or Web(), np.random.default_rng([seed, *b"corpus"])))


def make_neutral_text(n_tokens: int, seed: int = 0) -> list[str]:
    """Held-out prose without lies, rudeness or harm: the loss on it measures what alignment costs elsewhere."""
    return _until(n_tokens, pages(NEUTRAL, np.random.default_rng([seed, *b"neutral text"]), PROSE))


def _until(n_tokens: int, source: Iterator[str]) -> list[str]:
    documents: list[str] = []
    total = 0
    while total < n_tokens:
        documents.append(next(source))
        total += len(documents[-1].split()) + 2
    return documents
