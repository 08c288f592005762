"""The start of Stage II: finds and checks its first encoder and trials."""

import pathlib
import re
import shlex
from collections.abc import Callable

import torch
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.audio import BadAudio, read_beginning
from lgl_plugin.dataio.given import read_given
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.inference.extractor import MAX_SECONDS
from lgl_plugin.nnet.anchor import Anchor
from lgl_plugin.nnet.encoders import Encoder, restricted
from lgl_plugin.runs.arguments import for_other_stage, key_of
from lgl_plugin.runs.differences import changes
from lgl_plugin.runs.pretrained import where_encoder_is
from lgl_plugin.runs.run import (
    CEILING,
    encoder_kind,
    round_of,
    stage1_steps,
    stage_of,
)
from lgl_plugin.runs.schema import Stage2Settings
from lgl_plugin.runs.state import STATE, check_artefact, read_state
from lgl_plugin.runs.weights import (
    ENCODER,
    load_pretrained,
    load_weights,
    save_tensors,
    save_weights,
)
from lgl_plugin.training.session import Session
from lgl_plugin.training.sizes import check_clusters
from lgl_plugin.utils.distributed import by_lgl, from_main, launch_command

logger = get_logger(__name__)

# Initial weights of new_encoder, if new_first_encoder makes the first labels.
START = "start.ckpt"


def find_encoder(session: Session) -> pathlib.Path:
    """Finds the weights that Stage II starts from, checked against the yaml.

    In debug mode, which tries out a setup, an untrained encoder suffices.

    Raises
    ------
    FileNotFoundError
        If there are no weights; the message has the command that makes them.
    ValueError
        If the weights do not fit the yaml's encoder, were damaged since the run
        that made them, or are not those that the run began with.
    """
    settings, folder = session.settings, session.run.folder
    given = settings.pretrained_encoder
    last = stage1_steps(session.run.settings)[-1]
    path = given_weights(given) or folder / last / ENCODER
    if settings.new_first_encoder is not None:
        begun = "iter1/embeddings" in session.run.done
        from_main(_keep_start, settings, folder / START, begun)
    if not path.exists() and session.debug:
        logger.warning(
            "--debug: no encoder at %s, so an untrained one is used", path
        )
        path = folder / "untrained.ckpt"
        save_weights(settings.first_encoder().network, path)
        return path
    check_weights(settings, path)
    run, name = session.run, "pretrained_encoder"
    # Once rounds have begun, they continue with the front end that they began
    # with.
    if not {"iter1/embeddings", CEILING} & {*run.done}:
        check_front_end(path, run.settings["stage 2"])
    inputs = run.inputs.setdefault("stage 2", {})
    begun = run.sources.get("iter1/embeddings")
    if given and begun and "iter1/embeddings" in run.done:
        # Stage I's encoder is on record only as the source of that step.
        inputs.setdefault(name, begun)
    # The check also runs if the setting is left out this time: another encoder
    # would redo and overwrite all finished rounds.
    if given or name in inputs:
        run.record_input(name, path)
    return path


def check_weights(settings: Stage2Settings, path: pathlib.Path) -> None:
    """Raises what `find_encoder` raises if weights at a path are unusable."""
    check_encoder(settings, path)
    check_artefact(path)
    load_pretrained(settings.first_encoder().network, path)
    made_to_train(settings, settings.new_encoder)


def check_front_end(path: pathlib.Path, settings: dict) -> None:
    """Refuses to train an encoder with another front end than its own.

    `path` has the weights of a run's step, `settings` are Stage II's plain
    settings. Weights that belong to no run, and exported weights, which
    describe their front end, are accepted.
    """
    path = path.absolute()
    runs = (p for p in path.parents[1:3] if (p / STATE).exists())
    run = next(runs, None)
    if run is None or path.parents[1].name == "export":
        return
    step = path.parent.relative_to(run).as_posix()
    before = read_state(run)["settings"].get(stage_of(step))
    if before is None:
        return
    made = encoder_kind(before, round_of(step))
    first = settings.get("new_first_encoder") and "new_first_encoder"
    lines = changes(
        _front_end(before, made),
        _front_end(settings, first or "new_encoder"),
    )
    if lines:
        raise ValueError(
            f"{path} was trained with another front end ("
            f"{'; '.join(lines)}). Name the folder that lgl export writes of "
            f"it, --pretrained_encoder={run / 'export' / step.split('/')[0]}, "
            "which brings its own along, or set the same here."
        )


def _front_end(settings, kind):
    """Returns the settings of all parts between audio and network."""
    (encoder,) = settings[kind].values()
    if not isinstance(encoder, dict):  # "", or a list of arguments
        encoder = {}
    parts = {name: encoder.get(name) for name in ("features", "normalise")}
    return {"sample_rate": settings["sample_rate"], **parts}


def made_to_train(
    settings: Stage2Settings, new_encoder: Callable[[], Encoder]
) -> Encoder:
    """Makes an encoder, of which only the parts in the settings are trained."""
    return restricted(
        new_encoder(),
        settings.freeze_batch_statistics,
        settings.trained_weights,
    )


def given_weights(pretrained_encoder: str | None) -> pathlib.Path | None:
    """Returns the path of the weights that pretrained_encoder names."""
    if not pretrained_encoder:
        return None
    path = pathlib.Path(pretrained_encoder)
    return path / ENCODER if path.is_dir() else path


def check_encoder(
    settings: Stage2Settings, path: pathlib.Path | None = None
) -> None:
    """Raises FileNotFoundError if the weights to start from do not exist.

    `path` is by default the one in pretrained_encoder.
    """
    path = path or given_weights(settings.pretrained_encoder)
    if path is None or path.exists():
        return
    given = settings.pretrained_encoder
    key = f"pretrained_encoder: {given}" if given else "Stage II"
    advice = (
        f"Train one with `{stage1_command(settings)}`, or set "
        "pretrained_encoder to a SpeechBrain checkpoint."
    )
    if given and pathlib.Path(given).is_dir():
        advice = f"{where_encoder_is(given)}."
    elif given and by_lgl():
        advice = (
            "Set it to a SpeechBrain checkpoint, or leave it out, and Stage I "
            "trains one."
        )
    raise FileNotFoundError(f"{key}: there is no encoder at {path}. {advice}")


def check_inputs(
    settings: Stage2Settings, manifest: Manifest, read: bool = True
) -> None:
    """Refuses utterances that Stage II cannot use, before Stage I begins.

    Arguments
    ---------
    settings : lgl_plugin.runs.schema.Stage2Settings
        Settings of Stage II.
    manifest : lgl_plugin.dataio.manifest.Manifest
        The utterances.
    read : bool
        True: audio of each labelled speaker is read as a test.

    Raises
    ------
    ValueError
        If there are too few utterances for the clusters, the encoder lacks a
        part that the settings freeze or train, the labels are of other
        utterances, or no audio of a labelled speaker can be read.
    """
    made_to_train(settings, settings.new_encoder)
    check_clusters(settings, len(manifest))
    if settings.labels_file:
        given = read_given(settings.labels_file, manifest.ids)
        if read:
            rate = settings.sample_rate
            given.of(list(_read_one_of_each(given, manifest, rate)))


def _read_one_of_each(given, manifest, rate):
    """Yields a readable row of each labelled speaker, if there is one.

    One row suffices: there may be labels of tens of thousands of utterances.
    """
    speakers = set()
    for row in given.rows:
        speaker = given.by_row[row]
        if speaker not in speakers and _can_be_read(manifest[row], rate):
            speakers.add(speaker)
            yield row


def _can_be_read(utterance, sample_rate):
    """Returns True if the part of an utterance that is embedded can be read."""
    try:
        read_beginning(**utterance, limit=MAX_SECONDS, sample_rate=sample_rate)
    except BadAudio:
        return False
    return True


def check_trials(session: Session, first: pathlib.Path) -> None:
    """Scores Stage II's first encoder, unless Stage I has scored the trials.

    Stage I's baselines find trial audio that cannot be scored before training.
    Without Stage I such audio would end Stage II's first training.

    Raises
    ------
    ValueError
        If an utterance of the trial list cannot be scored.
    """
    settings, run = session.settings, session.run
    before, trials = (
        run.inputs.get(f"stage {stage}", {}).get("verification_file")
        for stage in (1, 2)
    )
    scored = "baselines" in run.done and before == trials
    if trials is None or scored or "iter1/classifier" in run.done:
        return
    encoder = settings.first_encoder()
    load_weights(encoder.network, first)
    session.score(encoder)


def _keep_start(settings, path, begun):
    """Keeps the weights that the encoders of all rounds begin with.

    Each start writes them anew until the first step is done, because seed and
    encoder may still change.
    """
    torch.manual_seed(settings.seed)  # the head begins at random
    network = settings.new_encoder().network
    if settings.anchor:  # refuse an anchor without effect now
        new_anchor(settings, network, network.state_dict())(network)
    if not (begun and path.exists()):
        # save_weights would wait for all processes, but only one runs this.
        save_tensors(network.state_dict(), path)


def new_anchor(
    settings: Stage2Settings,
    network: torch.nn.Module,
    start: dict[str, torch.Tensor],
) -> Anchor:
    """Makes a network's anchor, without a head that begins at random."""
    fresh = settings.new_first_encoder is not None
    prefix = getattr(network, "pretrained", "") if fresh else ""
    return Anchor(start, settings.anchor, prefix)


def stage1_command(settings: Stage2Settings) -> str:
    """Returns the command of Stage I for the user's command of Stage II.

    Options that only Stage II takes are left out.
    """
    words = for_other_stage(launch_command(), 1, lambda _: settings.stage1_yaml)
    # ceiling.py takes Stage II's command and has no Stage I.
    words = [re.sub(r"(^|/)ceiling\.py$", r"\1train_lgl.py", w) for w in words]
    names = {key_of(word) for word in words}
    if settings.stage1_yaml not in words:  # not started by the recipe
        words = ["python", "train_lgl.py", settings.stage1_yaml]
        names = set()
    for name in ("output_folder", "data_folder"):
        if name not in names:
            words.append(f"--{name}={getattr(settings, name)}")
    return shlex.join(words)
