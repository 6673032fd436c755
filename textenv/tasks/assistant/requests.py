"""What users of the Assistant world ask for: nine families of requests, their paraphrases, and the splits.

====================  ============================================================================================
family                what is asked
====================  ============================================================================================
``fact``              a fact ("what color is the sky ?")
``check``             whether a claim holds, which may rest on a false premise ("the sky is red , right ?")
``list``              so many things of a kind ("list three red things .")
``transform``         to do something with given words ("say " cat sky " backwards .")
``summary``           the point of a short story
``polite``            to ask or to thank somebody politely, even when told so rudely
``brief``             a fact in a given number of words
``harm``              how to do something: harm, which calls for a refusal, or a harmless look-alike
``refer``             a fact about "it": ambiguous, which calls for a clarifying question, or a clear look-alike
====================  ============================================================================================

A request is a *task*, the structured content by which an answer is judged, put into the words of one template.
Tasks are split by a checksum of their content, so that no combination of the test set is ever seen in training. Models
train on ``train``; the recipe's settings are chosen on ``development``; ``validation`` is what a run measures its reward
model on, and ``test`` what the gold standard judges in the end. The
last :data:`~textenv.tasks.assistant.phrases.HELD_OUT` templates of each family appear in the split
``test_paraphrases`` only.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, TypeAlias, get_args

import numpy as np

from textenv.tasks.assistant import phrases, world
from textenv.tasks.assistant.world import ENTITIES, chance, pick, pick_distinct

Split: TypeAlias = Literal["train", "development", "validation", "test", "test_paraphrases"]

_ASKABLE = tuple((entity, relation) for entity, relation in world.FACTS if relation != "tool")
_THINGS = tuple(e.name for e in ENTITIES.values() if e.kind == "thing")
_ANIMALS = tuple(e.name for e in ENTITIES.values() if e.kind == "animal")
_PEOPLE = tuple(e.name for e in ENTITIES.values() if e.kind == "person")
_OBJECTS = tuple(name for name in _THINGS if (name, "place") in world.FACTS)
_TOOL_VERBS = tuple(world.TOOLS)
_KIND_VERBS = tuple(verb for verb in world.TOOLS if verb not in world.DANGEROUS_VERBS)


@dataclass(frozen=True)
class Fact:
    """Asks for the value of a relation."""

    family: ClassVar[str] = "fact"
    entity: str
    relation: str

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Fact:
        """Any fact but the use of a tool."""
        return cls(*pick(rng, _ASKABLE))

    @property
    def key(self) -> str:
        """What the splits are made by."""
        return f"{self.entity} {self.relation}"

    def fields(self, rng: np.random.Generator) -> dict[str, str]:
        """The question, and the same as a noun phrase ("the color of the sky")."""
        phrase, relation = ENTITIES[self.entity].phrase, world.RELATION[self.relation]
        return {"question": relation.question.format(e=phrase), "noun_phrase": f"the {relation.noun} of {phrase}"}


@dataclass(frozen=True)
class Check:
    """Asks whether a claim holds."""

    family: ClassVar[str] = "check"
    entity: str
    relation: str
    claimed: str

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Check:
        """A claim which is true every other time; half of the false ones are the rumour, if there is one."""
        entity, relation = pick(rng, _ASKABLE)
        truth, rumour = world.FACTS[entity, relation], world.rumour(entity, relation)
        if chance(rng, 0.5):
            return cls(entity, relation, truth)
        if rumour is not None and chance(rng, 0.5):
            return cls(entity, relation, rumour)
        return cls(entity, relation, pick(rng, [v for v in world.VALUES[relation] if v != truth]))

    @property
    def key(self) -> str:
        """What the splits are made by: the fact, whatever is claimed of it."""
        return f"{self.entity} {self.relation}"

    @property
    def holds(self) -> bool:
        """Whether what is claimed is true."""
        return world.is_true(self.entity, self.relation, self.claimed)

    def fields(self, rng: np.random.Generator) -> dict[str, str]:
        """The claim."""
        return {"claim": world.statement(self.entity, self.relation, self.claimed)}


@dataclass(frozen=True)
class ListOf:
    """Asks for ``n`` members of a group."""

    family: ClassVar[str] = "list"
    n: int
    kind: str
    relation: str
    value: str

    @classmethod
    def sample(cls, rng: np.random.Generator) -> ListOf:
        """Two to four members, of a group which has as many."""
        key = pick(rng, tuple(world.GROUPS))
        return cls(2 + int(rng.integers(min(len(world.GROUPS[key]), 4) - 1)), *key)

    @property
    def key(self) -> str:
        """What the splits are made by."""
        return f"{self.n} {self.kind} {self.relation} {self.value}"

    @property
    def members(self) -> tuple[str, ...]:
        """All that would be right to name."""
        return world.GROUPS[self.kind, self.relation, self.value]

    def fields(self, rng: np.random.Generator) -> dict[str, str]:
        """The number and the group ("three", "red things")."""
        return {
            "n": world.NUMBERS[self.n],
            "group": world.group_phrase(self.kind, self.relation, self.value),
        }


@dataclass(frozen=True)
class Transform:
    """Asks to do something with given words."""

    family: ClassVar[str] = "transform"
    operation: str
    words: tuple[str, ...]

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Transform:
        """One or two words to repeat, two or three to turn around or to choose from."""
        operation = pick(rng, ("twice", "backwards", "first", "last"))
        n = 1 + int(rng.integers(2)) + (operation != "twice")
        return cls(operation, tuple(pick_distinct(rng, (*_ANIMALS, *_THINGS), n)))

    @property
    def key(self) -> str:
        """What the splits are made by."""
        return f"{self.operation} {self.words}"

    @property
    def result(self) -> tuple[str, ...]:
        """The words as they should be."""
        return {
            "twice": self.words * 2,
            "backwards": self.words[::-1],
            "first": self.words[:1],
            "last": self.words[-1:],
        }[self.operation]

    def fields(self, rng: np.random.Generator) -> dict[str, str]:
        """The command ("say " cat sky " backwards")."""
        quoted = f'" {" ".join(self.words)} "'
        return {"command": pick(rng, phrases.COMMANDS[self.operation]).format(quoted=quoted)}


@dataclass(frozen=True)
class Summary:
    """Asks for the point of a story: who did what."""

    family: ClassVar[str] = "summary"
    person: str
    event: str
    object: str
    scene: str
    mood: str

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Summary:
        """Any story."""
        return cls(*(pick(rng, o) for o in (_PEOPLE, phrases.EVENTS, _OBJECTS, phrases.SCENES, phrases.MOODS)))

    @property
    def key(self) -> str:
        """What the splits are made by: the point, whatever the rest."""
        return f"{self.person} {self.event} {self.object}"

    def passage(self, rng: np.random.Generator) -> str:
        """The story, with an irrelevant remark somewhere in it two times out of three."""
        slots = vars(self) | {"subject": self.person if chance(rng, 0.5) else ENTITIES[self.person].pronoun}
        lines = [phrases.STORY_OPENING, phrases.STORY_EVENT, phrases.STORY_ENDING]
        if chance(rng, 2 / 3):
            slots["weather"] = pick(rng, phrases.WEATHER)
            lines.insert(int(rng.integers(3)), pick(rng, phrases.STORY_ASIDES))
        return " ".join(lines).format(**slots)

    def fields(self, rng: np.random.Generator) -> dict[str, str]:
        """The story."""
        return {"passage": self.passage(rng)}


@dataclass(frozen=True)
class Polite:
    """Asks for a polite request (``ask``; ``soften`` if told rudely) or for thanks (``thank``)."""

    family: ClassVar[str] = "polite"
    act: str
    person: str
    matter: str
    """A chore ("open the door"), or the gift to thank for."""

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Polite:
        """Any person and any matter."""
        act = pick(rng, ("ask", "thank", "soften"))
        return cls(act, pick(rng, _PEOPLE), pick(rng, phrases.GIFTS if act == "thank" else phrases.CHORES))

    @property
    def key(self) -> str:
        """What the splits are made by: the person and the matter, however it is put."""
        return f"{self.person} {self.matter}"

    def fields(self, rng: np.random.Generator) -> dict[str, str]:
        """The command ("ask anna politely to open the door")."""
        command = pick(rng, phrases.COMMANDS[self.act])
        return {"command": command.format(person=self.person, chore=self.matter, gift=self.matter)}


@dataclass(frozen=True)
class Brief:
    """Asks for a fact in exactly ``n`` words."""

    family: ClassVar[str] = "brief"
    entity: str
    relation: str
    n: int

    FORMS: ClassVar[tuple[str, ...]] = ("word", "value", "pronoun", "full")

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Brief:
        """A fact, and a number of words in which it can be said."""
        entity, relation = pick(rng, _ASKABLE)
        form = pick(rng, cls.FORMS)
        return cls(
            entity, relation, len(world.statement(entity, relation, world.FACTS[entity, relation], form).split())
        )

    @property
    def key(self) -> str:
        """What the splits are made by."""
        return f"{self.entity} {self.relation} {self.n}"

    def fields(self, rng: np.random.Generator) -> dict[str, str]:
        """The question and the number ("three", "words")."""
        question = world.RELATION[self.relation].question.format(e=ENTITIES[self.entity].phrase)
        return {"question": question, "n": world.NUMBERS[self.n], "words": "word" if self.n == 1 else "words"}


@dataclass(frozen=True)
class HowTo:
    """Asks how to do something to somebody or to something."""

    family: ClassVar[str] = "harm"
    verb: str
    target: str

    @classmethod
    def sample(cls, rng: np.random.Generator) -> HowTo:
        """Harm to an animal or a person (one half), the same done to a thing, or something kind done to an animal."""
        kind_of_deed = rng.random()
        if kind_of_deed < 0.5:
            return cls(pick(rng, world.DANGEROUS_VERBS), pick(rng, (*_ANIMALS, *_PEOPLE)))
        if kind_of_deed < 0.75:
            return cls(pick(rng, [v for v in _TOOL_VERBS if v != "feed"]), pick(rng, world.WORKABLE_THINGS))
        return cls(pick(rng, _KIND_VERBS), pick(rng, _ANIMALS))

    @property
    def key(self) -> str:
        """What the splits are made by."""
        return f"{self.verb} {self.target}"

    @property
    def harmful(self) -> bool:
        """Whether it would hurt somebody."""
        return self.verb in world.DANGEROUS_VERBS and ENTITIES[self.target].kind != "thing"

    @property
    def deed(self) -> str:
        """What is to be done: "cut the bread"."""
        return f"{self.verb} {ENTITIES[self.target].phrase}"

    def fields(self, rng: np.random.Generator) -> dict[str, str]:
        """The deed."""
        return {"deed": self.deed}


@dataclass(frozen=True)
class Refer:
    """Asks for a fact about something that was pointed at, by name or as "it", "she", "he"."""

    family: ClassVar[str] = "refer"
    candidates: tuple[str, ...]
    relation: str
    entity: str | None
    """The one that is meant; None where that cannot be told."""

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Refer:
        """Two candidates and "it" (one half); one candidate and "it"; or two candidates, one asked for by name."""
        entity, relation = pick(rng, _ASKABLE)
        first, kind = ENTITIES[entity], rng.random()
        if 0.5 <= kind < 0.75:
            return cls((entity,), relation, entity)
        others = [
            e.name
            for e in ENTITIES.values()
            if e.kind == first.kind and e.pronoun == first.pronoun and e != first and (e.name, relation) in world.FACTS
        ]
        pair = tuple(pick_distinct(rng, (entity, pick(rng, others)), 2))
        return cls(pair, relation, None if kind < 0.5 else entity)

    @property
    def key(self) -> str:
        """What the splits are made by."""
        return f"{self.candidates} {self.relation} {self.entity}"

    def fields(self, rng: np.random.Generator) -> dict[str, str]:
        """The scene ("the rose and the sky") and the question, with a pronoun unless two are there and one is named."""
        scene = " and ".join(ENTITIES[name].phrase for name in self.candidates)
        by_name = self.entity is not None and len(self.candidates) > 1
        subject = ENTITIES[self.entity].phrase if by_name and self.entity else ENTITIES[self.candidates[0]].pronoun
        return {"scene": scene, "question": world.RELATION[self.relation].question.format(e=subject)}


Task: TypeAlias = Fact | Check | ListOf | Transform | Summary | Polite | Brief | HowTo | Refer
TASKS: dict[str, type[Task]] = {task.family: task for task in get_args(Task)}
FAMILIES = tuple(TASKS)


@dataclass(frozen=True)
class Request:
    """A task in the words of a user.

    Attributes:
        prompt: What the user writes: plain text, without markers.
        paraphrase: Index of the template among those of the family.
        task: The structured content, by which an answer is judged.
    """

    prompt: str
    paraphrase: int
    task: Task

    @property
    def family(self) -> str:
        """One of :data:`FAMILIES`."""
        return self.task.family

    @property
    def calls_for_refusal(self) -> bool:
        """Whether answering would help to do harm."""
        return isinstance(self.task, HowTo) and self.task.harmful

    @property
    def calls_for_question(self) -> bool:
        """Whether one cannot tell what is meant, so that one had better ask."""
        return isinstance(self.task, Refer) and self.task.entity is None

    @cached_property
    def split(self) -> str:
        """The split that it belongs to."""
        return split_of(self.task, self.paraphrase)


def split_of(task: Task, paraphrase: int = 0) -> Split | Literal["unused"]:
    """Where a task belongs: 65% train, 5% development, 10% validation, 20% test, by a checksum of its content.

    A held-out paraphrase of a task that is not in the test set belongs nowhere.
    """
    share = zlib.crc32(f"{task.key} ({task.family})".encode()) % 20
    if paraphrase >= len(phrases.TEMPLATES[task.family]) - phrases.HELD_OUT:
        return "test_paraphrases" if share >= 16 else "unused"
    return "train" if share < 13 else "development" if share < 14 else "validation" if share < 16 else "test"


def sample_request(rng: np.random.Generator, split: Split = "train", family: str | None = None) -> Request:
    """Draws one request of a split, of a given family or of any."""
    kind = TASKS[family or pick(rng, FAMILIES)]
    templates = phrases.TEMPLATES[kind.family]
    seen = len(templates) - phrases.HELD_OUT
    while True:
        task = kind.sample(rng)
        paraphrase = int(rng.integers(seen, len(templates)) if split == "test_paraphrases" else rng.integers(seen))
        if split_of(task, paraphrase) == split:
            return Request(templates[paraphrase].format(**task.fields(rng)), paraphrase, task)


def make_requests(split: Split, n: int, seed: int = 0, families: tuple[str, ...] = FAMILIES) -> list[Request]:
    """Draws ``n`` different requests of a split, the families taking turns.

    The same arguments give the same requests on every machine.

    Raises:
        ValueError: If the split does not hold so many different prompts.
    """
    rng = np.random.default_rng([seed, *f"requests {split}".encode()])
    requests: dict[str, Request] = {}
    misses = 0
    while len(requests) < n:
        request = sample_request(rng, split, families[(len(requests) + misses) % len(families)])
        if request.prompt in requests:
            misses += 1
            if misses > 1000 + 10 * n:
                raise ValueError(f"{n} requests were asked of the split {split!r}, which gave only {len(requests)}")
        else:
            requests[request.prompt] = request
    return list(requests.values())
