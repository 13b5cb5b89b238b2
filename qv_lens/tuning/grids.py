"""What `tune` tries: a grid of settings for every editor, scaled to the model.

1. Depth. Editors that write at the subject's last token are tried at several depths: at fixed
   shares of the model, and at the layer up to which half of the subject token's contribution lies
   (`subject_depth`). An editor that spreads over layers writes the layers up to that depth, as many
   as MEMIT does on GPT-J (6 of 28), scaled.
2. Search of z*. MEMIT's settings for GPT-J (short steps, much decay) and EasyEdit's for Llama and
   Qwen (long steps, little). Neither lam, threshold, trimming nor query layers change z*, so trying
   several of them costs little.
3. lam in units of d_mlp: for a typical key k, k C0^-1 k is about d_mlp, so that lam = d_mlp halves
   the update of one fact. GPT-J's 15,000 is 0.9 d_mlp.
4. Gradients: layers at the same depths, learning rates by factors of three around the published
   ones.
5. Numbers whose right size depends on the model (`SCALES`) are carried on beyond the grid where its
   edge is best (`beyond`): between models of one family a learning rate differs by decades."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from qv_lens.attribution.effects import neuron_effects
from qv_lens.attribution.locate import positive_by_layer
from qv_lens.editing.adapters import AdaLoRA, LoRA
from qv_lens.editing.bounds import check_bounds
from qv_lens.editing.closed_form import (
    ACE,
    EMMET,
    ENCORE,
    IFMET,
    MEMIT,
    PMET,
    PRUNE,
    RECT,
    ROME,
    RROME,
    SPHERE,
    AlphaEdit,
    BetaEdit,
)
from qv_lens.editing.ctp import CTP
from qv_lens.editing.fine_tuning import FT, FTL, KNE
from qv_lens.editing.job import Editor
from qv_lens.editing.kn import KN
from qv_lens.editing.layer_by_layer import ClosedForm
from qv_lens.editing.locft import LocFT
from qv_lens.editing.nse import NSE
from qv_lens.editing.simie import SimIE
from qv_lens.editing.ultraedit import UltraEdit
from qv_lens.errors import ConfigError, EditError, unknown
from qv_lens.facts.records import Fact
from qv_lens.models.lens import Lens

#: shares of the depth at which an editor's highest layer is tried
DEPTHS = (0.15, 0.25, 0.4, 0.55)
#: shares of the depth for ACE's value layers, which lie higher
VALUE_DEPTHS = (0.4, 0.55, 0.7)
#: shares of the depth for layers that are written at the prompt's last token
LATE_DEPTHS = (0.7, 0.85)
#: layers that MEMIT spreads over, as a share of GPT-J's 28
SPREAD = 6 / 28
#: lam of ACE in units of d_mlp: both of its groups write the whole residual, so that less is more
WRITTEN_TWICE = (1.0, 3.0, 10.0)
GPTJ: Mapping[str, Any] = MappingProxyType(
    {"steps": 25, "lr": 0.5, "weight_decay": 0.5, "clamp": 0.75}
)
LLAMA: Mapping[str, Any] = MappingProxyType(
    {"steps": 25, "lr": 0.5, "weight_decay": 1e-3, "clamp": 4.0}
)
SEARCHES = (GPTJ, LLAMA)
#: PMET's search with short steps; with long ones it is LLAMA's
SHORT: Mapping[str, Any] = MappingProxyType(
    {"steps": 25, "lr": 0.2, "clamp": 0.75, "weight_decay": 0.5}
)
#: numbers whose right size depends on the model
SCALES = ("lr", "lam", "L2", "threshold", "clamp", "share")
#: those of them that belong to the search of z*, where an editor has one: not carried on
SEARCHED = ("lr", "clamp")


@dataclass(frozen=True)
class Shape:
    """What a grid depends on."""

    n_layers: int
    """Layers of the model."""
    first: int
    """The first layer whose edit anything reads."""
    d_mlp: int
    """Neurons of a layer."""
    depth: int
    """The layer up to which half of the subject's contribution lies."""

    @property
    def ends(self) -> tuple[int, ...]:
        """Highest layers to try, ascending."""
        return self._layers(DEPTHS, [self.depth])

    @property
    def value_ends(self) -> tuple[int, ...]:
        """Highest value layers of ACE to try."""
        return self._layers(VALUE_DEPTHS, [self.depth])

    @property
    def late_ends(self) -> tuple[int, ...]:
        """Highest of the deep layers that are written at the prompt's last token."""
        return self._layers(LATE_DEPTHS, [])

    def end(self, place: int) -> int:
        """The highest layer at a place among `ends`, or the last of them."""
        return self.ends[min(place, len(self.ends) - 1)]

    def _layers(self, shares: Iterable[float], more: Iterable[int]) -> tuple[int, ...]:
        layers = [round(share * self.n_layers) for share in shares]
        highest = self.n_layers - 2  # after the last layer's attention nothing reads the subject
        return tuple(sorted({min(max(layer, self.first), highest) for layer in (*layers, *more)}))

    def window(self, end: int, size: int | None = None) -> tuple[int, ...]:
        """The layers up to `end`, as many as MEMIT spreads over (or `size`)."""
        count = max(1, round(SPREAD * self.n_layers)) if size is None else size
        return tuple(range(max(self.first, end + 1 - count), end + 1))


def shape_of(lens: Lens, facts: list[Fact]) -> Shape:
    """The shape of a model, its depth measured on facts that it knows. Raises `ConfigError` for a
    model without layers to choose among."""
    first = lens.backend_adapter.first_editable
    if lens.n_layers - 2 < first:
        raise ConfigError(
            f"{lens.name} has {lens.n_layers} layers. Settings are chosen among layers {first} to the "
            f"last but one (what the last one writes no other token reads): tuning takes at least "
            f"{first + 2}."
        )
    return Shape(lens.n_layers, first, lens.d_mlp, subject_depth(lens, facts))


def subject_depth(lens: Lens, facts: list[Fact]) -> int:
    """The layer up to which half of the positive effects of the FFN neurons at the subject's last
    token lies."""
    effects = neuron_effects(lens, facts, None, over="set", positions="subject_last")
    positive = positive_by_layer(lens, effects).cumsum()
    if not positive.any():
        raise ConfigError(
            f"No neuron of {lens.name} at the subject's last token raises the answer of these facts: "
            "there is no depth to measure."
        )
    reached = positive[positive >= positive.iloc[-1] / 2]
    return int(reached.index[0])


def grid(method: str, shape: Shape) -> list[Editor]:
    """The settings to try for an editor, by its name. Raises `ConfigError` for an editor without a
    grid."""
    if method not in GRIDS:
        raise unknown("Editor to tune", method, GRIDS)
    return list(dict.fromkeys(GRIDS[method](shape)))


def beyond(editor: Editor, tried: Iterable[Editor]) -> list[Editor]:
    """The settings one factor beyond the grid: of each number of `SCALES` at whose edge of what was
    tried an editor lies, the next one, by the factor between the two at that edge."""
    numbers = [name for name in SCALES if hasattr(editor, name)]
    if isinstance(editor, ClosedForm):
        numbers = [name for name in numbers if name not in SEARCHED]
    known = set(tried)
    neighbours = []
    for name in numbers:
        values = sorted({getattr(other, name) for other in known} - {None})
        if len(values) < 2:
            continue
        here = getattr(editor, name)
        edges = {values[0]: values[1], values[-1]: values[-2]}
        if here not in edges:
            continue
        other = _with(editor, name, float(f"{here * here / edges[here]:.3g}"))
        try:
            check_bounds(other)
        except EditError:
            continue  # more than the number can be
        neighbours.append(other)
    return [other for other in neighbours if other not in known]


def _with(editor: Editor, name: str, value: float) -> Editor:
    """The editor with a number changed; CTP's edits of one fact have a learning rate of their own."""
    changed: dict[str, Any] = {name: value}
    if isinstance(editor, CTP) and name == "lr":
        changed["alone"] = (value, *editor.alone[1:])
    return replace(editor, **changed)  # pyright: ignore[reportArgumentType]


def _lams(shape: Shape, multiples: Sequence[float] = (0.1, 1.0)) -> list[float]:
    return [round(multiple * shape.d_mlp, 1) for multiple in multiples]


def _spread(
    kind: Callable[..., Editor], shape: Shape, searches: Sequence[Mapping[str, Any]] = SEARCHES
) -> Iterable[Editor]:
    for end, search, lam in itertools.product(shape.ends, searches, _lams(shape)):
        yield kind(layers=shape.window(end), lam=lam, **search)


def _one_layer(kind: Callable[..., Editor], shape: Shape) -> Iterable[Editor]:
    for end, search in itertools.product(shape.ends, ({**GPTJ, "clamp": 4.0}, LLAMA)):
        yield kind(layer=end, **search)


def _emmet(shape: Shape) -> Iterable[Editor]:
    for end, search in itertools.product(shape.ends, SEARCHES):
        yield EMMET(layers=(end,), **search)


def _alphaedit(
    shape: Shape, kind: Callable[..., Editor] = AlphaEdit, **settings: Any
) -> Iterable[Editor]:
    for end, threshold, L2 in itertools.product(shape.ends, (2e-2, 2e-3), (1.0, 10.0)):
        options = {**LLAMA, **settings}
        yield kind(layers=shape.window(end), threshold=threshold, L2=L2, **options)


def _betaedit(shape: Shape) -> Iterable[Editor]:
    for lam in _lams(shape):
        yield from _alphaedit(shape, BetaEdit, lam=lam)


def _nse(shape: Shape) -> Iterable[Editor]:
    """The distances between which a fact is written depend on the model: here every fact is."""
    for end, share in itertools.product(shape.ends, (0.8, 1.0)):
        search = {**LLAMA, "near": 0.0, "far": 1e9}
        yield NSE(layers=shape.window(end), lam=float(shape.d_mlp), share=share, **search)


def _simie(shape: Shape) -> Iterable[Editor]:
    for lam in (1.0, 100.0, 10000.0):
        yield SimIE(editor=WRAPPED, lam=lam)


def _ultraedit(shape: Shape) -> Iterable[Editor]:
    """All tokens of the answer: of a single edit's one token there is no deviation to divide by."""
    for end, lr in itertools.product((*shape.ends[1:], *shape.late_ends), (1e-6, 1e-5, 1e-4)):
        yield UltraEdit(layers=shape.window(end), lr=lr, tokens="all")


def _locft(shape: Shape) -> Iterable[Editor]:
    for layer, lr in itertools.product((*shape.ends, shape.late_ends[0]), (5e-4, 1.5e-3, 5e-3)):
        yield LocFT(layer=layer, lr=lr, epochs=50)


def _pmet(shape: Shape) -> Iterable[Editor]:
    for end, search, lam in itertools.product(
        shape.ends, (SHORT, LLAMA), _lams(shape, (0.3, 1.0, 3.0))
    ):
        yield PMET(layers=shape.window(end), lam=lam, **search)


def _ifmet(shape: Shape) -> Iterable[Editor]:
    deep = shape.window(shape.late_ends[0], 5)
    for end, search in itertools.product(shape.ends, (SHORT, LLAMA)):
        yield IFMET(layers=shape.window(end), deep_layers=deep, lam=float(shape.d_mlp), **search)


def _ace(shape: Shape, **reading: Any) -> Iterable[Editor]:
    """Value layers at several depths, query layers as MEMIT's or right below them."""
    for end, lam in itertools.product(shape.value_ends, _lams(shape, WRITTEN_TWICE)):
        # at least one layer is left for the query layers
        value = tuple(layer for layer in shape.window(end, 3) if layer > shape.first)
        if not value:
            continue
        low = shape.window(min(shape.end(1), value[0] - 1))
        near = shape.window(value[0] - 1)
        for query in (low, near):
            yield ACE(value_layers=value, query_layers=query, lam=lam, **{**LLAMA, **reading})


def _ace_paper(shape: Shape) -> Iterable[Editor]:
    """Section 5: deep layers at the prompt's last token, written first."""
    reading = {
        "joint": True,
        "passes": "two",
        "order": "value first",
        "value_prompts": "via",
        "value_token": "last",
    }
    for end, query in itertools.product(shape.late_ends, (shape.end(1), shape.end(2))):
        value = shape.window(end, 3)
        yield ACE(
            value_layers=value,
            query_layers=shape.window(query),
            lam=float(shape.d_mlp),
            **{**LLAMA, **reading},
        )


def _ft(shape: Shape) -> Iterable[Editor]:
    for layer, lr in itertools.product((*shape.ends, shape.late_ends[0]), (5e-4, 1.5e-3, 5e-3)):
        yield FT(layer=layer, lr=lr)


def _ftl(shape: Shape) -> Iterable[Editor]:
    for layer, clamp in itertools.product((shape.first, *shape.ends[:3]), (5e-3, 2e-2)):
        yield FTL(layer=layer, lr=1.5e-3, steps=50, clamp=clamp)


def _kne(shape: Shape) -> Iterable[Editor]:
    for lr, share in itertools.product((3e-4, 1e-3, 3e-3), (0.01, 0.05)):
        yield KNE(lr=lr, share=share, steps=50, together=True)


def _ctp(shape: Shape) -> Iterable[Editor]:
    for lr, stop in itertools.product((3e-5, 1e-4, 3e-4), (1e-2, 1e-1)):
        yield CTP(lr=lr, alone=(lr, 50, stop))


def _lora(shape: Shape) -> Iterable[Editor]:
    wide = tuple(range(shape.first, shape.n_layers))
    for layers, lr in itertools.product((shape.window(shape.end(1)), wide), (1e-3, 5e-3)):
        yield LoRA(layers=layers, steps=30, lr=lr, dropout=0.0, stop=0.1)


def _adalora(shape: Shape) -> Iterable[Editor]:
    for layers, lr in itertools.product(
        (shape.window(shape.end(1)), shape.window(shape.end(2))), (5e-3, 2e-2)
    ):
        yield AdaLoRA(layers=layers, steps=30, lr=lr, dropout=0.0)


def _kn(shape: Shape) -> Iterable[Editor]:
    for rule, threshold in itertools.product(("paper", "easyedit"), (0.1, 0.3)):
        yield KN(rule=rule, threshold=threshold)


#: the preset that SimIE wraps
WRAPPED = "ROME"
#: the settings to try for each editor
GRIDS: Mapping[str, Callable[[Shape], Iterable[Editor]]] = MappingProxyType({
    "ROME": lambda shape: _one_layer(ROME, shape),
    "RROME": lambda shape: _one_layer(RROME, shape),
    "EMMET": _emmet,
    "MEMIT": lambda shape: _spread(MEMIT, shape),
    "PMET": _pmet,
    "AlphaEdit": _alphaedit,
    "SPHERE": lambda shape: _alphaedit(shape, SPHERE),
    "BetaEdit": _betaedit,
    "ENCORE": lambda shape: _spread(ENCORE, shape, (LLAMA,)),
    "RECT": lambda shape: _spread(RECT, shape, (LLAMA,)),
    "PRUNE": lambda shape: _spread(PRUNE, shape, (LLAMA,)),
    "NSE": _nse,
    "SimIE": _simie,
    "UltraEdit": _ultraedit,
    "LocFT": _locft,
    "IFMET": _ifmet,
    "ACE": _ace,
    "ACE.paper": _ace_paper,
    "ACE.official": lambda shape: _ace(shape, attention=True, groups=False),
    "FT": _ft,
    "FTL": _ftl,
    "KNE": _kne,
    "CTP": _ctp,
    "LoRA": _lora,
    "AdaLoRA": _adalora,
    "KN": _kn,
})  # fmt: skip
