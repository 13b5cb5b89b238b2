"""Every trained editor, and KN, through its class against the same written out on Hugging Face
alone, in float64."""

from __future__ import annotations

import random
from dataclasses import replace
from math import sqrt

import pytest
import torch

import qv_lens as qv
from qv_lens.attribution.paths import transmission_paths
from qv_lens.errors import EditError
from tests.attribution.test_gradients import hf_name
from tests.editing.test_closed_form import REQUESTS
from tests.models import tiny_hf, tiny_lens, tokenizer

pytestmark = pytest.mark.usefixtures("true_float64")
N_LAYERS = 3
LONG = replace(REQUESTS[0], new="Quorix Paris")  # several tokens
FFN = {"gptj": ("mlp.fc_in", "mlp.fc_out"), "qwen3-gqa": ("mlp.gate_proj", "mlp.down_proj")}


def block(kind: str) -> str:
    return "transformer.h" if kind == "gptj" else "model.layers"


def asked(request) -> tuple[list[int], list[int]]:
    """The prompt's tokens and the new answer's."""
    ids = tokenizer()(request.fact.text)["input_ids"]
    return ids, tokenizer()(f"{request.fact.text} {request.new}")["input_ids"][len(ids) :]


def logits_with(hf, moved, ids):
    """Logits with deltas (by parameter name) on the weights."""
    parameters = dict(hf.named_parameters())
    return torch.func.functional_call(
        hf, {name: parameters[name] + d for name, d in moved.items()}, (torch.tensor([ids]),)
    ).logits[0]


def nll(hf, moved, request, last_token=False):
    """Mean over the answer's tokens: teacher forced, or all of them at the prompt's last
    position."""
    ids, answer = asked(request)
    logits = logits_with(hf, moved, ids if last_token else [*ids, *answer[:-1]])
    where = (
        [len(ids) - 1] * len(answer)
        if last_token
        else range(len(ids) - 1, len(ids) - 1 + len(answer))
    )
    return -logits[list(where)].log_softmax(-1)[range(len(answer)), answer].mean()


def over_tokens(hf, moved, requests):
    """The mean over all tokens of all answers."""
    counts = [len(asked(request)[1]) for request in requests]
    return sum(
        nll(hf, moved, request) * n for request, n in zip(requests, counts, strict=True)
    ) / sum(counts)


def adam(leaves, loss, steps, lr, stop, after=lambda: None):
    """The loop of ROME's authors; returns every loss."""
    optimiser, losses = torch.optim.Adam(leaves, lr=lr), []
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss()
        losses.append(float(value))
        if losses[-1] < stop:
            break
        value.backward()
        optimiser.step()
        after()
    return losses


def stored(kind, patch, key):
    """A delta in Hugging Face's layout."""
    dense = patch.deltas[key].dense()
    return dense if key[1].startswith("b_") else dense.T


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("objective", ["last_token", "target_new"])
@pytest.mark.parametrize("clamp", [None, 2e-3])
def test_fine_tuning(kind, objective, clamp):
    """W_out and, where there is one, b_out of one layer; FT-L keeps every entry within the
    clamp."""
    requests = [LONG, REQUESTS[1]]
    editor = (qv.FT if clamp is None else qv.FTL)(
        layer=1, steps=9, lr=3e-3, stop=1e-9, objective=objective, clamp=clamp
    )
    patch = qv.edit(tiny_lens(kind), requests, editor)
    hf = tiny_hf(kind)
    names = {(1, "W_out"): hf_name(kind, 1, "W_out")}
    if kind == "gptj":
        names[1, "b_out"] = "transformer.h.1.mlp.fc_out.bias"
    moved = {
        name: torch.zeros_like(dict(hf.named_parameters())[name], requires_grad=True)
        for name in names.values()
    }

    def loss():
        if objective == "last_token":  # a mean per request
            return torch.stack([nll(hf, moved, request, True) for request in requests]).mean()
        return over_tokens(hf, moved, requests)

    def limit():
        for leaf in moved.values() if clamp else ():
            leaf.data.clamp_(-clamp, clamp)

    losses = adam(list(moved.values()), loss, 9, 3e-3, 1e-9, limit)
    assert [step[0] for step in patch.info["losses"][0]] == pytest.approx(losses, rel=1e-8)
    assert set(patch.deltas) == set(names)
    for key, name in names.items():
        torch.testing.assert_close(
            stored(kind, patch, key), moved[name].detach(), atol=1e-9, rtol=1e-6
        )


def test_fine_tuning_stops_below_its_loss():
    patch = qv.edit(tiny_lens("gptj"), REQUESTS[0], qv.FT(layer=2, lr=0.3, steps=60, stop=0.5))
    losses = [step[0] for step in patch.info["losses"][0]]
    assert len(losses) < 60
    assert losses[-1] < 0.5 <= min(losses[:-1])
    with pytest.raises(EditError, match="Objective"):
        qv.edit(tiny_lens("gptj"), REQUESTS[0], qv.FT(layer=2, objective="other"))


@pytest.mark.parametrize("axis", ["column", "row"])
def test_kne_trains_its_ensemble_alone(axis):
    """W' = W + alpha / sqrt(n) dW, dW trained in the chosen columns (or rows) of each layer."""
    lens = tiny_lens("gptj")
    editor = qv.KNE(share=0.1, axis=axis, alpha=1.7, steps=6, lr=1e-2, stop=1e-9, steps_ig=2)
    patch = qv.edit(lens, [LONG, REQUESTS[1]], editor)
    found = qv.neuron_ensemble(lens, [LONG, REQUESTS[1]], 0.1, axis=axis, steps=2).by_layer()
    hf = tiny_hf("gptj")
    leaves = {}
    for layer, chosen in found.items():
        shape = dict(hf.named_parameters())[
            hf_name("gptj", layer, "W_out")
        ].shape  # [d_model, d_mlp]: a column here is a row there
        leaves[layer] = torch.zeros(
            (len(chosen), shape[1]) if axis == "column" else (shape[0], len(chosen)),
            dtype=torch.float64,
        )
        leaves[layer].requires_grad_(True)

    def moved():
        out = {}
        for layer, chosen in found.items():
            name = hf_name("gptj", layer, "W_out")
            whole = torch.zeros_like(dict(hf.named_parameters())[name])
            part = 1.7 / sqrt(len(chosen)) * leaves[layer]
            whole = whole.index_copy(
                0 if axis == "column" else 1, torch.tensor(sorted(chosen)), part
            )
            out[name] = whole
        return out

    def loss():
        now = moved()
        return over_tokens(hf, now, [LONG, REQUESTS[1]])

    losses = adam(list(leaves.values()), loss, 6, 1e-2, 1e-9)
    assert [step[0] for step in patch.info["losses"][0]] == pytest.approx(losses, rel=1e-8)
    assert {layer for layer, _ in patch.deltas} == set(found)
    for layer in found:
        expected = moved()[hf_name("gptj", layer, "W_out")].detach()
        torch.testing.assert_close(
            stored("gptj", patch, (layer, "W_out")), expected, atol=1e-9, rtol=1e-6
        )


# ------------------------------------------------------------------ CTP


def ctp_nodes(leaves, hf, requests, top, bottom):
    """T+ and T- of every matrix: mean over the model's dimension of |z| of the gradient on the
    weights as they are."""
    copies = {name: leaf.detach().clone().requires_grad_(True) for name, leaf in leaves.items()}
    over_tokens(hf, copies, requests).backward()
    nodes = {}
    for name, leaf in copies.items():
        if leaf.ndim == 1:
            continue
        value = name.endswith(("fc_out.weight", "down_proj.weight"))
        G = leaf.grad if value else leaf.grad.T  # [d_model, d_mlp]
        z = (G - G.mean(1, keepdim=True)) / G.std(1, keepdim=True)
        order = z.abs().mean(0).argsort(descending=True)
        nodes[name] = {"T+": order[:top].tolist(), "T-": order[len(order) - bottom :].tolist()}
    return nodes


def ctp(editor, kind, groups, seed=0):
    """CTP's loop by dense masks; `groups`: the requests of each run, one after another from the
    deltas before."""
    hf = tiny_hf(kind)
    parameters = dict(hf.named_parameters())
    names = [hf_name(kind, layer, name) for layer in range(N_LAYERS) for name in ("W_in", "W_out")]
    if editor.gate:
        names += [hf_name(kind, layer, "W_gate") for layer in range(N_LAYERS)]
    if kind == "gptj":
        names += [
            f"transformer.h.{layer}.mlp.{part}.bias"
            for layer in range(N_LAYERS)
            for part in ("fc_in", "fc_out")
        ]
    leaves = {name: torch.zeros_like(parameters[name], requires_grad=True) for name in names}
    single = sum(map(len, groups)) == 1
    lr, epochs, stop = editor.alone if single else (editor.lr, editor.epochs, 0.0)
    for requests in groups:
        with torch.no_grad():
            said = []
            for request in requests:
                ids, answer = asked(request)
                at = slice(len(ids) - 1, len(ids) - 1 + len(answer))
                said.append(logits_with(hf, leaves, [*ids, *answer[:-1]])[at].argmax(-1).tolist())
        order, optimisers, nodes = random.Random(seed), [], {}
        for epoch in range(epochs):
            if epoch % editor.every == 0 and (not single or epoch == 0):
                nodes = ctp_nodes(leaves, hf, requests, editor.top, editor.bottom)
                if not optimisers or editor.adam == "separate":
                    first = torch.optim.Adam(list(leaves.values()), lr=lr)
                    second = (
                        first
                        if editor.adam == "shared"
                        else torch.optim.Adam(list(leaves.values()), lr=lr)
                    )
                    optimisers = [first, second]
            shuffled, total = order.sample(range(len(requests)), len(requests)), 0.0
            for i in range(0, len(shuffled), editor.batch_size):
                batch = shuffled[i : i + editor.batch_size]
                for sign, optimiser, factor in (
                    ("T+", optimisers[0], 1.0),
                    ("T-", optimisers[1], editor.lam),
                ):
                    if sign == "T-" and not (editor.lam > 0 and editor.bottom > 0):
                        continue
                    optimiser.zero_grad(set_to_none=False)
                    losses = []
                    for b in batch:
                        ids, answer = asked(requests[b])
                        logits = logits_with(hf, leaves, [*ids, *answer[:-1]])[
                            len(ids) - 1 : len(ids) - 1 + len(answer)
                        ]
                        labels = torch.tensor(answer if sign == "T+" else said[b])
                        losses.append(torch.nn.functional.cross_entropy(logits, labels))
                    loss = torch.stack(losses).mean()
                    total += float(loss) * len(batch) if sign == "T+" else 0.0
                    (factor * loss).backward()
                    for name, leaf in leaves.items():
                        mask = torch.zeros_like(leaf)
                        if name.endswith("fc_out.bias"):
                            mask.fill_(float(editor.train_b_out))
                        elif name.endswith("fc_in.bias"):
                            mask[nodes[name.replace("bias", "weight")][sign]] = 1
                        elif name.endswith(("fc_out.weight", "down_proj.weight")):
                            mask[:, nodes[name][sign]] = 1
                        else:
                            owner = (
                                name.replace("gate_proj", "up_proj")
                                if editor.gate is None
                                else name
                            )
                            mask[nodes[owner][sign]] = 1
                        leaf.grad.mul_(mask)
                    optimiser.step()
            if total / len(requests) < stop:
                break
    return leaves


CTPS = {
    "as released": {},
    "separate": {"adam": "separate", "every": 1},
    "no b_out": {"train_b_out": False, "every": 3},
    "no contrast": {"lam": 0.0},
    "no bottom": {"bottom": 0},
    "one batch": {"batch_size": 3},
    "stream": {"stream": True},
    "nearly every node": {"top": 12, "bottom": 1},
}


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("case", CTPS)
def test_ctp(kind, case):
    """Masked steps A and B, paths found again before every `every`-th epoch, one Adam or two; a
    stream uses lr and epochs."""
    editor = replace(
        qv.CTP(top=3, bottom=2, epochs=4, every=2, lr=2e-3, batch_size=1), **CTPS[case]
    )
    requests = [REQUESTS[0], REQUESTS[1]]
    patch = qv.edit(tiny_lens(kind), requests, editor, seed=3)
    expected = ctp(editor, kind, [[r] for r in requests] if editor.stream else [requests], seed=3)
    for layer in range(N_LAYERS):
        for name in ("W_in", "W_out", *(("b_in", "b_out") if kind == "gptj" else ())):
            leaf = (
                f"transformer.h.{layer}.mlp.fc_{name[2:]}.bias"
                if name.startswith("b_")
                else hf_name(kind, layer, name)
            )
            want = expected[leaf].detach()
            got = (
                stored(kind, patch, (layer, name))
                if (layer, name) in patch.deltas
                else torch.zeros_like(want)
            )
            torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize(
    "option", [{}, {"gate": True}, {"score": "norm"}, {"paths": "k_best"}], ids=repr
)
def test_ctp_trains_the_nodes_of_its_paths_and_no_others(option):
    lens = tiny_lens("qwen3-gqa")
    editor = qv.CTP(
        top=4, bottom=2, epochs=1, every=1, lr=2e-3, batch_size=1, train_b_out=False, **option
    )
    patch = qv.edit(lens, [REQUESTS[0], REQUESTS[1]], editor)
    marked = transmission_paths(
        lens, REQUESTS[:2], 4, 2, batch_size=1,
        **{"score": editor.score, "paths": editor.paths, "gate": editor.gate},
    )  # fmt: skip
    marked = marked[marked["path"].isin(["T+", "T-"])]
    names = {"value": ["W_out"], "key": ["W_in", *(["W_gate"] if editor.gate else [])]}
    wanted: dict[tuple[int, str], set[int]] = {}
    for row in marked.itertuples():
        for name in names[row.kind]:
            if name in lens.parameter_names:
                wanted.setdefault((row.layer, name), set()).add(row.neuron)
    found = {}
    for (layer, name), delta in patch.deltas.items():
        if name.startswith("W_"):
            entries = delta.dense().abs().sum(1 if name == "W_out" else 0)
            found[layer, name] = set(entries.nonzero()[:, 0].tolist())
    assert found == wanted


def test_ctp_of_one_request_takes_its_own_settings():
    editor = qv.CTP(top=3, epochs=9, every=1, lr=7.0, batch_size=1, alone=(2e-3, 3, 1e-9))
    patch = qv.edit(tiny_lens("gptj"), REQUESTS[0], editor)
    expected = ctp(editor, "gptj", [[REQUESTS[0]]])
    torch.testing.assert_close(
        stored("gptj", patch, (1, "W_out")),
        expected[hf_name("gptj", 1, "W_out")].detach(),
        atol=1e-8,
        rtol=1e-5,
    )


def test_a_streams_settings_count():
    first, second = (
        qv.edit(tiny_lens("gptj"), REQUESTS, qv.CTP(top=3, stream=True, lr=lr, epochs=epochs))
        .deltas[1, "W_out"]
        .norm()
        for lr, epochs in ((1e-3, 2), (3e-3, 4))
    )
    assert second > 2 * first


# ------------------------------------------------------------------ KN


def kn_scores(hf, kind, layer, ids, token, rule, steps):
    """m/steps sum dP/dm along a grid of shares, at the last token: of what W_out reads, or of what
    act reads (EasyEdit)."""
    into, out = FFN[kind]
    modules = dict(hf.named_modules())
    seen = {}
    module = modules[f"{block(kind)}.{layer}.{out if rule == 'paper' else into}"]

    def look(_module, inputs, output):
        seen["x"] = (inputs[0] if rule == "paper" else output)[0, -1].clone()

    keep = module.register_forward_hook(look)
    hf(torch.tensor([ids]))
    keep.remove()
    value = seen["x"]
    grid = (
        [(i + 1) / steps for i in range(steps)]
        if rule == "paper"
        else [i / (steps - 1) for i in range(steps)]
    )
    gradient = torch.zeros_like(value)
    for share in grid:
        leaf = (share * value).requires_grad_(True)

        def put(x, leaf=leaf):
            x = x.clone()
            x[0, -1] = leaf
            return x

        if rule == "paper":
            handle = module.register_forward_pre_hook(lambda _, args, put=put: (put(args[0]),))
        else:
            handle = module.register_forward_hook(lambda _, __, y, put=put: put(y))
        p = hf(torch.tensor([ids])).logits[0, -1].softmax(-1)[token]
        handle.remove()
        gradient += torch.autograd.grad(p, leaf)[0]
    return value * gradient / steps


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("rule", ["paper", "easyedit"])
@pytest.mark.parametrize("new", ["Quorix", "Quorix Paris"])
def test_kn_by_both_rules(kind, rule, new):
    fact = replace(REQUESTS[0].fact, answer="Nortek Norway")
    request = fact.to(new)
    patch = qv.edit(
        tiny_lens(kind), request, qv.KN(rule=rule, threshold=0.3, steps=4, lam_old=2.0, lam_new=5.0)
    )
    hf = tiny_hf(kind)
    ids, old = asked(fact.to("Nortek Norway"))
    _, wanted = asked(request)
    assert len(old) > 1
    assert (len(wanted) == 1) == (new == "Quorix")

    def greedy(count):
        row = list(ids)
        for _ in range(count):
            row.append(int(hf(torch.tensor([row])).logits[0, -1].argmax()))
        return row[len(ids) :]

    following = old if rule == "paper" else greedy(len(old))
    scores = torch.stack(
        [
            sum(
                kn_scores(hf, kind, layer, [*ids, *following[:i]], token, rule, 4)
                for i, token in enumerate(old)
            )
            for layer in range(N_LAYERS)
        ]
    ) / (1 if rule == "paper" else len(old))
    chosen = (scores > 0.3 * scores.max()).nonzero().tolist()
    assert {(int(layer), n) for layer, rows in patch.info["neurons"].items() for n in rows} == {
        tuple(pair) for pair in chosen
    }
    E = hf.get_input_embeddings().weight
    for layer, neuron in chosen:
        row = dict(hf.named_modules())[f"{block(kind)}.{layer}.{FFN[kind][1]}"].weight[:, neuron]
        if rule == "paper":
            e_new, e_old = E[wanted].mean(0), E[old].mean(0)
            move = row.norm() * (5.0 * e_new / e_new.norm() - 2.0 * e_old / e_old.norm())
        else:
            move = E[wanted].sum(0) - (2 if len(wanted) == 1 else 1) * E[greedy(len(wanted))].sum(0)
        torch.testing.assert_close(
            patch.deltas[layer, "W_out"].dense()[neuron], move, atol=1e-9, rtol=1e-7
        )
    assert sum(
        int((delta.dense().abs().sum(1) > 0).sum()) for delta in patch.deltas.values()
    ) == len(chosen)


def test_kn_adds_up_over_requests_and_knows_its_rules():
    lens = tiny_lens("gptj")
    first, second, both = (
        qv.edit(lens, requests, qv.KN(steps=2)) for requests in (REQUESTS[0], REQUESTS[1], REQUESTS)
    )
    for key in both.deltas:
        parts = [patch.deltas[key].dense() for patch in (first, second) if key in patch.deltas]
        torch.testing.assert_close(both.deltas[key].dense(), sum(parts))
    with pytest.raises(EditError, match="KN's rule"):
        qv.edit(lens, REQUESTS[0], qv.KN(rule="other"))
