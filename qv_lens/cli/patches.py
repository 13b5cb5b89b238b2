"""patch show, patch apply, patch export."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from qv_lens.cli.options import AS_IT_IS, Loading, Model, announce, check_new, loaded
from qv_lens.errors import PatchError

patch = App(name="patch", help="What an edit wrote: look at it, save the edited model, export it.")


@patch.command
def show(folder: Path) -> None:
    """What a patch changes, how it came about and how large it is.

    Parameters
    ----------
    folder
        What qv-lens edit --out wrote.
    """
    _check_there(folder)

    import qv_lens as qv

    stored = qv.Patch.load(folder)
    info = stored.info
    print(f"{info.get('method', 'a patch')} on {info.get('model', 'a model')}")
    for fact in info.get("facts", ()):
        print(f"  {fact['prompt'].replace('{}', fact['subject'])}: {fact['old']} -> {fact['new']}")
    for name, value in info.get("hyperparameters", {}).items():
        print(f"  {name} = {value}")
    print(stored.frame().round(4).to_string(index=False))


@patch.command
def apply(folder: Path, *, model: Model, out: Path, loading: Loading = AS_IT_IS) -> None:
    """Write the model with a patch applied, as a checkpoint that transformers alone loads.

    Parameters
    ----------
    folder
        What qv-lens edit --out wrote.
    out
        A folder for the edited model.
    """
    check_new("--out", out)
    _check_there(folder)
    announce(model)

    import qv_lens as qv

    stored = qv.Patch.load(folder)
    lens = loaded(model, loading)
    with lens.patched(stored):
        lens.save(out)
    print(out)


@patch.command
def export(folder: Path, *, out: Path) -> None:
    """Write a patch as a PEFT adapter of its model.

    Parameters
    ----------
    folder
        What qv-lens edit --out wrote.
    out
        A folder for the adapter.
    """
    check_new("--out", out)
    _check_there(folder)

    import qv_lens as qv

    print(qv.Patch.load(folder).to_lora(out))


def _check_there(folder: Path) -> None:
    """Raise `PatchError` for a folder that does not exist; what it holds is seen when it is read."""
    if not folder.exists():
        raise PatchError(f"There is no folder {folder}: name what qv-lens edit --out wrote.")
