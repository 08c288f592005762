"""Recognises from the metrics a training that goes wrong without an error.

`findings` reads the records of metrics.jsonl. It reads no true label.
Thresholds are far from the figures of healthy runs: AN4 and the synthetic
corpus, three seeds, all gates (docs/paper_claims.md).
"""

import statistics

from lgl_plugin.runs.metrics_log import row_name

# Mean cosine of different utterances. An untrained ECAPA-TDNN has 0.97 to 0.99,
# a trained one far less.
COLLAPSED_COSINE = 0.995
# Effective dimensions. Points on a line have 1. Trained encoders have 7 and
# more, or 2.3 if three held-out utterances are measured. SimSiam, which stayed
# at chance, had 1.6 to 1.8.
FEWEST_DIMENSIONS = 2.0
# Accuracy of the discriminator. Chance is 0.5, and healthy runs stay below 0.6.
# From 0.95 on the cross entropy, whose reversed gradient teaches the encoder,
# is nearly 0.
DISCRIMINATOR_WON = 0.95
# Targets of DINO and SDPN: entropy as a share of the largest, and number of
# prototypes used. Healthy runs had 0.05 to 0.7, and 20 and more. In runs at
# 0.98 and more the error hardly fell.
TEACHER_SAYS_NOTHING = 0.98
FEWEST_PROTOTYPES = 2.0
# VICReg's variance of two views: 2 if all projections are the same, and 1.2
# after the first epoch of healthy runs.
PROJECTIONS_ALIKE = 1.9
# Epochs in a row: a discriminator may win for an epoch, until the encoder
# adapts.
DISCRIMINATOR_EPOCHS = 3
# Selected share of a gate. Below 1 % a class of 100 utterances trains on one.
# Healthy runs had 11 to 83 %.
LEAST_SELECTED = 0.01
MOST_SELECTED = 0.99
# Odds that an utterance is in the largest cluster, relative to clusters of
# equal size. k-means on useful embeddings has 2 to 3.
GIANT_CLUSTER = 10.0
# A cluster with a smaller share does little harm, whatever the number of
# clusters.
GIANT_SHARE = 0.01
# Share of clusters with no or one utterance. They teach nothing; a few are
# usual if K is large for the corpus.
POOR_CLUSTERS = 0.1
# Adjusted mutual information of two rounds' labels: 0.75 to 0.92 where another
# round still helped, 1 for the same clusters.
SAME_LABELS = 0.98
# Share of the median speed of the phase's past epochs, and their least number.
SLOW = 0.5
EPOCHS_BEFORE_SLOW = 3
# One slowly read file can double the time of a shorter epoch.
SECONDS_TO_JUDGE = 10.0


def findings(records: list[dict]) -> list[tuple[dict, str]]:
    """Lists the problems of a run, each once in a phase.

    Arguments
    ---------
    records : list of dict
        Records of a run, from `read_metrics`, in the order of logging.

    Returns
    -------
    list of (dict, str)
        The record that shows a problem, and its description: the figure with
        its key, and a remedy.

    Example
    -------
    >>> record = {"stage": 1, "phase": "simclr", "epoch": 1, "lr": 0.0}
    >>> [words for _, words in findings([record])]
    ['Stage I, epoch 1: the learning rate is 0...']
    """
    found, reported, phases = [], set(), {}
    for record in records:
        phase = record["stage"], record.get("iteration"), record["phase"]
        before = phases.setdefault(phase, [])
        for rule in RULES:
            text = rule(record, before)
            if text and (rule, phase) not in reported:
                reported.add((rule, phase))
                found.append((record, f"{_place(record)}: {text}"))
        before.append(record)
    return found


def _place(record):
    """Returns the phase and the epoch of a record as text."""
    name = row_name(record)
    if record["stage"] == 2:
        name = f"iteration {record['iteration']}, {record['phase']}"
    epoch = record.get("epoch")
    return name if epoch is None else f"{name}, epoch {epoch}"


# A rule takes a record and the earlier records of its phase, and returns a
# description or None.


def _skipped(record, before):
    steps = record.get("skipped_steps")
    if steps:
        return (
            f"{steps:,} training steps were skipped (skipped_steps): their "
            "loss or gradient was not finite. If it goes on, try a lower lr, "
            "or precision: fp32."
        )


def _collapse(record, before):
    cosine = record.get("mean_cosine")
    dimensions = record.get("effective_dimensions")
    if cosine is not None and cosine > COLLAPSED_COSINE:
        seen = (
            "different held-out utterances have a cosine of "
            f"{cosine:.4f} on average (mean_cosine)"
        )
    elif dimensions is not None and dimensions < FEWEST_DIMENSIONS:
        seen = (
            f"they vary in {dimensions:.1f} dimensions (effective_dimensions)"
        )
    else:
        return None
    further = "a gate that selects more"
    if record["stage"] == 1:
        further = "another method"
        if record.get("discriminator_accuracy") is not None:
            further = "a lower adversarial_weight"
    return (
        f"the embeddings have collapsed: {seen}. Try a lower lr, or {further}."
    )


def _prototypes(record, before):
    entropy = record.get("teacher_entropy")
    used = record.get("prototypes_used")
    if entropy is not None and entropy > TEACHER_SAYS_NOTHING:
        return (
            "the teacher has collapsed: it finds all prototypes alike, at "
            f"{entropy:.3f} of the largest entropy (teacher_entropy). Try "
            "lower teacher_temperatures (of SDPN, a lower temperature), or a "
            "lower lr."
        )
    if used is not None and used < FEWEST_PROTOTYPES:
        return (
            "the teacher has collapsed: it gives nearly all utterances one "
            f"prototype ({used:.1f} used, prototypes_used). Try a lower lr, a "
            "teacher_momentum nearer to 1, or of SDPN a larger mean_entropy."
        )


def _projections(record, before):
    variance = record.get("variance")
    if variance is not None and variance > PROJECTIONS_ALIKE:
        return (
            "the projections have collapsed: all utterances have nearly the "
            f"same (variance {variance:.2f} of 2), so the encoder learns "
            "nothing. Try a higher variance of VICReg, or a lower lr."
        )


def _discriminator(record, before):
    key = "discriminator_accuracy"
    lately = [*before, record][-DISCRIMINATOR_EPOCHS:]
    rates = [r.get(key) or 0.0 for r in lately]
    if len(rates) == DISCRIMINATOR_EPOCHS and min(rates) > DISCRIMINATOR_WON:
        return (
            f"the discriminator has won: {len(rates)} epochs long it was right "
            f"in {100 * min(rates):.0f} % or more ({key}; chance is 50 %). The "
            "embeddings carry the augmentation. Try a higher "
            "adversarial_weight."
        )


def _gate(record, before):
    share, tau = record.get("selected_share"), record.get("tau")
    if record["phase"] != "gated" or share is None or "epoch" not in record:
        return None
    at = "" if tau is None else f" at tau {tau:.3g}"
    if share < LEAST_SELECTED:
        return (
            f"the gate lets only {100 * share:.2g} % through (selected_share)"
            f"{at}: next to nothing is learnt. Give a gate of fixed thresholds "
            "a higher tau. Before one that finds its own, such as "
            "DynamicGate, train longer without it (classifier_epochs)."
        )
    if share > MOST_SELECTED and tau is not None:  # None: no threshold
        return (
            f"the gate lets {100 * share:.1f} % through (selected_share){at}: "
            "it is as good as none. A gate of fixed thresholds takes a lower "
            "tau. One that finds its own, such as DynamicGate, then finds no "
            "two kinds of labels: the clusters are good, or too few epochs "
            "were trained without it (classifier_epochs)."
        )


def _giant_cluster(record, before):
    share, n = record.get("largest_share"), record.get("n_clusters")
    if share is None or share < GIANT_SHARE or n < 2:
        return None
    if share * (n - 1) > GIANT_CLUSTER * (1 - share):
        return (
            f"one of the {n:,} clusters holds {100 * share:.0f} % of the "
            "utterances (largest_share). Listen to some of it: silence, or "
            "one channel? Try more number_of_epochs in Stage I, or a higher "
            "channel of augment."
        )


def _poor_clusters(record, before):
    empty, single = record.get("empty_clusters"), record.get("single_clusters")
    if empty is None:
        return None
    n = record["n_clusters"]
    if empty + single > POOR_CLUSTERS * n:
        return (
            f"of the {n:,} clusters {empty:,} are empty and {single:,} have "
            "one utterance (empty_clusters, single_clusters). Try a smaller "
            "n_clusters."
        )


def _same_labels(record, before):
    agreement = record.get("agreement")
    if record["phase"] != "clusters" or agreement is None:
        return None
    if agreement > SAME_LABELS:
        return (
            "the pseudo-labels are those of the round before (agreement "
            f"{agreement:.3f}): further rounds teach nothing new. Try fewer "
            "n_iterations, or another n_clusters."
        )


def _no_learning_rate(record, before):
    if record.get("lr") == 0:
        return (
            "the learning rate is 0 (lr): nothing is learnt. Look at lr and "
            "lr_annealing."
        )


def _slow(record, before):
    speed = record.get("utterances_per_second")
    speeds = [r.get("utterances_per_second") for r in before]
    speeds = [s for s in speeds if s is not None]
    if speed is None or record["seconds"] < SECONDS_TO_JUDGE:
        return None
    if len(speeds) < EPOCHS_BEFORE_SLOW:
        return None
    usual = statistics.median(speeds)
    if speed < SLOW * usual:
        return (
            f"training has slowed down to {speed:.0f} utterances per second "
            f"from {usual:.0f}, the median so far (utterances_per_second). "
            "Look for other processes and a slow disk; try a higher "
            "num_workers of dataloader_options."
        )


def _too_few(record, before):
    utterances, batch = record.get("utterances"), record.get("batch_size")
    if utterances is not None and batch is not None and utterances < batch:
        return (
            f"nothing is trained: the {utterances:,} utterances that the gate "
            f"let through make no batch of {batch:,}. Try a gate that selects "
            "more, or a smaller batch_size."
        )


RULES = (
    _too_few,
    _no_learning_rate,
    _skipped,
    _collapse,
    _prototypes,
    _projections,
    _discriminator,
    _gate,
    _giant_cluster,
    _poor_clusters,
    _same_labels,
    _slow,
)
