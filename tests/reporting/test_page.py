"""The study's page, opened in a real browser, at two widths and in both colours: real clicks and
keys, what is downloaded, what is left without scripts."""

from __future__ import annotations

import csv
import dataclasses
import shutil

import pytest

import qv_lens as qv
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from qv_lens.world.material import world_material

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
WIDE, NARROW = (1300, 900), (500, 900)


@pytest.fixture(scope="module")
def study():
    lens, world = qv.load("toy-gptj"), generator.build(0)
    fact = world_cases.facts(world, "P641")[0]
    new = next(sport for sport in world.entities["sport"] if sport != fact.answer)
    material = world_material(lens, fact, new)
    short = dataclasses.replace(
        material, texts=material.texts[:600]
    )  # C0 is not what the page is about
    return lens, qv.study(lens, fact, new, material=short, edits=1)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: the page is not opened")
    from playwright.sync_api import sync_playwright

    quiet = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(quiet))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(study, tmp_path_factory):
    return qv.report(study[1], tmp_path_factory.mktemp("page") / "study.html", "qv-lens demo")


@pytest.fixture
def opened(browser, file):
    """Opens the page, and says afterwards what the console told and what was requested."""
    contexts = []

    def at(size=WIDE, scheme="light", scripts=True):
        width, height = size
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            java_script_enabled=scripts,
            accept_downloads=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.told, page.asked = [], []
        page.on("console", lambda message: page.told.append(message.text))
        page.on("pageerror", lambda error: page.told.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(file.as_uri())
        return page

    yield at
    for context in contexts:
        context.close()


def scrolled(page):
    return page.evaluate("[scrollX, scrollY]")


@pytest.mark.parametrize("size", [WIDE, NARROW])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_requested_nothing_scrolls_sideways_everything_can_be_read(
    opened, file, size, scheme
):
    from axe_core_python.sync_playwright import Axe

    page = opened(size, scheme)
    page.wait_for_selector("#figure-edits .bars")
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.locator("#pathway-drawing .node").first.click()
    contrast = {"runOnly": {"type": "rule", "values": ["color-contrast"]}}
    options = None if scheme == "light" else contrast  # the other rules do not ask for colours
    found = Axe().run(page, options=options)["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    widths = page.eval_on_selector_all(
        ".figure", "all => all.map(e => [e.querySelector('.main-svg').clientWidth, e.clientWidth])"
    )
    assert all(drawn <= place for drawn, place in widths)
    assert page.told == []
    assert page.asked == [file.as_uri()]
    assert file.stat().st_size < 6e6


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_a_click_opens_the_card_and_moves_nothing(opened, size):
    page = opened(size)
    page.locator("#graph").scroll_into_view_if_needed()
    node = page.locator("#pathway-drawing .node").nth(3)
    name = node.get_attribute("data-node")
    node.scroll_into_view_if_needed()
    before = scrolled(page)
    node.click()
    card = page.locator(f'[id="neuron-{name}"]')
    assert card.is_visible()
    assert scrolled(page) == before
    drawing, beside = page.locator(".drawing").bounding_box(), card.bounding_box()
    if size == WIDE:
        assert beside["x"] >= drawing["x"] + drawing["width"]
        assert beside["y"] < size[1]
    else:  # with the pathway at the top of the screen nothing lies over it; further down it is gone
        page.eval_on_selector("#graph", "graph => graph.scrollIntoView()")
        drawing, below = page.locator(".drawing").bounding_box(), card.bounding_box()
        assert below["y"] >= drawing["y"] + drawing["height"]
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        assert card.bounding_box()["y"] < 0
        node.scroll_into_view_if_needed()
    assert "selected" in node.get_attribute("class")
    lit = page.eval_on_selector_all(
        "#pathway-drawing .lit", "all => all.map(e => [e.dataset.source, e.dataset.target])"
    )
    assert lit
    assert all(name in pair for pair in lit)
    card.locator(".close").click()
    assert not card.is_visible()
    assert page.locator("#pathway-drawing .selected").count() == 0


def test_the_keyboard_walks_through_the_pathway(opened):
    page = opened()
    page.locator("#graph").scroll_into_view_if_needed()
    page.locator("#pathway-drawing .node").first.focus()
    before = scrolled(page)
    page.keyboard.press("Enter")
    first = page.locator("#pathway-drawing .selected")
    y, name = float(first.get_attribute("data-y")), first.get_attribute("data-node")
    page.keyboard.press("ArrowUp")
    above = page.locator("#pathway-drawing .selected")
    assert float(above.get_attribute("data-y")) < y
    assert page.locator(f'[id="neuron-{above.get_attribute("data-node")}"]').is_visible()
    assert scrolled(page) == before
    page.keyboard.press("Escape")
    assert page.locator(".neuron.shown").count() == 0
    assert name


def test_edges_and_nodes_are_filtered(opened, study):
    page = opened()
    shown = "#pathway-drawing .edge:not(.gone)"
    page.locator("#least").fill("0")
    every = page.locator(shown).count()
    page.locator("#least").fill("0.5")
    shares = page.eval_on_selector_all(shown, "all => all.map(e => Number(e.dataset.share))")
    assert 0 < len(shares) < every
    assert min(shares) >= 0.5
    page.locator("#least").fill("0")
    page.locator(".role[value=query]").uncheck()
    roles = page.eval_on_selector_all(
        "#pathway-drawing .node:not(.gone)", "all => all.map(e => e.dataset.role)"
    )
    assert "query" not in roles
    assert "value" in roles
    page.locator(".role[value=query]").check()
    layers = sorted(set(study[1].nodes["layer"]))
    page.locator("#lowest").fill(str(layers[1]))
    left = page.eval_on_selector_all(
        "#pathway-drawing .node:not(.gone)", "all => all.map(e => Number(e.dataset.layer))"
    )
    assert sorted(set(left)) == layers[1:]


def test_tables_lead_to_nodes_and_cards_back_to_tables(opened):
    page = opened()
    link = page.locator("td a[data-node]").first
    name = link.get_attribute("data-node")
    link.click()
    assert page.locator(f'[id="neuron-{name}"]').is_visible()
    box = page.locator("#pathway-drawing").bounding_box()
    assert -50 < box["y"] < WIDE[1]
    page.locator(f'[id="neuron-{name}"] .rows a').first.click()
    target = page.evaluate("document.querySelector(':target').getBoundingClientRect().top")
    assert -1 <= target < WIDE[1]  # a browser rounds where it scrolls to


def test_pinned_nodes_are_copied_as_python(opened, study):
    page = opened()
    for place in (0, 2):
        page.locator("#pathway-drawing .node").nth(place).click()
        page.locator(".neuron.shown .pin").click()
    code = page.locator("#pinned-code").inner_text()
    pinned = eval(code, {"qv": qv})
    names = page.locator("#pinned").inner_text()
    assert len(pinned) == 2
    assert page.locator(".neuron:visible").count() == 2  # side by side, to be compared
    for layer, neuron in pinned.frame[["layer", "neuron"]].itertuples(index=False):
        assert f"f{layer}-{neuron}@" in names
    page.locator(".neuron.shown .close").click()  # a pinned card closes too
    assert page.locator(".neuron:visible").count() == 1
    assert page.locator("#pinned").inner_text() in names
    page.locator("#copy").click()
    page.locator("#pathway-drawing .node").nth(2).click()
    page.locator("#copy").focus()
    page.keyboard.press("Escape")  # wherever the focus is
    assert page.locator(".neuron.shown").count() == 0


@pytest.mark.parametrize(("size", "least"), [(WIDE, 10.5), (NARROW, 8.5)])
def test_names_in_the_pathway_can_be_read_and_none_lies_over_another(opened, size, least):
    page = opened(size)
    names = page.eval_on_selector_all(
        "#pathway-drawing .node text",
        """all => all.map(text => {
            const box = text.getBoundingClientRect();
            const scale = text.ownerSVGElement.getScreenCTM().a;
            return [parseFloat(getComputedStyle(text).fontSize) * scale, box.x, box.y, box.width, box.height];
        })""",
    )
    assert min(height for height, *_ in names) >= least
    boxes = [box for _, *box in names]
    for i, (x, y, width, height) in enumerate(boxes):
        for left, top, wide, _ in boxes[i + 1 :]:
            beside = left >= x + width - 1 or x >= left + wide - 1
            assert beside or abs(y - top) >= 0.75 * height


def test_tables_and_pictures_are_downloaded(opened, study, tmp_path):
    page = opened()

    def download(button):
        with page.expect_download() as got:
            page.get_by_role("button", name=button, exact=True).click()
        target = tmp_path / got.value.suggested_filename
        got.value.save_as(target)
        return target

    rows = list(csv.DictReader(download("Download the table value-neurons").open()))
    scores = study[1].value_tokens["score"]
    assert [float(row["direct, Eq. 9, nats"]) for row in rows] == pytest.approx(
        scores.tolist(), rel=1e-12
    )
    assert rows[0]["neuron"] == "f{layer}-{neuron}".format(**study[1].value_tokens.iloc[0])
    page.locator(".role[value=query]").uncheck()
    drawn = download("Download the pathway")
    assert drawn.read_text().startswith("<svg")
    assert "<svg" in download("Download the picture edits").read_text()
    page.get_by_text("What the model would say there, layer by layer").click()
    lens = list(csv.reader(download("Download the table logit-lens").open()))
    assert {len(row) for row in lens} == {len(study[1].tokens) + 1}
    alone = opened(scheme="dark")
    alone.goto(drawn.as_uri())  # by itself, the filters hold
    shown = alone.eval_on_selector_all(
        ".node", "all => all.filter(e => e.getBoundingClientRect().width).map(e => e.dataset.role)"
    )
    assert shown
    assert "query" not in shown


def test_pictures_are_downloaded_in_the_colours_of_paper(opened, tmp_path):
    page = opened(scheme="dark")
    page.wait_for_function("document.readyState === 'complete'")
    with page.expect_download() as got:
        page.get_by_role("button", name="Download the picture edits", exact=True).click()
    got.value.save_as(tmp_path / "edits.svg")
    picture = (tmp_path / "edits.svg").read_text()
    assert "rgb(29, 39, 51)" in picture  # the ink of a light page
    assert "rgb(230, 235, 240)" not in picture


def test_heads_are_looked_at_on_demand(opened, study):
    page = opened()
    page.get_by_text("Where the attention heads look").click()
    page.locator("#attention-layer").select_option("3")
    page.locator("#attention-head").select_option("1")
    shown = page.locator("#attention-strip small").all_inner_texts()
    table = study[1].attention
    wanted = table[(table["layer"] == 3) & (table["head"] == 1)]["weight"]
    assert [float(text.removesuffix("%")) for text in shown] == pytest.approx(
        (100 * wanted).tolist(), abs=0.06
    )
    assert wanted.sum() == pytest.approx(1.0, abs=1e-4)


def test_without_scripts_the_page_is_read_all_the_same(opened):
    page = opened(scripts=False)
    assert page.locator('.figure table[data-name="layers"]').is_visible()
    assert page.locator("#pathway-drawing .node").count() > 5
    name = page.locator("#pathway-drawing .node").first.get_attribute("data-node")
    page.locator("#pathway-drawing .node").first.click()
    assert page.locator(f'[id="neuron-{name}"]').is_visible()
    assert not page.locator(".filters").is_visible()


def test_the_logit_lens_ends_with_what_the_model_says(study):
    lens, found = study
    last = found.beliefs[found.beliefs["layer"] == lens.n_layers - 1].iloc[-1]
    logits = lens.next_token_logits(found.request.fact)[0].double().softmax(-1)
    assert last["promoted"][0] == lens.token_label(int(logits.argmax()))
    assert last["probability"] == pytest.approx(float(logits.max()), rel=1e-4)
    answer = lens.answer_ids(found.request.fact.text, found.request.fact.answer)[0]
    assert last["answer"] == pytest.approx(float(logits[answer]), rel=1e-4)


def test_without_its_neurons_the_model_goes_on_as_an_intervention_says(study):
    lens, found = study
    row = found.without.iloc[-1]
    assert (row.ranking, row.k) == ("gradient, in rounds of 5", 100)
    again = qv.neuron_effects(lens, found.request.fact, 100, rounds=20)
    with lens.intervene(qv.Zero(again)):
        assert lens.generate(found.request.fact.text, 10) == row.said


def test_steps_of_the_curve_name_the_neurons_that_went(study):
    steps = study[1].removal.query("prompt == 0 and ranking == 'Eq. 9'").sort_values("k")
    named = [name for went in steps["went"] for name in went.split(", ")]
    best = study[1].value.frame.head(int(steps["k"].max()))
    assert named == [f"f{row.layer}-{row.neuron}" for row in best.itertuples()]


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
