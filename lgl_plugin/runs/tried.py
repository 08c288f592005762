"""Tries the classes that a yaml names, before anything is written.

Otherwise an error would show only when the first batch goes through: for the
last round's encoder days later.
"""

import contextlib
import copy
import pydoc
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lgl_plugin.runs.metrics_log import RESERVED
from lgl_plugin.utils.distributed import alone

# Attributes that the object of a setting must have.
USED_BY = {
    "gate": ("forward", "tau", "start_iteration", "end_epoch"),
    "no_gate": ("forward", "tau", "end_epoch"),
    **dict.fromkeys(("cluster", "ssps_cluster"), ("check",)),
    **dict.fromkeys(("backend", "cluster_backend", "ssps_backend"), ("fit",)),
    "augment": ("forward",),
    "train_logger": ("log_stats",),
}
ENCODERS = ("new_first_encoder", "new_encoder", "new_last_encoder")
# Settings on which the result of a trial depends.
TRIED = (
    *("stage", "sample_rate", "embedding_size", "method", "opt_class"),
    *(*ENCODERS, "new_classifier", "aam", "large_margin", "lr_annealing"),
    *("correct_labels", "relabel", "gate", "augment"),
)
N_LABELS = 100  # enough for a loss that compares the nearest few labels
N_UTTERANCES = 8  # enough for a method that compares the nearest few

_tried = set()  # settings that are known to work, as texts


def explained(error: BaseException) -> str:
    """Returns an error's message in one line, or the line that raised it."""
    # The `args` of this error hold a traceback and no message.
    if isinstance(error, pydoc.ErrorDuringImport):
        return " ".join(str(error).split())
    said = ": ".join(str(part) for part in error.args)
    if not said:
        said = traceback.extract_tb(error.__traceback__)[-1].line or ""
    if not isinstance(error, ValueError):
        said = f"{type(error).__name__}: {said}"
    if said.startswith("ImportError: There is no such "):  # HyperPyYAML's
        module = said.split()[-1].partition(".")[0]
        if pydoc.locate(module) is None:
            said += (
                f": the folder of a module {module} of your own must be on "
                "PYTHONPATH, such as by `PYTHONPATH=. lgl …` in there"
            )
    return " ".join(said.split())


def try_out(plain: Mapping[str, Any], hparams: Mapping[str, Any]) -> None:
    """Makes the modules that a stage trains, and runs them on noise.

    Takes the checked settings as plain data and with the yaml's objects. Raises
    ValueError with the name of the setting whose object cannot be used.
    """
    for name, attributes in USED_BY.items():
        if hparams.get(name) is not None:
            with _named(name):
                _check_use(hparams[name], *attributes)
    # `lgl train` reads the same settings three times.
    key = repr([plain.get(name) for name in TRIED])
    if key in _tried:
        return
    with alone(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        try_stage = _try_stage2 if hparams["stage"] == 2 else _try_stage1
        try:
            try_stage(hparams)
        except ValueError:
            if not torch.cuda.is_available():
                raise
            with torch.device("cuda"):  # for a network that needs it
                try_stage(hparams)
        with _named("lr_annealing"):
            _try_schedule(copy.deepcopy(hparams["lr_annealing"]))
        if hparams.get("gate") is not None:
            with _named("gate"):
                _try_gate(copy.deepcopy(hparams["gate"]))
    _tried.add(key)


def _try_stage1(hparams):
    """Makes the encoder, the method and the optimiser."""
    size, rate = hparams["embedding_size"], hparams["sample_rate"]
    encoder, embeddings = _try_encoder(hparams, "new_encoder")
    if embeddings.shape[1] != size:
        raise ValueError(
            f"embedding_size: new_encoder's embeddings have not {size} but "
            f"{embeddings.shape[1]} dimensions"
        )
    with _named("method"):
        method = hparams["method"](encoder, size, N_UTTERANCES)
        _check_use(method, "views", "teach", "check_batch", "end_step")
        samples = max(rate, 2 * getattr(encoder, "min_samples", 1))
        crops = torch.randn(N_UTTERANCES, 2, samples) / 9
        _try_step(method, encoder, crops, hparams["augment"].to(crops.device))
    _try_optimiser(hparams, encoder, method)


def _try_step(method, encoder, crops, augment):
    """Does a step of a method of Stage I, without the optimiser."""
    weights = {id(weight) for weight in encoder.parameters()}
    if any(id(weight) in weights for weight in method.parameters()):
        raise ValueError(
            f"{type(method).__name__} keeps the encoder that it is given, "
            "whose weights would be trained twice: leave it out of its "
            "attributes"
        )
    if method.name == "ssps":
        raise ValueError(
            "the phase after Stage I has the name ssps: set the attribute "
            "`name` to another"
        )
    groups = torch.arange(N_UTTERANCES).expand(2, -1)
    with torch.enable_grad():
        views, taught = method.views(crops, augment)
        embeddings = [
            encoder(view.flatten(0, 1)).unflatten(0, view.shape[:2])
            for view in views
        ]
        if method.adversary is not None:
            method.adversary_loss([part.detach() for part in embeddings])
        loss, figures = method(embeddings, method.teach(taught), groups, 0.5)
    _check_shape(loss)
    if not loss.requires_grad:
        raise ValueError("its loss does not depend on any trained weight")
    for name, value in figures.items():
        if name in RESERVED:
            raise ValueError(
                f"its figure {name!r} would take the place of the run's own: "
                "give it another name"
            )
        _check_shape(value)
    method.end_step(encoder, 0.5, torch.tensor(0.0))


def _try_gate(gate):
    """Applies a gate to some losses."""
    gate.start_iteration(1)
    losses = torch.linspace(0.5, 4, 8).requires_grad_()
    with torch.enable_grad():
        weights = gate(losses)
    _check_shape(weights, 8)
    if weights.requires_grad or not ((weights >= 0) & (weights <= 1)).all():
        raise ValueError(
            f"{type(gate).__name__} must answer a mask, or weights from 0 to 1 "
            "without a gradient"
        )


def _try_schedule(schedule):
    """Refuses a schedule whose rate depends on the number of calls.

    A schedule is called at each step, and no checkpoint keeps such a count.
    """
    if schedule(0) != schedule(0):
        raise ValueError(
            f"{type(schedule).__name__} counts how often it is called; take "
            "one that follows from the epoch, such as StepScheduler"
        )


def _try_stage2(hparams):
    """Makes each encoder, a classifier for it, and the label corrections."""
    for name in ENCODERS:
        if hparams.get(name) is None:
            continue
        encoder, embeddings = _try_encoder(hparams, name)
        if name == "new_first_encoder":  # only clustered
            continue
        place = f"{name}'s {embeddings.shape[1]} dimensions"
        with _named(f"new_classifier, on {place}"):
            classifier = hparams["new_classifier"](out_neurons=N_LABELS)
            # As the brain does.
            cosines = classifier(embeddings[:, None])[:, 0]
            _check_shape(cosines, N_UTTERANCES, N_LABELS)
        _try_optimiser(hparams, encoder, classifier)
    labels = torch.zeros(N_UTTERANCES, dtype=torch.int64)
    for name in ("aam", "large_margin"):
        with _named(name):
            loss = copy.deepcopy(hparams[name])  # it may count its calls
            _check_shape(loss(cosines, labels), N_UTTERANCES)
    if make := hparams["correct_labels"]:
        with _named("correct_labels"):
            _check_use(make(N_UTTERANCES), "votes", "end_epoch")
    if make := hparams["relabel"]:
        with _named("relabel"):
            made = make(encoder, classifier, labels, n_labels=N_LABELS)
            _check_use(made, "labels", "follow", "end_epoch")


def _try_encoder(hparams, name):
    """Makes an encoder; returns it and its embeddings of noise."""
    with _named(name):
        encoder = hparams[name]()
        _check_use(encoder, "network")
        shortest = getattr(encoder, "min_samples", 1)
        second = max(hparams["sample_rate"], shortest)
        embeddings = encoder.eval()(torch.randn(N_UTTERANCES, second) / 9)
        _check_shape(embeddings, N_UTTERANCES, embeddings.shape[-1])
    return encoder, embeddings


def _try_optimiser(hparams, *modules):
    """Makes the optimiser for the weights of some modules."""
    with _named("opt_class"):
        weights = [p for module in modules for p in module.parameters()]
        _check_use(hparams["opt_class"]([{"params": weights}]), "step")


def _check_use(made, *attributes):
    """Refuses an object that lacks an attribute."""
    for attribute in attributes:
        if not hasattr(made, attribute):
            raise ValueError(
                f"{type(made).__name__} has no {attribute}, so it cannot be "
                "used here: name another class"
            )


def _check_shape(output, *shape):
    """Refuses an output of another shape."""
    if tuple(output.shape) != shape:
        raise ValueError(
            f"it makes {tuple(output.shape)} of a batch, in place of {shape}"
        )


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns any error of the block into a ValueError with a setting's name."""
    try:
        yield
    except (OSError, MemoryError):  # their messages say what to do
        raise
    except Exception as error:
        raise ValueError(f"{name}: {explained(error)}") from error
