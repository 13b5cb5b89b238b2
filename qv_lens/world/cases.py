"""Records of the bundled world, in the project's own form and in the field's file formats.

`facts` gives `Fact`s; `mquake`, `counterfact` and `knowedit` write plain dictionaries in those
benchmarks' own layouts, so that one reader and one evaluation serve the bundled world and the real
files alike."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any

from qv_lens.facts.prompts import cot_block
from qv_lens.facts.records import EditCase, Fact, Groups, Probe
from qv_lens.world.generator import Chain, World, capitalise
from qv_lens.world.words import Relation


def as_fact(world: World, chain: Chain, phrasing: int = 0) -> Fact:
    """A chain as a Fact: of one hop with `{}` at its subject; of several, nested around the first
    subject."""
    relation = chain.relations[-1]
    if len(chain.relations) == 1:
        prompt, others = (
            relation.phrasings[phrasing],
            [p for i, p in enumerate(relation.phrasings) if i != phrasing],
        )
    else:
        prompt, others = chain.cloze(phrasing).replace(chain.subject, "{}"), []
    return Fact(
        prompt,
        chain.subject,
        chain.answer,
        relation.id,
        relation.category,
        world.aliases.get(chain.answer, ()),
        tuple(others),
        world.aliases.get(chain.subject, ()),
    )


def facts(world: World, relation: str | None = None) -> list[Fact]:
    """Every single fact of the world, or those of one relation (P27, P36, ...)."""
    return [
        as_fact(world, chain)
        for chain in world.facts()
        if relation in (None, chain.relations[0].id)
    ]


def objects(world: World, relation: Relation) -> tuple[str, ...]:
    """Everything that stands as an object of the relation, sorted."""
    return tuple(sorted({o for (_, id), o in world.triples.items() if id == relation.id}))


def neighbours(world: World, chain: Chain, count: int, rng: random.Random) -> list[Fact]:
    """Facts of the same relation about other subjects, those with the same object first
    (CounterFact)."""
    relation = chain.relations[0]
    same = [
        Chain((relation,), (s, o))
        for (s, id), o in world.triples.items()
        if id == relation.id and s != chain.subject
    ]
    same = [c for c in same if world.kind[c.subject] == world.kind[chain.subject]]
    rng.shuffle(same)
    same.sort(key=lambda c: c.answer != chain.answer)
    return [as_fact(world, c) for c in same[:count]]


def chains_through(world: World, chain: Chain, new: str) -> list[tuple[Chain, Chain]]:
    """Two-hop chains over a fact before and after its object became `new`, where that changes the
    answer."""
    pairs = []
    for relation in world.relations(chain.answer):
        if (new, relation.id) in world.triples:
            relations = (*chain.relations, relation)
            before = Chain(relations, (*chain.entities, world.triples[chain.answer, relation.id]))
            after = Chain(relations, (chain.subject, new, world.triples[new, relation.id]))
            if before.answer != after.answer:
                pairs.append((before, after))
    return pairs


def leading_to(world: World, fact: Chain, avoid: Collection[str] = (), count: int = 4) -> list[str]:
    """Two-hop prompts that end at a fact, over triples whose object is its subject (IFMET's
    supplementary ones), without those in `avoid`; none where nothing leads to the subject."""
    into = [
        (s, r)
        for (s, id), o in sorted(world.triples.items())
        if o == fact.subject
        for r in world.relations(s)
        if r.id == id
    ]
    texts = [
        Chain((relation, *fact.relations), (s, *fact.entities)).cloze() for s, relation in into
    ]
    return [text for text in texts if text not in avoid][:count]


def edit_case(
    world: World,
    chain: Chain,
    new: str,
    rng: random.Random,
    neighbour_count: int = 8,
    phrasing: int = 0,
) -> EditCase:
    """An edit of one fact in one of its phrasings, with the others as its paraphrases, neighbours,
    the two-hop prompts that depend on it, and KnowEdit's groups."""
    fact = as_fact(world, chain, phrasing)
    through = chains_through(world, chain, new)
    request = fact.to(new, leading_to(world, chain))
    paraphrases = tuple(request.target.with_prompt(prompt) for prompt in fact.paraphrases)
    onward = tuple((as_fact(world, before), as_fact(world, after)) for before, after in through)
    near = tuple(neighbours(world, chain, neighbour_count, rng))
    relation, subject = chain.relations[0], chain.subject
    aliases = tuple(
        Probe(relation.cloze[0].format(alias), new) for alias in world.aliases.get(subject, ())
    )
    reasoning = tuple(Probe(after.text, after.answer) for _, after in onward)
    others = tuple(
        Probe(r.cloze[0].format(subject), world.triples[subject, r.id])
        for r in world.relations(subject)
        if r.id != relation.id
    )
    return EditCase(
        request,
        paraphrases,
        near,
        onward,
        tuple(
            (name, probes)
            for name, probes in (("Subject_Aliasing", aliases), ("Reasoning", reasoning))
            if probes
        ),
        (("Relation_Specificity", others),) if others else (),
        (relation.cloze[0].format(subject), f"{subject} is a"),
    )


def edit_cases(
    world: World, count: int, seed: int = 0, relation: str | None = None
) -> list[EditCase]:
    """`count` edits of different facts to other objects of their relation."""
    rng = random.Random(f"edits:{world.seed}:{seed}")
    pool = [chain for chain in world.facts() if relation in (None, chain.relations[0].id)]
    chosen = rng.sample(pool, min(count, len(pool)))
    return [
        edit_case(world, c, new_object(world, c.relations[0], (c.answer,), rng), rng)
        for c in chosen
    ]


def new_object(world: World, relation: Relation, avoid: Iterable[str], rng: random.Random) -> str:
    """Another object of the relation, drawn evenly."""
    return rng.choice([o for o in objects(world, relation) if o not in set(avoid)])


def cot_blocks(world: World, avoid: Iterable[str], rng: random.Random, count: int = 4) -> list[str]:
    """`count` worked two- and three-hop examples that name as few of the entities in `avoid` as
    possible: none, where such examples exist."""
    blocked, blocks, pools = set(avoid), [], []
    for hops in (2, 3):
        shared = [(len(blocked & set(c.entities)), c) for c in world.chains(hops) if world.seen(c)]
        fewest = min(n for n, _ in shared)
        pools.append([c for n, c in shared if n == fewest])
    for i in range(count):
        chain = rng.choice(pools[i % 2])
        blocks.append(cot_block(chain.questions()[0], chain.thoughts(), chain.answer))
    return blocks


# ------------------------------------------------------------------ the benchmarks' own layouts


def mquake(world: World, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` cases in MQuAKE's record format: 2 to 4 hops in turn, with 1 to as many edits as
    hops."""
    rng = random.Random(f"mquake:{world.seed}:{seed}")
    pools = {hops: list(world.chains(hops)) for hops in (2, 3, 4)}
    shapes = [(hops, edits) for hops in (2, 3, 4) for edits in range(1, hops + 1)]
    records: list[dict[str, Any]] = []
    while len(records) < count:
        hops, edits = shapes[len(records) % len(shapes)]
        old = rng.choice(pools[hops])
        new, where = _edited(world, old, sorted(rng.sample(range(hops), edits)), rng)
        if new is not None and new.answer != old.answer:
            records.append(_mquake_record(world, len(records) + 1, old, new, where))
    return records


def _edited(
    world: World, old: Chain, where: list[int], rng: random.Random
) -> tuple[Chain | None, list[int]]:
    """The chain with the objects of hops `where` replaced, all later hops following the new
    entities."""
    entities = [old.subject]
    for hop, relation in enumerate(old.relations):
        true = world.triples.get((entities[-1], relation.id))
        if true is None:
            return None, where
        obj = (
            new_object(world, relation, (true, *entities, *old.entities), rng)
            if hop in where
            else true
        )
        if obj in entities:
            return None, where
        entities.append(obj)
    return Chain(old.relations, tuple(entities)), where


def _mquake_record(
    world: World, case_id: int, old: Chain, new: Chain, where: list[int]
) -> dict[str, Any]:
    def triples(chain: Chain, name) -> list[list[str]]:
        steps = zip(chain.relations, chain.entities, chain.entities[1:], strict=False)
        return [[name(s), r.id if name is not str else r.label, name(o)] for r, s, o in steps]

    ids = {
        name: f"Q{i + 1}" for i, name in enumerate(sorted({*world.kind, *world.triples.values()}))
    }
    rewrites = [
        {
            "prompt": new.relations[hop].cloze[0],
            "relation_id": new.relations[hop].id,
            "target_new": {"str": new.entities[hop + 1], "id": ids[new.entities[hop + 1]]},
            "target_true": _true(world, new, hop, ids),
            "subject": new.entities[hop],
            "question": new.relations[hop].question.format(new.entities[hop]),
            "via": leading_to(
                world, Chain((new.relations[hop],), new.entities[hop : hop + 2]), (old.cloze(),)
            ),
        }
        for hop in where
    ]
    new_triples = triples(new, ids.__getitem__)
    return {
        "case_id": case_id,
        "requested_rewrite": rewrites,
        "questions": list(old.questions()),
        "clozes": [old.cloze()],
        "answer": old.answer,
        "answer_alias": list(world.aliases.get(old.answer, ())),
        "new_answer": new.answer,
        "new_answer_alias": list(world.aliases.get(new.answer, ())),
        "single_hops": [_hop(world, old, hop) for hop in range(len(old.relations))],
        "new_single_hops": [_hop(world, new, hop) for hop in range(len(new.relations))],
        "orig": {
            "triples": triples(old, ids.__getitem__),
            "triples_labeled": triples(old, str),
            "new_triples": new_triples,
            "new_triples_labeled": triples(new, str),
            "edit_triples": [new_triples[hop] for hop in where],
            "edit_triples_idx": where,
        },
    }


def _true(world: World, chain: Chain, hop: int, ids: dict[str, str]) -> dict[str, str]:
    true = world.triples[chain.entities[hop], chain.relations[hop].id]
    return {"str": true, "id": ids[true]}


def _hop(world: World, chain: Chain, hop: int) -> dict[str, Any]:
    relation, subject, answer = chain.relations[hop], chain.entities[hop], chain.entities[hop + 1]
    cloze, question = relation.cloze[0].format(subject), relation.question.format(subject)
    return {
        "question": question,
        "cloze": cloze,
        "answer": answer,
        "answer_alias": list(world.aliases.get(answer, ())),
    }


def counterfact(world: World, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` records in CounterFact's format: of facts that have neighbours of the same object,
    since that is what all neighbourhood prompts of the format ask for."""
    rng = random.Random(f"counterfact:{world.seed}:{seed}")
    alike = [(world.kind[c.subject], c.relations[0].id, c.answer) for c in world.facts()]
    shared = Counter(alike)
    pool = [c for c, kind in zip(world.facts(), alike, strict=True) if shared[kind] > 1]
    records = []
    for case_id, chain in enumerate(rng.sample(pool, count)):
        relation = chain.relations[0]
        new = new_object(world, relation, (chain.answer,), rng)
        near = neighbours(world, chain, 10, rng)
        rewrite = {
            "prompt": relation.cloze[0],
            "relation_id": relation.id,
            "subject": chain.subject,
            "target_new": {"str": new},
            "target_true": {"str": chain.answer},
        }
        records.append(
            {
                "case_id": case_id,
                "pararel_idx": case_id,
                "requested_rewrite": rewrite,
                "paraphrase_prompts": [p.format(chain.subject) for p in relation.phrasings[1:]],
                "neighborhood_prompts": [f.text for f in near if f.answer == chain.answer],
                "attribute_prompts": [f.text for f in facts(world, relation.id) if f.answer == new][
                    :10
                ],
                "generation_prompts": [
                    relation.cloze[0].format(chain.subject),
                    f"{chain.subject} is a",
                ],
            }
        )
    return records


def knowedit(world: World, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """`count` records in KnowEdit's format: portability by reasoning and aliases, locality on the
    same subject and others."""
    rng = random.Random(f"knowedit:{world.seed}:{seed}")
    records = []
    for chain in rng.sample(world.facts(), count):
        relation, subject = chain.relations[0], chain.subject
        case = edit_case(
            world, chain, new_object(world, relation, (chain.answer,), rng), rng, neighbour_count=5
        )
        near = tuple(Probe(f.text, f.answer) for f in case.neighbours)
        records.append(
            {
                "subject": subject,
                "prompt": capitalise(relation.cloze[0].format(subject)),
                "target_new": case.request.new,
                "ground_truth": chain.answer,
                "rephrase_prompt": relation.cloze[1].format(subject),
                "portability": _grouped(case.portability),
                "locality": _grouped((*case.locality, ("Neighborhood", near))),
            }
        )
    return records


def _grouped(groups: Groups) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [{"prompt": p.text, "ground_truth": [[p.answer]]} for p in probes]
        for name, probes in groups
        if probes
    }
