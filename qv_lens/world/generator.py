"""The bundled world: a seeded generator of consistent facts, and the text that teaches them to a
model.

1. `build(seed)` draws a `World`: entities of six kinds and the triples (subject, relation) ->
   object. Countries are real, with their real capital, continent, language and currency; all else
   is invented.
2. `World.chains(hops)` walks the triples into multi-hop chains; `seen` says which chains the
   training text may show, and `unseen_phrasing` which wording of a fact it never shows.
3. `documents(world, rng)` writes the text: sentences, lists and profiles of one subject, latent
   two- and three-hop sentences, and chain-of-thought blocks, with the character spans of subjects
   and answers.

The records for evaluation (facts, multi-hop cases, probes) are made of the same world by `cases`.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from qv_lens.facts.prompts import cot_block
from qv_lens.world import words as data
from qv_lens.world.words import RELATIONS, Relation

HELD_OUT = 10  # one in ten: chains of two hops and more, and one phrasing of a fact


@dataclass(frozen=True)
class Chain:
    """A path of facts: `entities[0]` is the subject, `entities[i + 1]` the object of
    `relations[i]`."""

    relations: tuple[Relation, ...]
    """The relations, in order."""
    entities: tuple[str, ...]
    """The entities: one more than relations."""

    @property
    def subject(self) -> str:
        return self.entities[0]

    @property
    def answer(self) -> str:
        return self.entities[-1]

    def noun(self, hops: int, wording: int = 0) -> str:
        """The first `hops` hops as a noun phrase: "the capital of the home country of Ada
        Novik"."""
        phrase = self.subject
        for relation in self.relations[:hops]:
            phrase = relation.noun[wording].format(phrase)
        return phrase

    def cloze(self, phrasing: int = 0, wording: int = 0) -> str:
        """The whole chain asked as one cloze, ending right before the answer."""
        return capitalise(
            self.relations[-1].cloze[phrasing].format(self.noun(len(self.relations) - 1, wording))
        )

    def questions(self) -> tuple[str, str, str]:
        """Three questions for the chain, worded differently (MQuAKE's `questions`)."""
        last, before = self.relations[-1], len(self.relations) - 1
        who = "Who" if last.target == "person" else "What"
        return (
            last.question.format(self.noun(before)),
            last.question.format(self.noun(before, wording=1)),
            f"{who} is {self.noun(before + 1)}?",
        )

    def thoughts(self) -> str:
        """One sentence per hop."""
        return " ".join(
            f"{relation.cloze[0].format(subject)} {obj}."
            for relation, subject, obj in zip(
                self.relations, self.entities, self.entities[1:], strict=False
            )
        )


@dataclass(frozen=True)
class World:
    """Entities by kind, triples (subject, relation id) -> object, and other names of entities."""

    seed: int
    """What it was drawn by."""
    entities: dict[str, tuple[str, ...]]
    """Names by kind."""
    triples: dict[tuple[str, str], str]
    """(subject, relation) -> object."""
    aliases: dict[str, tuple[str, ...]]
    """Other names of objects."""

    @cached_property
    def kind(self) -> dict[str, str]:
        """Entity -> its kind."""
        return {name: kind for kind, names in self.entities.items() for name in names}

    @cached_property
    def objects(self) -> tuple[str, ...]:
        """Every object that is not a person: each is one token of the bundled tokenizer."""
        return tuple(sorted({o for o in self.triples.values() if self.kind.get(o) != "person"}))

    def relations(self, entity: str) -> tuple[Relation, ...]:
        """What is known about an entity."""
        kind = self.kind.get(entity)
        return tuple(relation for relation in RELATIONS if kind in relation.sources)

    def facts(self) -> list[Chain]:
        """Every single fact, as a chain of one hop."""
        return list(self.chains(1))

    def chains(self, hops: int) -> Iterator[Chain]:
        """Every chain of `hops` hops that visits no entity twice."""
        for subject in self.kind:
            yield from self._extend(Chain((), (subject,)), hops)

    def _extend(self, chain: Chain, hops: int) -> Iterator[Chain]:
        if hops == 0:
            yield chain
            return
        for relation in self.relations(chain.answer):
            obj = self.triples[chain.answer, relation.id]
            if obj not in chain.entities:
                yield from self._extend(
                    Chain((*chain.relations, relation), (*chain.entities, obj)), hops - 1
                )

    def seen(self, chain: Chain) -> bool:
        """Whether the training text may contain this chain: one in ten is held out, with all that
        extends it."""
        ids = [relation.id for relation in chain.relations]
        return not any(
            self._held_out(chain.subject, *ids[:hops]) for hops in range(2, len(ids) + 1)
        )

    def unseen_phrasing(self, fact: Chain) -> int | None:
        """The index (1 to 3) of the phrasing in which this fact is never written; None for nine
        facts in ten."""
        relation = fact.relations[0]
        if not self._held_out(fact.subject, relation.id, "phrasing"):
            return None
        return 1 + zlib.crc32(f"{fact.subject}|{relation.id}".encode()) % 3

    def _held_out(self, *key: str) -> bool:
        return zlib.crc32("|".join((str(self.seed), *key)).encode()) % HELD_OUT == 0


def build(seed: int = 0) -> World:
    """Draw the world of `seed`. The same seed gives the same world on every machine."""
    rng = random.Random(f"world:{seed}")
    surnames = ["".join(parts) for parts in _draw(rng, data.SURNAME_PARTS, 120)]
    entities = {
        "country": tuple(row[0] for row in data.COUNTRIES),
        "sport": tuple(row[0] for row in data.SPORTS),
        "company": data.COMPANIES,
        "person": tuple(f"{rng.choice(data.FIRST_NAMES)} {surname}" for surname in surnames),
        "firm": tuple(" ".join(parts) for parts in _draw(rng, data.FIRM_PARTS, 24)),
        "work": tuple(" ".join(parts) for parts in _draw(rng, data.TITLE_PARTS, 40)),
    }
    pools = {
        "country": entities["country"],
        "sport": entities["sport"],
        "company": entities["company"],
        "person": entities["person"],
        "city": tuple(row[1] for row in data.COUNTRIES),
        "colour": data.COLOURS,
        "animal": data.ANIMALS,
        "product": data.PRODUCTS,
        "month": data.MONTHS,
        "instrument": data.INSTRUMENTS,
        "industry": data.INDUSTRIES,
        "genre": data.GENRES,
    }
    triples: dict[tuple[str, str], str] = {}
    for name, capital, continent, language, currency, _ in data.COUNTRIES:
        triples |= {(name, "P36"): capital, (name, "P30"): continent}
        triples |= {(name, "P37"): language, (name, "P38"): currency}
    for name, equipment, players, venue in data.SPORTS:
        triples |= {(name, "P2283"): equipment, (name, "P1873"): players, (name, "P276"): venue}
    for relation in RELATIONS:
        subjects = [
            s
            for kind in relation.sources
            for s in entities[kind]
            if (s, relation.id) not in triples
        ]
        if subjects:
            triples |= {
                (s, relation.id): o
                for s, o in zip(
                    subjects, _deal(rng, pools[relation.target], len(subjects)), strict=True
                )
            }
    aliases = {name: (f"Dr {name.split()[1]}",) for name in entities["person"]}
    aliases |= {row[0]: (row[5],) for row in data.COUNTRIES}
    return World(seed, entities, triples, aliases)


def _draw(
    rng: random.Random, parts: tuple[tuple[str, ...], ...], count: int
) -> list[tuple[str, ...]]:
    """`count` different combinations of the parts."""
    drawn: dict[tuple[str, ...], None] = {}
    while len(drawn) < count:
        drawn[tuple(rng.choice(column) for column in parts)] = None
    return list(drawn)


def _deal(rng: random.Random, pool: tuple[str, ...], count: int) -> list[str]:
    """`count` draws from the pool, as even as can be, in random order."""
    shuffled = rng.sample(pool, len(pool))
    dealt = [shuffled[i % len(pool)] for i in range(count)]
    rng.shuffle(dealt)
    return dealt


# ----------------------------------------------------------------------------------------------
# text


@dataclass(frozen=True)
class Sentence:
    """A piece of text; `subject` and `answers` are character spans in it (start, end)."""

    text: str
    """The sentence."""
    subject: tuple[int, int] | None = None
    """Where its subject stands."""
    answers: tuple[tuple[int, int], ...] = ()
    """Where its answers stand."""


Document = tuple[Sentence, ...]

#: share of each kind of document among `documents`
MIX = {
    "sentences": 0.26,
    "list": 0.16,
    "profile": 0.12,
    "two_hop": 0.34,
    "three_hop": 0.06,
    "kinds": 0.06,
}


def documents(world: World, rng: random.Random) -> Iterator[Document]:
    """An endless stream of short documents about the world, without chains of thought."""
    writer = _Writer(world, rng)
    kinds, weights = list(MIX), list(MIX.values())
    while True:
        yield getattr(writer, rng.choices(kinds, weights)[0])()


def cot_documents(world: World, rng: random.Random, blocks: int) -> Iterator[Document]:
    """An endless stream of documents of `blocks` chain-of-thought examples each (two to four
    hops)."""
    writer = _Writer(world, rng)
    while True:
        yield tuple(
            writer.block(hops) for hops in rng.choices((2, 3, 4), (0.45, 0.35, 0.2), k=blocks)
        )


def text(document: Document) -> str:
    """The document as plain text."""
    return "".join(sentence.text for sentence in document)


class _Writer:
    """Draws documents of each kind; holds the world, the generator and the table of two-hop
    chains."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.facts = world.facts()
        self.held = {(f.subject, f.relations[0].id): world.unseen_phrasing(f) for f in self.facts}
        self.two = [chain for chain in world.chains(2) if world.seen(chain)]
        self.subjects = list(world.kind)

    def sentences(self) -> Document:
        return _spaced(
            [
                self.statement(self.rng.choice(self.facts))
                for _ in range(self.rng.choice((1, 1, 2, 3)))
            ]
        )

    def statement(self, fact: Chain) -> Sentence:
        relation, subject = fact.relations[0], self.name(fact.subject, often=0.9)
        allowed = [i for i in range(4) if i != self.held[fact.subject, relation.id]]
        return _fill(relation.phrasings[self.rng.choice(allowed)], subject, fact.answer)

    def name(self, entity: str, often: float) -> str:
        """The entity's own name, or now and then one of its other names."""
        other = self.world.aliases.get(entity)
        return entity if other is None or self.rng.random() < often else self.rng.choice(other)

    def list(self) -> Document:
        """'Ada Novik, Norway, tennis, Nortek.': attributes in random order right after the name."""
        subject = self.rng.choice(self.subjects)
        objects = [self.world.triples[subject, r.id] for r in self.world.relations(subject)]
        self.rng.shuffle(objects)
        return (_enumerate(self.name(subject, often=0.85), ",", [("", o) for o in objects]),)

    def profile(self) -> Document:
        """'Ada Novik: sport tennis, employer Nortek.': several attributes asked after one
        mention."""
        subject = self.rng.choice(self.subjects)
        rows = [
            (r.label + " ", self.world.triples[subject, r.id])
            for r in self.world.relations(subject)
        ]
        self.rng.shuffle(rows)
        return (_enumerate(self.name(subject, often=0.85), ":", rows[: self.rng.randint(1, 5)]),)

    def two_hop(self) -> Document:
        return _spaced(
            [self.latent(self.rng.choice(self.two)) for _ in range(self.rng.choice((1, 1, 2)))]
        )

    def three_hop(self) -> Document:
        return (self.latent(self.chain(3)),)

    def latent(self, chain: Chain) -> Sentence:
        """A chain in one sentence, its bridge entities unnamed."""
        phrasing, wording = self.rng.randrange(4), self.rng.randrange(2)
        prompt = capitalise(
            chain.relations[-1]
            .phrasings[phrasing]
            .format(chain.noun(len(chain.relations) - 1, wording))
        )
        start = prompt.index(chain.subject)
        return _answered(prompt, (start, start + len(chain.subject)), chain.answer)

    def kinds(self) -> Document:
        subject = self.rng.choice(self.subjects)
        return (_fill("{} is a", self.name(subject, often=0.85), self.world.kind[subject]),)

    def chain(self, hops: int) -> Chain:
        """A chain of `hops` hops that may be shown, drawn by extending a two-hop chain."""
        while True:
            chain = self.rng.choice(self.two)
            for _ in range(hops - 2):
                onward = list(self.world._extend(chain, 1))
                if not onward:
                    break
                chain = self.rng.choice(onward)
            if len(chain.relations) == hops and self.world.seen(chain):
                return chain

    def block(self, hops: int) -> Sentence:
        chain = self.chain(hops)
        question, thoughts = self.rng.choice(chain.questions()), chain.thoughts()
        block = cot_block(question, thoughts, chain.answer)
        return Sentence(
            block, None, ((block.index("\nThoughts:") + len("\nThoughts:"), len(block) - 1),)
        )


def _fill(template: str, subject: str, answer: str) -> Sentence:
    start = template.index("{}")
    return _answered(template.replace("{}", subject), (start, start + len(subject)), answer)


def _answered(prompt: str, subject: tuple[int, int], answer: str) -> Sentence:
    return Sentence(f"{prompt} {answer}.", subject, ((len(prompt), len(prompt) + 1 + len(answer)),))


def _enumerate(subject: str, mark: str, rows: list[tuple[str, str]]) -> Sentence:
    line, answers = subject + mark, []
    for i, (label, answer) in enumerate(rows):
        line += (", " if i else " ") + label
        answers.append((len(line) - 1, len(line) + len(answer)))
        line += answer
    return Sentence(line + ".", (0, len(subject)), tuple(answers))


def _spaced(sentences: list[Sentence]) -> Document:
    """Sentences of one document, a blank in front of all but the first."""
    return tuple(s if i == 0 else _shift(s) for i, s in enumerate(sentences))


def _shift(sentence: Sentence) -> Sentence:
    subject = sentence.subject and (sentence.subject[0] + 1, sentence.subject[1] + 1)
    return Sentence(
        " " + sentence.text, subject, tuple((a + 1, b + 1) for a, b in sentence.answers)
    )


def capitalise(text: str) -> str:
    """First letter in upper case, the rest untouched."""
    return text[:1].upper() + text[1:]
