"""The public names: what type checkers see is what is there, and each is what its home calls so."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import qv_lens as qv
from qv_lens.editing.editors import HOMES


def for_type_checkers() -> dict[str, str]:
    """Name -> module, from the imports that only type checkers run."""
    tree = ast.parse(Path(inspect.getfile(qv)).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            if alias.name == "*":
                found.update({name: f"qv_lens.{home}" for name, home in HOMES.items()})
            else:
                found[alias.asname or alias.name] = node.module
    return found


def test_both_lists_hold_the_same_names():
    homes = {name: f"qv_lens.{home}" for name, home in qv._HOME.items()} | {"plots": "qv_lens"}
    assert for_type_checkers() == homes
    assert set(qv.__all__) == set(homes)


def test_every_name_is_there():
    for name in qv.__all__:
        found = getattr(qv, name)
        assert found is not None
        assert name in dir(qv)
        if inspect.isclass(found) or inspect.isfunction(found):
            assert found.__doc__
            assert found.__name__ == qv._THERE.get(name, name)
