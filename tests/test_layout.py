"""The layers of the package: who may import whom, what may import JAX, and what commands say."""

import ast
import subprocess
import sys

import pytest

from layouts import ROOT

PACKAGE = ROOT / "serkd_jax"
COMMANDS = (
    "main",
    "sweep",
    "systems",
    "compare",
    "records",
    "features",
    "pretrain",
    "export",
    "predict",
    "page",
)
# From the ground up; those in a row know nothing of each other, nor of what is above them.
LAYERS = [
    ("errors",),
    ("audio", "distributed", "losses"),
    ("files", "models"),
    ("config", "encoders", "data"),
    ("stages",),
    ("programs", "training", "results"),
    ("experiment",),
    ("deploy", "grid"),
    COMMANDS,
]
BESIDE = {("page", "predict")}  # which model it loads, by the same options


def layer_of(module):
    """The number of a module's layer, and its part of the package."""
    part = module.split(".")[1]
    return next(i for i, parts in enumerate(LAYERS) if part in parts), part


def imports(path):
    """The modules of the package that a file imports, also inside functions, less types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("serkd_jax"):
            for name in node.names:
                yield f"{node.module}.{name.name}" if node.module == "serkd_jax" else node.module


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_no_module_imports_upward(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module == "serkd_jax":
        return
    mine, part = layer_of(module)
    for imported in imports(path):
        if imported == "serkd_jax.__version__":
            continue
        theirs, other = layer_of(imported)
        assert theirs < mine or other == part or (part, other) in BESIDE, imported


def test_no_two_modules_have_the_same_name():
    names = [path.stem for path in PACKAGE.rglob("*.py") if path.stem not in ("__init__", "base")]
    repeated = {name for name in names if names.count(name) > 1}
    assert not repeated


def test_the_top_level_holds_the_commands_and_few_modules_else():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules - set(COMMANDS) == {
        "config", "errors", "experiment", "files", "grid", "losses", "programs", "training"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config=configs/demo.py", "--config.batchsize=3"], "Did you mean batch_size?"),
        (["--config=configs/demo.py", "--config.student.foo=3"], "--config.student.foo: the rec"),
        (["--config=configs/demo.py", "--config.batch_size=x"], "invalid literal for int()"),
        (["--config=configs/emodb.py:whispr"], "no preset 'whispr': use :logmel"),
        (["--config=configs/nope.py"], "No such file or directory: 'configs/nope.py'"),
        (["--config=configs/demo.py", "--workdri=x"], "Did you mean: workdir"),
        ([], "Flag --config must have a value"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_in_one_line(words, told, tmp_path):
    command = [sys.executable, "-m", "serkd_jax.main", f"--workdir={tmp_path}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert told in line
