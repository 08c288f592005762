"""The guides and the reference: they build, and what they say is so."""

import ast
import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import shlex
import subprocess
import sys
import types

import numpy as np
import pytest
import soundfile
import speechbrain
import tiny_speech
import torch
import yaml
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.utils.run_opts import RunOptions

import lgl_plugin
from lgl_plugin.cli.main import VERBS, build_parser
from lgl_plugin.cli.train import as_pairs, keys
from lgl_plugin.inference.export import export_checkpoint
from lgl_plugin.methods.method import Method
from lgl_plugin.nnet.gates import Gate
from lgl_plugin.runs.arguments import key_of
from lgl_plugin.runs.plain import plain_settings
from lgl_plugin.runs.settings import load_settings, read_preset
from lgl_plugin.training.session import Session

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


# Shown in the reference without an example: each needs a run.
NO_EXAMPLE = {
    *(
        f"methods.{name}"
        for name in (
            *("method.Method", "simclr.SimCLR", "moco.MoCo", "vicreg.VICReg"),
            *("vicreg.BarlowTwins", "simsiam.SimSiam", "dino.DINO"),
            *("sdpn.SDPN", "stage1.Stage1Brain"),
        )
    ),
    "methods.ssps.SSPSBrain",
    "report.build.try_to_write_report",
    "training.brain.SpeakerBrain",
    "training.fit.fit",
    "training.loss_gated.LossGatedBrain",
    "training.session.Session",
    "training.stage1.grouping",
    "training.stage1.score_baselines",
    "training.stage1.check_method",
    "training.stage1.stage1_modules",
    "training.stage1.train_stage1_phase",
    "training.stage2.Round",
    "training.start.check_inputs",
    "training.start.find_encoder",
    "training.start.check_trials",
}
# Methods that SpeechBrain or torch calls, with arguments of its own.
HOOKS = {
    "compute_forward",
    "compute_objectives",
    "evaluate_batch",
    "fit_batch",
    "init_optimizers",
    "on_stage_end",
    "on_stage_start",
    "update_average",
}
MODULES = {
    ".".join(path.relative_to(ROOT / "lgl_plugin").with_suffix("").parts): path
    for path in (ROOT / "lgl_plugin").rglob("*.py")
    if "recipe" not in path.relative_to(ROOT / "lgl_plugin").parts[:1]
}


def shown():
    """The names that the reference shows, without the package's."""
    for page in (DOCS / "api").glob("*.md"):
        listed = re.findall(
            r"automodule:: lgl_plugin\.([\w.]+)\n   :members: (.*)",
            page.read_text("utf-8"),
        )
        for module, names in listed:
            yield from (f"{module}.{name}" for name in names.split(", "))


def public(body):
    """The functions and classes of a module or class for others to use."""
    for node in body:
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        if named and not node.name.startswith("_"):
            yield node


def definitions():
    """All that is public in the package: (name, node), methods too."""
    for module, path in MODULES.items():
        for node in public(ast.parse(path.read_text("utf-8")).body):
            yield f"{module}.{node.name}", node
            if isinstance(node, ast.ClassDef):
                for method in public(node.body):
                    yield f"{module}.{node.name}.{method.name}", method
                for method in node.body:
                    if getattr(method, "name", "") in ("__init__", "__call__"):
                        yield f"{module}.{node.name}.{method.name}", method


def blocks(page, language):
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


def commands(page):
    """The yaml and the options of each command that trains."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(\w+)\.py (?:\w+/)*(\w+\.yaml)(.*)", line)
            if found:
                own = {
                    "gallery": {"minutes", "seeds", "methods", "jobs"},
                    "pretraining_study": {"data_folder", "further", "seeds"},
                }
                options = re.findall(r"\s--(\w+)", found[3])
                left = [o for o in options if o not in own.get(found[1], ())]
                yield found[2], left


def test_sphinx_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
        + ["-d", tmp_path / "doctrees", DOCS, tmp_path / "html"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "html" / "api" / "nnet.html").read_text("utf-8")
    # A section of SpeechBrain's form became a list of parameters.
    assert "Initial value of the learnable scale" in page
    assert "Arguments\n---------" not in page
    # And a table that the tutorial shows became one.
    page = (tmp_path / "html" / "tutorial.html").read_text("utf-8")
    assert "<p>log-mel statistics</p></td>" in page


def test_all_that_users_name_is_in_the_reference():
    """The names of yamls, examples, the tutorial and the guides, once each."""
    listed = list(shown())
    assert len(listed) == len(set(listed))
    # The recipe's, for signals and messages.
    messages = ("explained_errors", "logged_errors")
    named = {"utils.signals.stop", *(f"utils.errors.{m}" for m in messages)}
    texts = [
        *(ROOT / "hparams").glob("*.yaml"),
        *(ROOT / "examples").rglob("*.yaml"),
        *(ROOT / "examples").rglob("*.py"),
        ROOT / "recipes/VoxCeleb/LGL/train_lgl.py",
    ]
    text = "\n".join(path.read_text("utf-8") for path in texts)
    text += "\n".join("".join(cell["source"]) for cell in TUTORIAL["cells"])
    text += "\n".join(PAGES.values())
    tagged = r"!(?:new|name):lgl_plugin\.([\w.]+)"
    linked = r"\[`lgl_plugin\.([\w.]+)`\]\(api/"
    used = {*re.findall(tagged, text), *re.findall(linked, text)}
    used -= {name.rpartition(".")[0] for name in listed}  # modules
    imports = r"^ *from lgl_plugin\.([\w.]+) import (\([^)]*\)|.*)$"
    for module, names in re.findall(imports, text, re.M):
        for name in re.findall(r"\w+", names):
            if not name.isupper():  # a constant
                used.add(f"{module}.{name}")
    assert used - named <= set(listed)


def test_pages_link_as_a_repository_shows_them():
    """To files and headings; Sphinx's roles are no links on its page."""
    for page, text in PAGES.items():
        assert not re.search(r"\{(doc|ref|py:\w+)\}`", text), page
        for name, anchor in re.findall(r"\]\(([^)#:]*)#?([^)#:]*)\)", text):
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), (page, name)
            if anchor:
                heads = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.M)
                slugs = [re.sub(r"[^\w\- ]", "", one.lower()) for one in heads]
                assert anchor in [one.replace(" ", "-") for one in slugs], (
                    page,
                    anchor,
                )


def test_what_the_reference_shows_is_fully_documented():
    """Arguments, and an example that runs; a signature with types."""
    nodes = dict(definitions())
    without = set()
    for name in shown():
        text = ast.get_docstring(nodes[name]) or ""
        takes = nodes.get(f"{name}.__init__", nodes[name])
        arguments = [
            argument.arg
            for argument in getattr(takes, "args", ast.arguments([], [])).args
            if argument.arg != "self"
        ]
        head, _, section = text.partition("\nArguments\n---------\n")
        for argument in arguments:
            documented = rf"^(\w+, )*{argument}(, \w+)*( : |$)"
            # Of functions that take the same, one says what that is.
            if name not in NO_EXAMPLE and not re.search(
                "\nArguments and errors as of", text
            ):
                assert re.search(documented, section, re.M), (name, argument)
        if not re.search(r"^Example\n-------\n>>> ", text, re.M):
            without.add(name)
    assert without == NO_EXAMPLE


def test_all_that_is_public_has_a_docstring_and_types():
    """Functions, classes and methods; on arguments and what is returned."""
    bare, untyped = [], []
    for name, node in definitions():
        if not ast.get_docstring(node) and not name.endswith("__"):
            bare.append(name)
        if isinstance(node, ast.ClassDef) or node.name in HOOKS:
            continue
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        known = every[0].arg in ("self", "cls") if every else False
        every = every[known:] + [node.args.vararg, node.args.kwarg]
        typed = all(one is None or one.annotation for one in every)
        if not typed or not (node.returns or node.name == "__init__"):
            untyped.append(name)
    assert not bare
    assert not untyped


def test_docstrings_begin_with_the_thing_itself():
    """No riddle first: neither a question's word nor a clause."""
    riddles = "What|Which|Whether|Where|Lest|Those|As of"
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef
            text = isinstance(node, kinds) and ast.get_docstring(node)
            assert not re.match(rf"({riddles})\b", text or ""), (path, text)


@pytest.mark.parametrize("page", PAGES)
def test_options_in_commands_exist(page):
    """Each is a setting of that yaml, or one of SpeechBrain's."""
    general = {field.name for field in dataclasses.fields(RunOptions)}
    for name, options in commands(PAGES[page]):
        paths = [
            *ROOT.glob(f"hparams/{name}"),
            *ROOT.glob(f"examples/*/{name}"),
        ]
        if paths:  # not one of SpeechBrain's own recipes
            assert set(options) <= {*read_preset(paths[0]), *general}, name


def test_values_in_commands_are_accepted(tmp_path):
    """Those that train on one of the presets, and the recipe's table."""
    lines = [
        f"stage{1 if option.startswith('--method') else 2}.yaml {option}"
        for option in re.findall(
            r"^\| `(--.*?)` \|", PAGES["recipes/VoxCeleb/LGL/README.md"], re.M
        )
    ]
    for page in PAGES.values():
        for block in blocks(page, "bash"):
            block = block.replace("\\\n", " ")
            lines += re.findall(r"train_lgl.py hparams/(\w+.yaml.*)", block)
    tried = 0
    for line in lines:
        line = line.replace("cuda", "cpu")
        yaml, *options = shlex.split(line, comments=True)
        options = [
            option
            for option in options
            # Of folders and packages that are not here, and of variables.
            if not re.search(r"_folder|[$…]|^--(manifest|train_logger)", option)
        ]
        if "speech_model" in read_preset(ROOT / "hparams" / yaml):
            options = [o for o in options if "speech_model" not in o]
            model = tiny_speech.save(tmp_path / "speech_model")
            options.append(f"--speech_model={model}")
        arguments = [str(ROOT / "hparams" / yaml), *options]
        arguments += [f"--data_folder={tmp_path}", "--device=cpu"]
        path, run_opts, overrides = speechbrain.parse_arguments(arguments)
        load_settings(path, overrides, run_opts)
        tried += 1
    assert tried > 30


def test_the_lines_of_train_loggers_log_every_phase(tmp_path, monkeypatch):
    """Each line of the pages, by stand-ins of the loggers' large packages."""
    seen = []

    def add_scalar(tag, value, step):
        seen.append(tag.removesuffix("/train"))

    def log(figures, step=None):
        assert step is None  # W&B drops what is not beyond the last step
        seen.extend({**figures.pop("train"), **figures})

    def init(**options):
        assert options == {"project": "lgl", "id": "mine", "resume": "allow"}
        return types.SimpleNamespace(log=log)

    wandb = types.ModuleType("wandb")
    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    writer = types.SimpleNamespace(add_scalar=add_scalar)
    board = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    lines = re.findall(r"--train_logger='(.*)'", PAGES["docs/healthy.md"])
    assert len(lines) == 2
    for line in lines:
        seen.clear()
        overrides = f"data_folder: {tmp_path}\ntrain_logger: {line}"
        path = ROOT / "hparams" / "small_stage1.yaml"
        settings, _ = load_settings(path, overrides)
        session = types.SimpleNamespace(settings=settings)
        for phase in ("stage1", "iter1/gated"):
            Session.show(session, phase, {"epoch": 1, "loss": 3.0})
        assert sorted(seen) == [
            *("iter1/gated/epoch", "iter1/gated/loss"),
            *("stage1/epoch", "stage1/loss"),
        ]


def test_what_the_pages_name_exists():
    """Verbs of the command, classes of yamls, and paths of the repository."""
    for page, text in PAGES.items():
        for verb in re.findall(r"(?:^|`)lgl ([a-z]+)", text, re.M):
            assert verb in VERBS, (page, verb)
        for thing in re.findall(r"!(?:new|name):(lgl_plugin[\w.]+)", text):
            module, _, kind = thing.rpartition(".")
            assert hasattr(importlib.import_module(module), kind), thing
        path = r"(?:`| )((?:tests|lgl_plugin|hparams|docs)/[\w/]+\.\w+)"
        for name in re.findall(path, text):
            assert (ROOT / name).exists(), (page, name)
        assert not re.search(r"python -m lgl_plugin\.", text), page


PYTHON = [
    pytest.param(page, code, id=f"{page}-{number}")
    for page, text in PAGES.items()
    for number, code in enumerate(blocks(text, "python"))
]
# The gate of CONTRIBUTING stands in a module that has imported these.
ALREADY = {
    "CONTRIBUTING.md": {
        "Gate": Gate,
        "Method": Method,
        "math": math,
        "np": np,
    }
}
# A narrow encoder of the recipe's kind.
SETTINGS = """
stage: 1
sample_rate: 16000
new_encoder: !name:lgl_plugin.nnet.encoders.Encoder
    features: !name:speechbrain.lobes.features.Fbank {n_mels: 80}
    network: !name:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN
        input_size: 80
        channels: [8, 8, 8, 8, 24]
        lin_neurons: 192
"""


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    """The current folder has the runs and the audio that the pages name."""
    exported = tmp_path / "results" / "mine" / "export" / "iter1"
    torch.manual_seed(0)
    encoder = ECAPA_TDNN(80, channels=[8, 8, 8, 8, 24], lin_neurons=192)
    torch.save(encoder.state_dict(), tmp_path / "mine.ckpt")
    settings = plain_settings(SETTINGS)
    export_checkpoint(tmp_path / "mine.ckpt", settings, exported, 0.4)
    for name in ("one.wav", "other.wav"):
        noise = 0.1 * torch.randn(16000).numpy()
        soundfile.write(tmp_path / name, noise, 16000)
    run = tmp_path / "results" / "mine"
    collapsed = {"stage": 1, "phase": "simclr", "epoch": 1, "loss": 5.0}
    collapsed["mean_cosine"] = 0.999
    (run / "metrics.jsonl").write_text(json.dumps(collapsed) + "\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page, code", PYTHON)
def test_every_block_of_python_runs(page, code, readers_folder, capsys):
    """As it stands on the page."""
    names = dict(ALREADY.get(page, {}))
    exec(code, names)
    if "same" in names:
        score, threshold = names["score"].item(), 0.4
        assert names["same"].item() == (score > threshold)
    if "embedding" in names:
        assert names["embedding"].shape == (1, 1, 192)
    if page == "docs/gate.md":
        assert names["mask"].tolist() == [True, False, True]
        assert names["loss"] < 3.0
    if page == "docs/healthy.md":
        assert "collapsed" in capsys.readouterr().out
    if "Together" in names:
        views = torch.randn(2, 3, 4)
        method = names["Together"](None, 4, 3)
        loss, _ = method([views], [], torch.arange(3), 0.0)
        torch.testing.assert_close(loss, (views[0] - views[1]).pow(2).mean())
    if "MedianGate" in names:
        gate = names["MedianGate"]()
        gate.end_epoch(torch.arange(9.0))
        assert gate(torch.arange(9.0)).sum() == 5


def test_pages_that_show_how_to_use_an_encoder_are_among_them():
    tried = {param.values[0] for param in PYTHON}
    assert {"README.md", "docs/own_audio.md"} <= tried


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_well_formed(page):
    """Shell syntax, verbs and options of lgl, scripts, targets, and yaml."""
    for block in blocks(PAGES[page], "yaml"):
        yaml.compose(block)
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for block in blocks(PAGES[page], "bash"):
        done = subprocess.run(
            ["bash", "-n"], input=block, text=True, capture_output=True
        )
        assert done.returncode == 0, (block, done.stderr)
        for line in block.replace("\\\n", " ").splitlines():
            for target in re.findall(r"^(?:\S+ )?make ([\w-]+)", line):
                assert re.search(rf"^{target}:", makefile, re.M), line
            for script in re.findall(r"python (?:\S*/)?(\w+\.py)", line):
                known = script == "speaker_verification_cosine.py"
                assert known or any(
                    path.name == script
                    for wing in ("recipes", "examples", "benchmarks", "docs")
                    + ("tests",)
                    for path in (ROOT / wing).rglob("*.py")
                ), line
            if re.match(r"lgl (?!-)", line):
                parse_lgl(shlex.split(line, comments=True)[1:])


def parse_lgl(arguments):
    """Parses a command as `lgl` does; an unknown option or key fails."""
    options, rest = build_parser().parse_known_args(arguments)
    if "settings" in vars(options):
        # `lgl adapt` has no choice of presets.
        preset = vars(options).get("preset") or "small"
        known = set().union(*keys(preset))
        known |= {field.name for field in dataclasses.fields(RunOptions)}
        assert {key_of(pair) for pair in as_pairs(rest)} <= known, rest
    else:
        assert not rest, rest


def load_script(name):
    """Imports a script of docs/."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_drawn(tmp_path):
    """All that the page shows, and no other."""
    load_script("claims_figure").draw(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = re.findall(r"\]\(images/(.*?)\)", PAGES["docs/paper_claims.md"])
    assert sorted(drawn) == sorted(shown)


def test_no_image_is_left_over():
    shown = re.findall(r"\]\(images/(.*?)\)", "\n".join(PAGES.values()))
    assert {path.name for path in (DOCS / "images").iterdir()} == set(shown)


def test_the_chart_shows_what_the_table_says():
    script = load_script("claims_figure")
    phases, figures = script.table1(PAGES["docs/paper_claims.md"])
    assert phases[0] == "log-mel baseline" and len(phases) == 5
    assert list(figures) == ["synthetic", "AN4 sessions"]
    assert figures["synthetic"][-1] == (11.6, 9.8, 13.3)


def test_versions_agree():
    version = lgl_plugin.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == version
    newest = re.search(r"^## (.*)$", PAGES["CHANGELOG.md"], re.M)[1]
    assert version in newest
