"""`docs/paper.md` names functions, tests and settings that exist, and no equation is left out."""

import ast
import re
from functools import cache, reduce

import pytest

from configs import common
from layouts import ROOT

PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")


@cache
def definitions(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("kind", ["test", "function"])
def test_every_name_on_the_page_is_defined_where_it_says(kind):
    pattern = r"`(tests/\w+\.py)::(\w+)`" if kind == "test" else r"`(serkd_jax/[\w/]+\.py):(\w+)`"
    named = re.findall(pattern, PAGE)
    assert len(named) > 15
    assert not [f"{path}: {name}" for path, name in named if name not in definitions(path)]


def test_every_equation_has_a_function_and_a_test():
    rows = re.findall(r"^\| ([\d, -]+) \|.*`serkd_jax/[^`]+`.*`tests/[^`]+`", PAGE, flags=re.M)
    found = set()
    for row in rows:
        first, *rest = (int(number) for number in re.findall(r"\d+", row))
        found |= set(range(first, (rest or [first])[-1] + 1))
    assert found == set(range(1, 16))


def test_every_setting_on_the_page_is_one_of_the_recipes():
    keys = set(re.findall(r"--config\.([\w.]+)=", PAGE)) - {"data_dir", "cache_dir"}
    assert len(keys) > 8
    for key in keys:
        reduce(getattr, key.split("."), common.paper())
