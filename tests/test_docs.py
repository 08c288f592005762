"""The guides and the reference: they build, and what they say is so."""

import ast
import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from speechbrain.utils.run_opts import RunOptions

from lgl_plugin.nnet.gates import Gate

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text("utf-8")
    for path in [
        *DOCS.glob("*.md"),
        *ROOT.glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        ROOT / "recipes" / "VoxCeleb" / "LGL" / "README.md",
    ]
}
# Of the tutorial its prose; its cells are run by tests/integration.
TUTORIAL = json.loads((DOCS / "tutorial.ipynb").read_text("utf-8"))
PAGES["docs/tutorial.ipynb"] = "\n".join(
    "".join(cell["source"])
    for cell in TUTORIAL["cells"]
    if cell["cell_type"] == "markdown"
)


# Public, and without an example.
NO_EXAMPLE = {
    # Those that need a whole run.
    "brains.LossGatedBrain",
    "brains.SimCLRBrain",
    "brains.SpeakerBrain",
    "export.TrainedStep",
    "export.export",
    "export.read_trained_step",
    "iterations.Iteration",
    "iterations.hand_over",
    "iterations.train_stage1",
    "iterations.train_stage2",
    "training.Training",
    # Command lines, which pass on to what has one or is named above.
    "export.main",
    "synthetic.main",
    "verify.main",
}


def public(body):
    """The functions and classes of a module or class that it documents."""
    for node in body:
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if named and not node.name.startswith("_"):
            yield node


def blocks(page, language):
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def commands(page):
    """The yaml and the options of each command that trains."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"\.py (?:\w+/)*(\w+\.yaml)(.*)", line)
            if found:
                yield found[1], re.findall(r"\s--(\w+)", found[2])


def test_sphinx_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
        + ["-d", tmp_path / "doctrees", DOCS, tmp_path / "html"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "html" / "api" / "pieces.html").read_text("utf-8")
    # A section of SpeechBrain's form became a list of parameters.
    assert "Initial value of the learnable scale" in page
    assert "Arguments\n---------" not in page
    # And a table that the tutorial shows became one.
    page = (tmp_path / "html" / "tutorial.html").read_text("utf-8")
    assert "<p>log-mel statistics</p></td>" in page


def test_every_module_is_in_the_reference():
    """Once."""
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    listed = re.findall(r"automodule:: lgl_plugin\.(\w+)", text)
    modules = {path.stem for path in (ROOT / "lgl_plugin").glob("*.py")}
    assert sorted(listed) == sorted(modules - {"__init__"})


def test_all_that_is_public_is_documented():
    """Methods too; functions and classes with an example that runs."""
    bare, without = [], set()
    for path in (ROOT / "lgl_plugin").glob("*.py"):
        for node in public(ast.parse(path.read_text("utf-8")).body):
            name = f"{path.stem}.{node.name}"
            inside = node.body if isinstance(node, ast.ClassDef) else []
            for one in [node, *public(inside)]:
                if not ast.get_docstring(one):
                    bare.append(f"{name}, line {one.lineno}")
            example = r"^Example\n-------\n>>> "
            if not re.search(example, ast.get_docstring(node) or "", re.M):
                without.add(name)
    assert not bare
    assert without == NO_EXAMPLE


def test_the_map_of_the_house_is_so():
    """Every module is on it, once, and imports run downwards."""
    rows = re.findall(r"^\| \w+ \| (`.*?) \|", PAGES["CONTRIBUTING.md"], re.M)
    floors = [re.findall(r"`(\w+)`", row) for row in rows]
    floor = {name: n for n, names in enumerate(floors) for name in names}
    paths = {path.stem: path for path in (ROOT / "lgl_plugin").glob("*.py")}
    del paths["__init__"]
    listed = [name for names in floors for name in names]
    assert sorted(listed) == sorted([*paths, "hparams"])
    for name, path in paths.items():
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                package, _, module = node.module.partition(".")
                wanted = [module] if module else [a.name for a in node.names]
                for other in wanted if package == "lgl_plugin" else ():
                    assert floor[name] <= floor[other], (name, other)


@pytest.mark.parametrize("page", PAGES)
def test_options_in_commands_exist(page):
    """Each is a key of that yaml, or one of SpeechBrain's."""
    general = {field.name for field in dataclasses.fields(RunOptions)}
    for name, options in commands(PAGES[page]):
        paths = [
            *ROOT.glob(f"hparams/{name}"),
            *ROOT.glob(f"examples/*/{name}"),
        ]
        if paths:  # not one of SpeechBrain's own recipes
            keys = re.findall(r"^(\w+):", paths[0].read_text("utf-8"), re.M)
            assert set(options) <= {*keys, *general}, name


@pytest.mark.parametrize("page", PAGES)
def test_modules_in_commands_exist(page):
    for module in re.findall(r"python -m (lgl_plugin\.\w+)", PAGES[page]):
        assert importlib.util.find_spec(module), module
    for thing in re.findall(r"!(?:new|name):(lgl_plugin[\w.]+)", PAGES[page]):
        module, _, kind = thing.rpartition(".")
        assert hasattr(importlib.import_module(module), kind), thing


def test_code_of_the_guide_to_the_gate_runs():
    (code,) = blocks(PAGES["docs/gate.md"], "python")
    names = {}
    exec(code, names)
    assert names["mask"].tolist() == [True, False, True]
    assert names["loss"] < 3.0


def test_the_gate_of_contributing_works():
    (code,) = blocks(PAGES["CONTRIBUTING.md"], "python")
    names = {"Gate": Gate, "math": math, "np": np}
    exec(code, names)
    gate = names["MedianGate"]()
    gate.end_epoch(torch.arange(9.0))
    assert gate(torch.arange(9.0)).sum() == 5


def test_reference_curves_are_drawn(tmp_path):
    """All that the page shows, and no other."""
    spec = importlib.util.spec_from_file_location(
        "reference_curves", DOCS / "reference_curves.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.draw(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = re.findall(r"\]\(images/(.*?)\)", PAGES["docs/healthy.md"])
    assert sorted(drawn) == sorted(shown)
    assert drawn == {path.name for path in (DOCS / "images").iterdir()}


def test_versions_agree():
    version = re.search(r'version="(.+)"', (ROOT / "setup.py").read_text())[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == version
    newest = re.search(r"^## (.*)$", PAGES["CHANGELOG.md"], re.M)[1]
    assert version in newest
