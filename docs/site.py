"""Pages of the documentation that come from the code and the committed results, for mkdocs.

1. A page for each editor: its docstring (formula and source), its presets, what it cost and reached
   on SmolLM2-135M.
2. The API: every public name of the package, by room.
3. The gallery: every committed figure. The ledger, both comparisons, the benchmarks and
   CONTRIBUTING.md as pages.
4. A link that leaves docs/ leads to such a page, or becomes plain text."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import griffe
import pandas as pd
from mkdocs.structure.files import File

from qv_lens import _HOME
from qv_lens.editing.editors import HOMES, VARIANTS

ROOT = Path(__file__).parents[1]
SETTINGS = ROOT / "qv_lens" / "editing" / "settings"
#: pages made of files outside docs/
OUTSIDE = {
    "experiments/LEDGER.md": "measured/ledger.md",
    "experiments/COMPARISON.md": "measured/comparison.md",
    "experiments/SCORES.md": "measured/scores.md",
    "benchmarks/RESULTS.md": "measured/benchmarks.md",
    "CONTRIBUTING.md": "contributing.md",
}
ROOMS = {
    "facts": "Facts and benchmarks",
    "neurons": "Sets of neurons",
    "models": "Models and interventions",
    "attribution": "Attribution",
    "editing": "Editing",
    "evaluation": "Evaluation",
    "runs": "Experiments",
    "": "Studies and pages",
}
#: columns of an editor's results
MEASURES = {
    "efficacy_acc": "efficacy",
    "efficacy_gen": "says the new answer",
    "paraphrase_acc": "in other words",
    "specificity_acc": "neighbours right",
}


def on_files(files, config):
    """Add the pages that are made here."""
    reached = results()
    made = {
        "editors/index.md": editors_page(reached),
        "gallery.md": gallery(),
        "api/index.md": api(),
    }
    made |= {f"editors/{name}.md": editor_page(name, reached) for name in (*HOMES, *VARIANTS)}
    made |= {page: (ROOT / source).read_text(encoding="utf-8") for source, page in OUTSIDE.items()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    for figure in figures():
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that leave docs/ lead to the page made of their file, or are plain text."""
    here = Path(page.file.src_uri)
    source = next(
        (Path(s) for s, made in OUTSIDE.items() if made == str(here)), Path("docs") / here
    )

    def led(match: re.Match[str]) -> str:
        shown, target, anchor = match.group(1), match.group(2), match.group(3) or ""
        if "://" in target or target.startswith("#"):
            return match.group(0)
        wanted = (ROOT / source.parent / target).resolve()
        inside = wanted.relative_to(ROOT).as_posix() if wanted.is_relative_to(ROOT) else ""
        if inside.startswith("figures/"):
            inside = f"docs/{inside}"
        to = OUTSIDE.get(inside) or (
            inside.removeprefix("docs/") if inside.startswith("docs/") else ""
        )
        if not to or files.get_file_from_path(to) is None:
            return "" if match.group(0).startswith("!") else shown
        return f"{match.group(0).split('](')[0]}]({'../' * (len(here.parts) - 1)}{to}{anchor})"

    return re.sub(r"!?\[([^\]]*)\]\(([^)#\s]*)(#[^)]*)?\)", led, markdown)


def figures() -> list[Path]:
    """The committed figures, and the script that they share."""
    return [f for f in sorted((ROOT / "figures").iterdir()) if f.name != "demo.html"]


def gallery() -> str:
    """Every figure of a real model, drawn as it is on the page."""
    parts = [
        "# Gallery",
        "Drawn from the committed results of `experiments/results/`; every figure that was run on a real model.",
    ]
    for figure in figures():
        if figure.suffix == ".html":
            drawn = figure.read_text(encoding="utf-8")
            titles = re.findall(r'"text":"([^":]+): ([^"]*)"', drawn)
            named = (f"{what}, {model}" for model, what in titles if figure.stem.endswith(model))
            title = next(named, figure.stem)
            heights = re.findall(r'"height":(\d+)', drawn)
            parts.append(
                f'## {title}\n\n<iframe src="../figures/{figure.name}" title="{title}" width="100%" '
                f'height="{max(map(int, heights)) + 20}" loading="lazy" style="border:0"></iframe>'
            )
    return "\n\n".join(parts)


def results() -> pd.DataFrame:
    """Means by editor of the single edits of 100 CounterFact facts on SmolLM2-135M."""
    rows = pd.read_parquet(ROOT / "experiments" / "results" / "single.parquet")
    rows = rows[(rows["model"] == "smollm2-135m") & (rows["data"] == "counterfact")]
    means = rows.groupby(["method", "metric"])["after"].mean().unstack("metric")
    seconds = rows.drop_duplicates(["method", "case"]).groupby("method")["seconds"].median()
    return means.assign(seconds=seconds)


def editors_page(reached: pd.DataFrame) -> str:
    """All editors with what they reached."""
    about = "Each is a frozen dataclass; `qv.presets(model)[name].editor` is its preset. Measured: one edit at a time of 100 CounterFact facts that SmolLM2-135M knows, tuned settings, one thread ([all metrics](../measured/comparison.md)). A dash: not measured on a real model yet."
    table = [
        f"| editor | {' | '.join(MEASURES.values())} | seconds |",
        "|---|" + "---|" * (len(MEASURES) + 1),
    ]
    for name in (*HOMES, *VARIANTS):
        table.append(f"| [{name}]({name}.md) | {' | '.join(_reached(reached, name))} |")
    return "\n\n".join(["# Editors", about, "\n".join(table)])


def _reached(reached: pd.DataFrame, name: str) -> list[str]:
    if name not in reached.index:
        return ["–"] * (len(MEASURES) + 1)
    row = reached.loc[name]
    return [f"{100 * row[metric]:.0f}%" for metric in MEASURES] + [f"{row['seconds']:.1f}"]


def editor_page(name: str, reached: pd.DataFrame) -> str:
    """Formula and source, what it reached, presets by model."""
    family = name.split(".")[0]
    figures = _reached(reached, name)
    measured = (
        "Not measured on a real model yet."
        if figures[0] == "–"
        else "On 100 CounterFact facts that SmolLM2-135M knows, one at a time: "
        + ", ".join(
            f"{told} {value}" for told, value in zip(MEASURES.values(), figures, strict=False)
        )
        + f"; {figures[-1]} seconds an edit (median, one thread)."
    )
    home = f"qv_lens.{HOMES[family]}"
    parts = [
        f"# {name}",
        measured,
        f"::: {home}.{family}\n    options: {{inherited_members: true}}",
        f"## Steps and equations\n\n::: {home}\n    options: {{members: false, show_root_heading: false}}",
        "## Presets",
    ]
    for file in sorted(SETTINGS.glob("*.toml")):
        entry = tomllib.loads(file.read_text(encoding="utf-8")).get(name)
        if entry:
            settings = "\n".join(f"{key} = {value!r}" for key, value in entry["settings"].items())
            parts.append(f"**{file.stem}**: {entry['source']}\n\n```python\n{settings}\n```")
    return "\n\n".join(parts)


def api() -> str:
    """Every public name, by room."""
    parts = [
        "# API",
        "What `import qv_lens as qv` offers. `qv.plots` draws; the command line is `qv-lens --help`.",
    ]
    rest = dict(_HOME)
    for room, title in ROOMS.items():
        mine = {
            n: h
            for n, h in rest.items()
            if (h.split(".")[0] == room or not room) and n not in HOMES
        }
        parts.append(f"## {title}")
        parts += [
            f"::: qv_lens.{home}.{name}\n    options: {{heading_level: 3}}"
            for name, home in mine.items()
        ]
        rest = {name: home for name, home in rest.items() if name not in mine}
    parts.append("## Figures")
    parts.append("::: qv_lens.plots\n    options: {heading_level: 3, show_root_heading: false}")
    return "\n\n".join(parts)


class Examples(griffe.Extension):
    """Examples of docstrings as code."""

    def on_instance(self, *, obj, **_):
        if obj.docstring is None or ">>>" not in obj.docstring.value:
            return
        blocks = re.split(r"\n\n", obj.docstring.value)
        obj.docstring.value = "\n\n".join(
            f"```pycon\n{block}\n```" if block.startswith(">>>") else block for block in blocks
        )
