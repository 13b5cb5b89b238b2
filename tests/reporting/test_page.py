"""The study's page, opened in a real browser: no console errors, nothing fetched, a click on a
neuron shows its card."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess

import pytest

import qv_lens as qv
from qv_lens.world import cases as world_cases
from qv_lens.world import generator

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
WATCH = """<script>window.failures=[];addEventListener('error',e=>failures.push(e.message));
const old=console.error;console.error=(...a)=>{failures.push(a.join(' '));old(...a)};</script>"""
CLICK = """<script>addEventListener('load',()=>setTimeout(()=>{
const link=document.querySelector('#pathway a'), id=link.getAttribute('href').slice(1), card=document.getElementById(id);
const shown=()=>getComputedStyle(card).display;
const before=shown(); link.dispatchEvent(new MouseEvent('click',{bubbles:true,cancelable:true}));
setTimeout(()=>{const found={before,after:shown(),failures,fetched:performance.getEntriesByType('resource').map(e=>e.name),
figures:document.querySelectorAll('.plotly-graph-div svg').length};
document.body.innerHTML='<pre id=result>'+JSON.stringify(found)+'</pre>'},300)},1500))</script>"""


@pytest.fixture(scope="module")
def study():
    lens, world = qv.load("toy-gptj"), generator.build(0)
    fact = world_cases.facts(world, "P641")[0]
    new = next(sport for sport in world.entities["sport"] if sport != fact.answer)
    return lens, qv.study(lens, fact, new, edits=1)


def test_the_page_in_a_browser(study, tmp_path):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page is not opened")
    page = qv.report(study[1], tmp_path / "study.html").read_text()
    assert len(page) < 6e6
    assert page.count("<noscript>") == 5
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    watched = tmp_path / "watched.html"
    watched.write_text(
        page.replace("<style>", WATCH + "<style>", 1).replace("</body>", CLICK + "</body>")
    )
    options = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        "--disable-component-update"
    )
    command = [
        CHROMIUM,
        *options.split(),
        f"--user-data-dir={tmp_path / 'chr'}",
        "--virtual-time-budget=12000",
        "--dump-dom",
        watched.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    got = json.loads(found.group(1).replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert (got["before"], got["after"]) == ("none", "block")
    assert got["failures"] == got["fetched"] == []
    assert got["figures"] >= 4


def test_cards_tell_what_an_intervention_measures(study):
    lens, found = study
    node = found.nodes.loc[found.nodes["effect"].abs().idxmax()]
    row = lens.w_out(int(node.layer))[int(node.neuron)].clone()
    fact = found.request.fact
    clean = lens.logprob(fact)
    lens.w_out(int(node.layer))[int(node.neuron)] = 0.0  # the weights, not a hook
    zeroed = lens.logprob(fact)
    lens.w_out(int(node.layer))[int(node.neuron)] = row
    assert node.effect == pytest.approx(zeroed - clean, abs=1e-5)
    assert set(found.probes["kind"]) >= {"the fact", "must stay"}
    assert (
        found.tokens["token"].tolist()
        == found.tokens_after["token"].tolist()
        == lens.str_tokens(fact)
    )
    whole = qv.layer_scores(lens, fact, "ffn", "layer_vector")["score"].max()
    # the strip of "before"; "after" is another model
    assert found.tokens["ffn"].iloc[-1] == pytest.approx(whole, rel=1e-3)
    assert found.tokens_after["ffn"].iloc[-1] != pytest.approx(whole, rel=1e-2)


def test_what_a_user_wrote_is_escaped(study, tmp_path):
    evil = "<script>alert(1)</script>"
    request = found = study[1].request
    request = dataclasses.replace(
        found, fact=dataclasses.replace(found.fact, subject=evil), new=evil
    )
    tokens = study[1].tokens.assign(token=evil)
    page = qv.report(
        dataclasses.replace(study[1], request=request, tokens=tokens), tmp_path / "evil.html", evil
    ).read_text()
    assert evil not in page
