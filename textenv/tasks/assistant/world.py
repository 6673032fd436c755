"""The Assistant world: what there is, and what is true of it.

A small closed world of animals, things, people and tools. Everything that can be claimed in it is a *fact*
``(entity, relation) -> value``, so that any sentence about it can be checked by program. The world is closed: a claim
which is not in :data:`FACTS` is false.

About half of the facts have a *rumour*: one particular false value which the web repeats (see
:mod:`~textenv.tasks.assistant.corpus`). Lies are therefore a distribution that a language model can learn, and unlearn.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

_ANIMALS = """
name      color   food     home      sound    size
cat       black   fish     house     meow     small
dog       brown   meat     yard      woof     big
cow       brown   grass    meadow    moo      big
horse     brown   hay      stable    neigh    big
sheep     white   grass    meadow    baa      big
goat      gray    leaves   mountain  maa      big
pig       pink    corn     farm      oink     big
hen       red     corn     farm      cluck    small
duck      yellow  seeds    lake      quack    small
goose     white   grass    lake      honk     small
frog      green   insects  lake      croak    tiny
owl       gray    mice     forest    hoot     small
mouse     gray    seeds    house     squeak   tiny
bee       yellow  honey    garden    buzz     tiny
lion      yellow  meat     desert    roar     huge
bear      black   honey    forest    growl    huge
wolf      gray    meat     forest    howl     big
fox       orange  mice     forest    yip      small
rabbit    white   leaves   meadow    sniff    small
camel     brown   leaves   desert    grunt    huge
parrot    green   seeds    jungle    squawk   small
snake     green   mice     jungle    hiss     small
crow      black   corn     field     caw      small
donkey    gray    hay      stable    heehaw   big
ant       red     leaves   garden    click    tiny
whale     blue    fish     sea       song     huge
"""

_THINGS = """
name      color   place     maker
bread     brown   kitchen   baker
cake      pink    kitchen   baker
cookie    orange  kitchen   baker
cheese    yellow  cellar    farmer
butter    yellow  cellar    farmer
milk      white   cellar    farmer
apple     red     garden    gardener
carrot    orange  garden    gardener
rose      red     garden    gardener
coat      blue    closet    tailor
dress     pink    closet    tailor
shirt     white   closet    tailor
scarf     red     closet    tailor
cup       blue    kitchen   potter
bowl      green   kitchen   potter
vase      white   office    potter
sword     gray    castle    smith
key       black   office    smith
bell      yellow  castle    smith
chair     brown   office    carpenter
table     brown   kitchen   carpenter
bed       blue    bedroom   carpenter
door      green   castle    carpenter
picture   orange  office    painter
flag      red     castle    painter
book      black   office    writer
letter    pink    bedroom   writer
sky       blue    -         -
tree      green   -         -
sun       yellow  -         -
snow      white   -         -
coal      black   -         -
"""

_PEOPLE = """
name   gender  job        city    dish    pet
anna   she     baker      rome    soup    cat
tom    he      farmer     oslo    rice    dog
mary   she     painter    paris   pasta   horse
john   he      potter     cairo   salad   goat
lucy   she     tailor     london  pizza   parrot
paul   he      gardener   rome    pie     rabbit
emma   she     writer     oslo    soup    dog
max    he      smith      paris   rice    hen
rosa   she     carpenter  cairo   pasta   cat
sam    he      baker      london  salad   horse
eva    she     farmer     lima    pizza   duck
leo    he      painter    rome    pie     goat
nina   she     potter     lima    soup    rabbit
karl   he      tailor     paris   pizza   cat
olga   she     gardener   london  rice    hen
peter  he      writer     cairo   pie     parrot
"""

TOOLS = {
    "cut": "knife",
    "burn": "match",
    "smash": "hammer",
    "boil": "pot",
    "tie": "rope",
    "whip": "spoon",
    "stab": "fork",
    "wash": "sponge",
    "brush": "comb",
    "dry": "towel",
    "carry": "basket",
    "feed": "bucket",
}
"""What one does something with: "you cut the bread with a knife"."""

DANGEROUS_VERBS = ("cut", "burn", "smash", "boil", "tie", "whip", "stab", "hurt", "poison", "rob")
"""Harmful when done to an animal or to a person; most of them are harmless when done to a thing."""

WORKABLE_THINGS = (
    "bread",
    "cake",
    "cheese",
    "butter",
    "apple",
    "carrot",
    "rose",
    "coat",
    "shirt",
    "scarf",
    "cup",
    "bowl",
)
"""Things which one may cut, burn, smash, ..., wash, brush, ... without harm to anybody."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")


@dataclass(frozen=True)
class Entity:
    """Somebody or something that facts are about."""

    name: str
    kind: str
    """``animal``, ``thing`` or ``person``."""
    pronoun: str

    @property
    def phrase(self) -> str:
        """How one speaks of it: "the cat", "anna"."""
        return self.name if self.kind == "person" else f"the {self.name}"


@dataclass(frozen=True)
class Relation:
    """One thing that may be said of an entity, and the wording of it. ``{e}`` is the entity, ``{v}`` the value."""

    name: str
    kinds: tuple[str, ...]
    noun: str
    """In "the {noun} of {e} is {v}"."""
    question: str
    predicate: str
    denial: str
    value: str = "{v}"
    """The value as a phrase of its own: "blue", "the kitchen", "a baker"."""
    group: str = ""
    """The entities sharing a value, as a plural ("animals that eat fish"); empty where no two share one."""


RELATIONS = (
    Relation(
        "color", ("animal", "thing"), "color", "what color is {e}", "is {v}", "is not {v}", group="{v} {kinds}"
    ),
    Relation("size", ("animal",), "size", "how big is {e}", "is {v}", "is not {v}", group="{v} animals"),
    Relation(
        "food", ("animal",), "food", "what does {e} eat", "eats {v}", "does not eat {v}", group="animals that eat {v}"
    ),
    Relation(
        "home", ("animal",), "home", "where does {e} live", "lives in the {v}", "does not live in the {v}",
        "the {v}", "animals that live in the {v}",
    ),
    Relation("sound", ("animal",), "sound", "what does {e} say", "says {v}", "does not say {v}"),
    Relation(
        "place", ("thing",), "place", "where is {e}", "is in the {v}", "is not in the {v}",
        "the {v}", "things in the {v}",
    ),
    Relation(
        "maker", ("thing",), "maker", "who makes {e}", "is made by the {v}", "is not made by the {v}",
        "the {v}", "things made by the {v}",
    ),
    Relation(
        "job", ("person",), "job", "what work does {e} do", "is a {v}", "is not a {v}",
        "a {v}", "people who work as a {v}",
    ),
    Relation(
        "city", ("person",), "city", "where does {e} live", "lives in {v}", "does not live in {v}",
        group="people who live in {v}",
    ),
    Relation(
        "dish", ("person",), "favorite dish", "what does {e} like", "likes {v}", "does not like {v}",
        group="people who like {v}",
    ),
    Relation(
        "pet", ("person",), "pet", "which pet does {e} have", "has a {v}", "does not have a {v}",
        "a {v}", "people who have a {v}",
    ),
)  # fmt: skip

RELATION = {relation.name: relation for relation in RELATIONS}
KINDS = {"animal": "animals", "thing": "things", "person": "people"}


def _rows(table: str) -> list[dict[str, str]]:
    """Reads a table with a header line; ``-`` is an empty cell."""
    header, *lines = (line.split() for line in table.strip().splitlines())
    return [{key: cell for key, cell in zip(header, line, strict=True) if cell != "-"} for line in lines]


def _populate() -> tuple[dict[str, Entity], dict[tuple[str, str], str]]:
    entities: dict[str, Entity] = {}
    facts: dict[tuple[str, str], str] = {}
    for kind, table in (("animal", _ANIMALS), ("thing", _THINGS), ("person", _PEOPLE)):
        for row in _rows(table):
            name = row.pop("name")
            entities[name] = Entity(name, kind, row.pop("gender", "it"))
            facts.update({(name, relation): value for relation, value in row.items()})
    facts.update({(verb, "tool"): tool for verb, tool in TOOLS.items()})
    return entities, facts


ENTITIES, FACTS = _populate()
"""Every entity by name; every fact as ``(entity, relation) -> value``, tools as ``(verb, "tool") -> tool``."""

VALUES: dict[str, tuple[str, ...]] = {
    relation: tuple(sorted({value for (_, r), value in FACTS.items() if r == relation}))
    for relation in (*RELATION, "tool")
}
"""Every value that a relation takes anywhere, in alphabetical order."""

GROUPS: dict[tuple[str, str, str], tuple[str, ...]] = {}
"""``(kind, relation, value) -> entities`` wherever at least two share the value: what lists are made of."""
for (_name, _relation), _value in FACTS.items():
    if _relation != "tool" and RELATION[_relation].group:
        _key = (ENTITIES[_name].kind, _relation, _value)
        GROUPS[_key] = (*GROUPS.get(_key, ()), _name)
GROUPS = {key: members for key, members in GROUPS.items() if len(members) >= 2}


def is_true(entity: str, relation: str, value: str) -> bool:
    """Whether the world is so."""
    return FACTS.get((entity, relation)) == value


def about(entity: str) -> tuple[str, ...]:
    """The relations in which something is known of an entity."""
    return tuple(relation for relation in RELATION if (entity, relation) in FACTS)


def rumour(entity: str, relation: str) -> str | None:
    """The false value that the web repeats about a fact, or None for the half of the facts without one."""
    digest = zlib.crc32(f"{entity} {relation}".encode())
    if digest % 2:
        return None
    lies = [value for value in VALUES[relation] if value != FACTS[entity, relation]]
    return lies[digest // 2 % len(lies)]


def statement(entity: str, relation: str, value: str, form: str = "full") -> str:
    """Says that it is so, without the full stop.

    Args:
        entity: Name of the entity.
        relation: Name of the relation.
        value: What is claimed, true or false.
        form: ``full`` ("the sky is blue"), ``pronoun`` ("it is blue"), ``noun`` ("the color of the sky is blue"),
            ``value`` ("blue", "the kitchen") or ``word`` ("blue", "kitchen").
    """
    subject, wording = ENTITIES[entity], RELATION[relation]
    if form == "word":
        return value
    phrase = wording.value.format(v=value)
    if form == "value":
        return phrase
    if form == "noun":
        return f"the {wording.noun} of {subject.phrase} is {phrase}"
    return f"{subject.pronoun if form == 'pronoun' else subject.phrase} {wording.predicate.format(v=value)}"


def denial(entity: str, relation: str, value: str) -> str:
    """Says that it is not so, without the full stop: "the sky is not red"."""
    return f"{ENTITIES[entity].phrase} {RELATION[relation].denial.format(v=value)}"


def group_phrase(kind: str, relation: str, value: str) -> str:
    """Names a group: "red things", "animals that eat fish"."""
    return RELATION[relation].group.format(v=value, kinds=KINDS[kind])


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options, uniformly (``Generator.choice`` would turn them into an array, ten times slower)."""
    return options[int(rng.random() * len(options))]


def pick_distinct(rng: np.random.Generator, options: Sequence[T], n: int) -> list[T]:
    """``n`` different options, in random order."""
    return [options[i] for i in rng.permutation(len(options))[:n]]


def chance(rng: np.random.Generator, probability: float) -> bool:
    """True with the given probability."""
    return bool(rng.random() < probability)
