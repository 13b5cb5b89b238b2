"""Do the tests notice when the code is wrong? One small change at a time, and the changes that no
test noticed.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/mutants.py qv_lens/attribution --sample 130 --seed 0  # 30 minutes

1. A change: another operator, comparison, number or boolean, a condition turned round, an argument
   left out or exchanged with its neighbour, a statement left out. Not changed are types,
   decorators, the words of errors and progress bars, what makes no difference by nature (`SAME`),
   and strings: a changed one is nearly always an unknown name, which fails at once and would
   flatter the figure.
2. A sample of all changes, drawn by `--seed`.
3. Each goes into a temporary copy of the package. A fork of this process, which has imported torch,
   transformers and pytest but not the package, runs the tests there until the first one fails. A
   change is noticed if a test fails, or if the tests take half as long again as without it.
4. Printed are the changes that nothing noticed, as they are found, and their share. Those that make
   no difference to any result count as unnoticed too.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest
import torch
import transformer_lens  # noqa: F401
from transformers import AutoTokenizer, GPTJForCausalLM, Qwen3ForCausalLM  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
SUITES = {
    "attribution": ("attribution", "bad_input"),
    "editing": ("editing", "oracle", "bad_input"),
}
#: quick tests that look closely at a file, before the slower ones that name it
CLOSE = {
    "closed_form": ("by_hand",), "layer_by_layer": ("by_hand",), "targets": ("by_hand",), "keys": ("by_hand",), "solve": ("by_hand",),
    "fine_tuning": ("trained_by_hand",), "ctp": ("trained_by_hand",), "kn": ("trained_by_hand",), "statistics": ("habits",), "edit": ("habits", "by_hand"),
}  # fmt: skip
#: tests that start processes of their own take too long here: what they alone notice counts as
#: unnoticed
SLOW = "not command_line and not kills"
SWAPS = {
    "Add": "Sub", "Sub": "Add", "Mult": "Div", "Div": "Mult", "FloorDiv": "Mult", "Mod": "FloorDiv", "Pow": "Mult",
    "MatMult": "Mult", "LShift": "RShift", "BitOr": "BitAnd", "BitAnd": "BitOr", "Lt": "LtE", "LtE": "Lt",
    "Gt": "GtE", "GtE": "Gt", "Eq": "NotEq", "NotEq": "Eq", "Is": "IsNot", "IsNot": "Is", "In": "NotIn", "NotIn": "In",
    "And": "Or", "Or": "And", "min": "max", "max": "min", "any": "all", "all": "any",
}  # fmt: skip
WORDS = ("tqdm", "unknown", "Literal", "Callable", "isinstance")
UNCHANGED = ("annotation", "returns", "decorator_list", "exc", "bases")
#: changes that make no difference: zip's check; the one device here; torch sorts stably on a CPU,
#: asked or not; how much is computed at a time (tests set that themselves); from where on another
#: way leads to the same number, and its margin
SAME = (
    "strict", "device", "stable", "CPU_TILE", "GPU_TILE", "CHUNK", "ROWS", "TOGETHER", "together", "wave", "SAFE", "CANCELS",
    "SLACK",
)  # fmt: skip
#: a node, one of its fields, what that becomes, and the line
Change = tuple[ast.AST, str, object, int]


def changes(node: ast.AST, line: int = 0) -> Iterator[Change]:
    """Every single change of a tree, in a fixed order."""
    line = getattr(node, "lineno", line)
    targets = [
        name_of(part) for target in getattr(node, "targets", []) for part in ast.walk(target)
    ]
    words = name_of(getattr(node, "func", getattr(node, "value", None))) in WORDS
    if words or not set(SAME).isdisjoint([getattr(node, "arg", None), *targets]):
        return
    for field, value in (*of_expression(node), *of_call(node), *of_statements(node)):
        yield node, field, value, line
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and field not in UNCHANGED:
                yield from changes(child, line)


def name_of(node: object) -> str:
    """The last name of `a.b.name`."""
    return getattr(node, "attr", getattr(node, "id", ""))


def of_expression(node: ast.AST) -> Iterator[tuple[str, object]]:
    operators = getattr(node, "ops", [getattr(node, "op", None)])
    for i, operator in enumerate(operators):
        swapped = SWAPS.get(type(operator).__name__)
        if swapped:
            other = getattr(ast, swapped)()
            yield (
                ("ops", [*operators[:i], other, *operators[i + 1 :]])
                if isinstance(node, ast.Compare)
                else ("op", other)
            )
    if isinstance(operators[0], ast.USub) and not isinstance(
        getattr(node.operand, "value", None), int
    ):
        yield "op", ast.UAdd()  # -1 is one number, and changed as such
    for field in ("test", "operand"):
        condition = getattr(node, field, None)
        if isinstance(condition, (ast.Name, ast.Call, ast.Attribute)):
            yield field, ast.UnaryOp(ast.Not(), condition)
    value = getattr(node, "value", None)
    if isinstance(value, (bool, int, float)):
        yield (
            "value",
            not value
            if isinstance(value, bool)
            else value + 1
            if value == int(value)
            else value * 2,
        )


def of_call(node: ast.AST) -> Iterator[tuple[str, object]]:
    if not isinstance(node, ast.Call):
        return
    opposite = SWAPS.get(name_of(node.func))
    if opposite:
        yield (
            "func",
            ast.Attribute(node.func.value, opposite)
            if isinstance(node.func, ast.Attribute)
            else ast.Name(opposite),
        )
    for i, keyword in enumerate(node.keywords):
        if keyword.arg not in SAME:
            yield "keywords", node.keywords[:i] + node.keywords[i + 1 :]
    if node.args and isinstance(node.func, ast.Attribute):
        yield "args", node.args[:-1]
    for i in range(0 if opposite else len(node.args) - 1):
        first, second = node.args[i : i + 2]
        if type(first) is type(second) and ast.dump(first) != ast.dump(second):
            yield "args", [*node.args[:i], second, first, *node.args[i + 2 :]]


def of_statements(node: ast.AST) -> Iterator[tuple[str, object]]:
    """Without a call made for its effect, a refusal, a write into something, a second value of a
    name."""
    for field in ("body", "orelse"):
        block = getattr(node, field, None)
        for i, statement in enumerate(block if isinstance(block, list) else []):
            effect = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            target = statement.targets[0] if isinstance(statement, ast.Assign) else None
            read = [
                part.id
                for part in ast.walk(statement)
                if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)
            ]
            again = isinstance(target, ast.Name) and target.id in read
            written = again or isinstance(target, (ast.Subscript, ast.Attribute))
            if (
                effect
                or written
                or isinstance(statement, (ast.AugAssign, ast.Raise, ast.Continue, ast.Break))
            ):
                yield field, [*block[:i], ast.Pass(), *block[i + 1 :]]


def mutant(source: str, index: int) -> tuple[str, str]:
    """The text with one change, and in words which one."""
    tree = ast.parse(source)
    node, field, value, line = list(changes(tree))[index]
    before = ast.unparse(tree).splitlines()
    setattr(node, field, value)
    after = ast.unparse(ast.fix_missing_locations(tree)).splitlines()
    old, new = next((a.strip(), b.strip()) for a, b in zip(before, after, strict=False) if a != b)
    where = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
    start = max(0, where - 50)
    return "\n".join(
        after
    ) + "\n", f"{line}\n    {old[start : start + 110]}\n    {new[start : start + 110]}"


def tests_of(file: Path) -> list[str]:
    """The test files: first the one of the same name and those that look closely, then by how often
    they name what the file defines."""
    if file.stem == "kernel":  # which runs on a GPU alone, and in a test of its own
        return ["tests/attribution/test_kernel.py"]
    names = [
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]
    tests = [
        test
        for suite in SUITES[file.parent.name]
        for test in (ROOT / "tests" / suite).glob("test_*.py")
    ]
    tests = sorted(test for test in tests if test.stem != "test_kernel")
    first = [f"test_{name}" for name in (file.stem, *CLOSE.get(file.stem, ()))]
    tests.sort(key=lambda test: (test.stem not in first, -sum(map(test.read_text().count, names))))
    return [str(test.relative_to(ROOT)) for test in tests]


def passes(room: Path, tests: list[str], seconds: int = 3600) -> bool:
    """Whether the tests pass on the package in the room, within this much of the processor's
    time."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        with contextlib.suppress(ProcessLookupError):  # nothing is left, as a rule
            os.killpg(child, signal.SIGKILL)
        return status == 0
    os.setpgrp()  # with the processes that tests start
    signal.alarm(3600)  # ends the process, and so does:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    os.chdir(room)
    sys.path.insert(0, str(room))
    sys.dont_write_bytecode = True
    os.environ["PYTHONPATH"] = str(room)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    import qv_lens

    copied = Path(qv_lens.__file__).is_relative_to(room)
    os._exit(
        not copied
        or any(
            pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-k", SLOW, test]) for test in tests
        )
    )


def furnish(room: Path) -> None:
    """Copy the package and its tests; what they read is linked to."""
    for name in ("qv_lens", "tests"):
        shutil.copytree(
            ROOT / name, room / name, ignore=shutil.ignore_patterns("__pycache__", "weights")
        )
    compileall.compile_dir(room, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    shutil.copy(ROOT / "pyproject.toml", room)
    (room / "qv_lens/world/weights").symlink_to(ROOT / "qv_lens/world/weights")
    (room / "experiments").symlink_to(ROOT / "experiments")
    (room.parent / "shared").symlink_to(ROOT.parent / "shared")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "path", type=Path, help="qv_lens/attribution, qv_lens/editing, or a file of one of them"
    )
    parser.add_argument("--sample", type=int, default=130)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a fork inherits no threads
    path = arguments.path.resolve()
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    places = [
        (file, i) for file in files for i, _ in enumerate(changes(ast.parse(file.read_text())))
    ]
    sample = random.Random(arguments.seed).sample(places, min(arguments.sample, len(places)))
    print(f"{len(places)} changes are possible, {len(sample)} are tried", flush=True)
    room = Path(tempfile.mkdtemp()) / "checkout"
    furnish(room)
    every = tests_of(files[0])
    if not passes(room, every):
        sys.exit(f"The tests fail without any change: python -m pytest -x {' '.join(every)}")
    limit = 30 + int(1.5 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime)
    survivors = 0
    for tried, (file, i) in enumerate(sample, 1):
        text, words = mutant(file.read_text(), i)
        (room / file.relative_to(ROOT)).write_text(text)
        if passes(room, tests_of(file), limit):
            survivors += 1
            print(f"not noticed: {file.relative_to(ROOT)}:{words}", flush=True)
        shutil.copy(file, room / file.relative_to(ROOT))
        if tried % 10 == 0 or tried == len(sample):
            print(f"{tried} tried, {survivors} not noticed ({survivors / tried:.1%})", flush=True)
    if not passes(room, every):
        sys.exit(
            "The tests now fail without any change, for a reason of this machine's: the figure "
            "means nothing."
        )
    shutil.rmtree(room.parent)


if __name__ == "__main__":
    main()
