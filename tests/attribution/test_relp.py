"""RelP against an implementation on Hugging Face's own modules, which shares no code with ours:
custom autograd functions in place of norms, activations, products and the softmax."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import qv_lens as qv
from qv_lens.attribution.relp import RULES, read_out, relp_hooks
from tests.models import BACKENDS, KINDS, TINY, lens_and_twin, tiny_hf, tiny_lens

FACTS = [
    qv.Fact("{} works for", "Olga Pelodan", "Nortek Dalrin"),
    qv.Fact("The capital of {} is the city of", "Norway", "Oslo"),
]


class LinearAct(torch.autograd.Function):
    """An activation whose gradient is act(x) / x."""

    @staticmethod
    def forward(ctx, x, act):
        y = act(x)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y / x, None


class HalfProduct(torch.autograd.Function):
    """a * b, half of the gradient to each factor."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g * b / 2, g * a / 2


class Frozen(torch.autograd.Function):
    """Something that no gradient passes."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.zeros_like(g)


def is_norm(module):
    name = type(module).__name__
    return "Norm" in name or "LayerNorm" in name


def rescaled(module, _inputs, output):
    """A norm whose divisor is a constant: its output has the gradient of centring, gain, and a
    fixed scale."""
    x = _inputs[0].to(output.dtype)
    centred = "RMSNorm" not in type(module).__name__
    y = x - x.mean(-1, keepdim=True) if centred else x
    weight = getattr(module, "weight", None)
    gain = 1.0 if weight is None else weight
    if type(module).__name__.startswith("Gemma"):
        gain = 1.0 + gain
    bias = getattr(module, "bias", None)
    plain = output.detach() - (0 if bias is None else bias)
    part = (y * gain).detach()
    big = part.abs().argmax(-1, keepdim=True)
    factor = plain.gather(-1, big) / part.gather(-1, big)  # 1 / sigma, read off the output
    linear = y * gain * factor
    return output.detach() + (linear - linear.detach())


@contextmanager
def rules_of(hf, rules, monkeypatch):
    """The Hugging Face model with the gradient of the rules, by patching its modules."""
    handles = []
    inner = [
        (name, module)
        for name, module in hf.named_modules()
        if is_norm(module) and not name.endswith(("q_norm", "k_norm", "q_layernorm", "k_layernorm"))
    ]
    if "norm" in rules:
        handles += [module.register_forward_hook(rescaled) for _, module in inner]
    with monkeypatch.context() as patch:
        if "attention" in rules:
            softmax = nn.functional.softmax

            def frozen(*args, **kwargs):
                return Frozen.apply(softmax(*args, **kwargs))

            patch.setattr(nn.functional, "softmax", frozen)
            patch.setattr(torch, "softmax", frozen)
        for module in list(hf.modules()):
            if hasattr(module, "gate_proj") or hasattr(module, "gate_up_proj"):
                patch.setattr(module, "forward", gated(module, rules))
            elif "activation" in rules:
                for name in ("act", "act_fn", "activation_fn", "activation_func", "gelu_impl"):
                    act = getattr(module, name, None)
                    if callable(act):
                        if name in module._modules:
                            patch.setitem(module._modules, name, Acting(act))
                        else:
                            patch.setattr(module, name, Acting(act).forward)
        yield
    for handle in handles:
        handle.remove()


class Acting(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return LinearAct.apply(x, self.act)


def gated(module, rules):
    act = module.activation_fn if hasattr(module, "activation_fn") else module.act_fn

    def forward(x):
        if hasattr(module, "gate_up_proj"):
            gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = module.gate_proj(x), module.up_proj(x)
        acted = LinearAct.apply(gate, act) if "activation" in rules else act(gate)
        product = HalfProduct.apply(acted, up) if "product" in rules else acted * up
        return module.down_proj(product)

    return forward


def relevance(lens, hf, fact, rules, monkeypatch):
    """m dy/dm of every neuron at the last token, from Hugging Face's modules."""
    prompt, kept = lens.tokenize(fact)[0], {}
    names = [lens.backend_adapter.stored_name(i, "W_out") for i in range(lens.n_layers)]
    handles = []

    def keep(layer):
        def hook(_module, inputs):
            m = inputs[0].detach().requires_grad_() if not inputs[0].requires_grad else inputs[0]
            m.retain_grad()
            kept[layer] = m
            return (m,)

        return hook

    for layer, name in enumerate(names):
        module = hf.get_submodule(name.removesuffix(".weight"))
        handles.append(module.register_forward_pre_hook(keep(layer)))
    with rules_of(hf, rules, monkeypatch), torch.enable_grad():
        logits = hf(torch.tensor([prompt.ids])).logits[0, prompt.last]
        logits.log_softmax(-1)[lens.answer_ids(fact)[0]].backward()
    for handle in handles:
        handle.remove()
    rows = [kept[layer].reshape(len(prompt.ids), -1) for layer in range(lens.n_layers)]
    grads = [kept[layer].grad.reshape(len(prompt.ids), -1) for layer in range(lens.n_layers)]
    return torch.stack(
        [m[prompt.last] * g[prompt.last] for m, g in zip(rows, grads, strict=True)]
    ).detach()


def scores(lens, facts, **options):
    frame = qv.neuron_effects(lens, facts, None, **options).frame
    frame = frame.sort_values(["prompt", "layer", "neuron"])
    values = torch.tensor(frame["score"].to_numpy())
    return values.reshape(frame["prompt"].nunique(), lens.n_layers, -1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TINY)
def test_every_architecture_by_hugging_face(name, backend, true_float64, monkeypatch):
    lens, twin = lens_and_twin(name, backend)
    for rules in (RULES, *((rule,) for rule in RULES)):
        found = scores(lens, FACTS, method="relp", rules=rules)
        for fact, own in zip(FACTS, found, strict=True):
            wanted = relevance(lens, twin, fact, rules, monkeypatch)
            assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(own.to(wanted), wanted, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_models_of_the_papers_to_float64(kind, backend, true_float64, monkeypatch):
    """With rotary tables in float64 on both sides nothing is left but rounding."""
    lens, twin = tiny_lens(kind, backend), tiny_hf(kind)
    twin.config._attn_implementation = "eager"
    for fact, own in zip(FACTS, scores(lens, FACTS, method="relp"), strict=True):
        wanted = relevance(lens, twin, fact, RULES, monkeypatch)
        torch.testing.assert_close(own.to(wanted), wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind, monkeypatch):
    lens = tiny_lens(kind, dtype=torch.float32)
    twin = tiny_hf(kind, torch.float32)
    twin.config._attn_implementation = "eager"
    for fact, own in zip(FACTS, scores(lens, FACTS, method="relp"), strict=True):
        wanted = relevance(lens, twin, fact, RULES, monkeypatch)
        torch.testing.assert_close(own.to(wanted), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rules", [RULES, *(RULES[:i] + RULES[i + 1 :] for i in range(3))])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_relevance_is_conserved_where_all_four_rules_hold(rules, layer, backend, true_float64):
    """A model without biases, a target that is linear in the logits, the stream in front of a
    layer as the cut: relevance adds up to the target. Without one of the rules it does not (but for
    attention's: Qwen3 norms its queries and keys, so that a pattern's relevance adds up to 0)."""
    lens = tiny_lens("qwen3-gqa", backend)
    prompt = lens.tokenize(FACTS[1])[0]
    site = lens.backend_adapter.resid_pre(layer)
    cut: list[torch.Tensor] = []

    def leaf(x):
        cut.append(x.detach().requires_grad_())
        return cut[0]

    with torch.enable_grad():
        stream = lens.stream(
            [prompt.ids], lens.n_layers, [(site, leaf)], under=relp_hooks(lens, rules)
        )
        logits = read_out(lens, stream[0, prompt.last], rules)
        y = logits[3] - logits[7]
        y.backward()
    total = float((cut[0] * cut[0].grad).sum())
    if rules == RULES:
        assert total == pytest.approx(float(y), rel=1e-9)
    else:
        assert abs(total - float(y)) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pass_computes_what_it_always_does(backend):
    lens = tiny_lens("qwen3-gqa", backend)
    ids = [prompt.ids for prompt in lens.tokenize(FACTS)]
    plain = lens.stream(ids, lens.n_layers)
    changed = lens.stream(ids, lens.n_layers, under=relp_hooks(lens, RULES))
    assert torch.equal(plain, changed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_an_intervention_takes_out_passes_no_relevance(backend):
    """The rules act below an intervention: without the second layer's neurons, what the first
    layer's neurons reach through them has no part in their relevance."""
    lens = tiny_lens("gptj", backend)
    out = qv.NeuronSet.of([(1, neuron) for neuron in range(lens.d_mlp)])
    with lens.intervene(qv.Zero(out)):
        zeroed = scores(lens, FACTS, method="relp")
    with torch.no_grad():
        lens.w_out(1).zero_()
    written = scores(lens, FACTS, method="relp")
    torch.testing.assert_close(zeroed[:, 0], written[:, 0])
    torch.testing.assert_close(zeroed[:, 2], written[:, 2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "relp", "rules": ("norms",)}, "Rule of RelP"),
        ({"rules": ("norm",)}, "method='relp'"),
    ],
)
def test_rules_that_mean_nothing_are_refused(options, words):
    with pytest.raises(qv.QVLensError, match=words):
        qv.neuron_effects(tiny_lens("gptj"), FACTS, **options)
