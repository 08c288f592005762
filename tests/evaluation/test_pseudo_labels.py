"""Clusters and gates against true speakers, by brute force and by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn import metrics

from lgl_plugin.evaluation.pseudo_labels import (
    clustering_report,
    hungarian_mapping,
    reliable,
)
from lgl_plugin.metrics.agreement import ami

# Few speakers and clusters, not necessarily as many of each.
some_labels = st.lists(
    st.tuples(st.sampled_from(["ann", "bob", "cy", "di"]), st.integers(-1, 4)),
    min_size=1,
    max_size=30,
)


def columns(pairs):
    true, pseudo = zip(*pairs, strict=True)
    return np.array(true), np.array(pseudo)


def noisy(n=2000, speakers=40, clusters=50, seed=0):
    """Clusters that follow the speakers for about half of the utterances."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, speakers, n)
    random = rng.integers(0, clusters, n)
    return true, np.where(rng.random(n) < 0.5, true % clusters, random)


def most_agreements(true, pseudo):
    """The best of all one-to-one mappings, each tried."""
    speakers = list(np.unique(true))
    clusters = np.unique(pseudo)
    speakers += [None] * len(clusters)  # a cluster may go without
    best = 0
    for mapped in itertools.permutations(speakers, len(clusters)):
        mapping = dict(zip(clusters, mapped, strict=True))
        agree = sum(mapping[p] == t for t, p in zip(true, pseudo, strict=True))
        best = max(best, agree)
    return best


@pytest.mark.parametrize("clusters", [20, 40, 90])
def test_information_against_scikit_learn(clusters):
    true, pseudo = noisy(clusters=clusters)
    names = np.char.add("id", true.astype(str))
    assert ami(names, pseudo) == pytest.approx(
        metrics.adjusted_mutual_info_score(true, pseudo)
    )


@settings(deadline=None)
@given(some_labels)
def test_ami_of_few_labels_against_scikit_learn(pairs):
    true, pseudo = columns(pairs)
    assert ami(true, pseudo) == pytest.approx(
        metrics.adjusted_mutual_info_score(true, pseudo), abs=1e-9
    )


def test_ami_where_partitions_cannot_differ():
    assert ami(range(50), range(50)) == 1  # one utterance each
    assert ami([1] * 50, [2] * 50) == 1  # one group
    assert ami([1] * 50, range(50)) == pytest.approx(0, abs=1e-9)


def test_nmi_by_hand():
    # Two speakers of two utterances over four clusters of one: I = ln 2,
    # H = ln 2 and ln 4, whose arithmetic mean is 3/2 ln 2.
    report = clustering_report(["a", "a", "b", "b"], [0, 1, 2, 3])
    assert report["nmi"] == pytest.approx(2 / 3)
    report = clustering_report([0, 0, 1, 1], [0, 1, 0, 1])
    assert report["nmi"] == pytest.approx(0, abs=1e-12)


def test_nmi_flatters_small_random_clusters_and_ami_does_not():
    rng = np.random.default_rng(0)
    report = clustering_report(*rng.integers(0, 70, (2, 900)))
    assert report["nmi"] > 0.35
    assert abs(report["ami"]) < 0.03


def test_mapping_by_hand():
    # The largest cell, ann's 4 in cluster 5, is not taken: 4 + 0 utterances
    # agree with it, 3 + 3 with ann in 8 and bob in 5.
    true = ["ann"] * 7 + ["bob"] * 3
    pseudo = [5, 5, 5, 5, 8, 8, 8, 5, 5, 5]
    assert hungarian_mapping(true, pseudo) == {5: "bob", 8: "ann"}
    assert reliable(true, pseudo).tolist() == [False] * 4 + [True] * 6


@pytest.mark.parametrize("speakers, clusters", [(40, 50), (50, 40), (9, 60)])
def test_reliable_against_the_dense_solver(speakers, clusters):
    true, pseudo = noisy(speakers=speakers, clusters=clusters)
    table = metrics.cluster.contingency_matrix(true, pseudo)
    expected = table[linear_sum_assignment(table, maximize=True)].sum()
    assert reliable(true, pseudo).sum() == expected


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["ann", "bob", "cy"]), st.integers(0, 3)),
        min_size=1,
        max_size=20,
    )
)
def test_reliable_against_all_mappings(pairs):
    true, pseudo = columns(pairs)
    assert reliable(true, pseudo).sum() == most_agreements(true, pseudo)


@settings(deadline=None)
@given(some_labels)
def test_mapping_is_one_to_one_and_tells_who_is_reliable(pairs):
    true, pseudo = columns(pairs)
    mapping = hungarian_mapping(true, pseudo)
    assert set(mapping) == set(pseudo.tolist())
    mapped = [speaker for speaker in mapping.values() if speaker != -1]
    assert len(mapped) == len(set(mapped))
    assert set(mapped) <= set(true.tolist())
    expected = [mapping[p] == t for t, p in pairs]
    assert reliable(true, pseudo + 1).tolist() == expected


def test_more_clusters_than_speakers():
    mapping = hungarian_mapping([7, 7, 7, 9], [0, 0, 1, 2])
    assert mapping == {0: 7, 1: -1, 2: 9}


@settings(deadline=None)
@given(some_labels, st.randoms(use_true_random=False))
def test_bounds_and_permutation_invariance(pairs, random):
    true, pseudo = columns(pairs)
    names = list(range(-1, 5))
    random.shuffle(names)
    renamed = np.array(names)[pseudo + 1]
    order = np.random.default_rng(len(pairs)).permutation(len(pairs))
    report = clustering_report(true, pseudo)
    same = pytest.approx(report, abs=1e-9)
    assert clustering_report(true, renamed) == same
    assert clustering_report(true[order], pseudo[order]) == same
    assert report.pop("unlabelled") == 0
    assert max(report.values()) <= 1 + 1e-9
    perfect = clustering_report(true, true)
    assert perfect == pytest.approx(
        dict.fromkeys(report, 1) | {"unlabelled": 0}
    )
    assert 0 <= report["nmi"]
    # The mapping is restricted to one cluster per speaker, purity is not.
    assert 0 < report["reliable_share"] <= report["purity"]


@settings(deadline=None)
@given(some_labels)
def test_purity_against_a_loop(pairs):
    true, pseudo = columns(pairs)
    main = 0
    for cluster in set(pseudo.tolist()):
        members = [t for t, p in pairs if p == cluster]
        main += max(members.count(speaker) for speaker in members)
    purity = clustering_report(true, pseudo)["purity"]
    assert purity == pytest.approx(main / len(pairs))


def test_report_leaves_out_the_utterances_without_a_speaker():
    true, pseudo = noisy(600)
    names = np.char.add("id", true.astype(str))
    rng = np.random.default_rng(1)
    known = rng.random(600) < 0.8
    selected = rng.random(600) < 0.5
    report = clustering_report(np.where(known, names, ""), pseudo, selected)
    assert report.pop("unlabelled") == (~known).sum()
    trusted = reliable(true[known], pseudo[known])
    both = known & selected
    passed = selected[known]
    nmi = metrics.normalized_mutual_info_score
    main = metrics.cluster.contingency_matrix(true[known], pseudo[known]).max(0)
    assert report == {
        "nmi": pytest.approx(nmi(true[known], pseudo[known])),
        "ami": pytest.approx(ami(true[known], pseudo[known])),
        "purity": pytest.approx(main.sum() / known.sum()),
        "reliable_share": pytest.approx(trusted.mean()),
        "nmi_selected": pytest.approx(nmi(true[both], pseudo[both])),
        "ami_selected": pytest.approx(ami(true[both], pseudo[both])),
        "gate_precision": pytest.approx(trusted[passed].mean()),
        "gate_recall": pytest.approx(passed[trusted].mean()),
    }
    assert {type(value) for value in report.values()} == {float}


def test_single_measures_leave_them_out_too():
    true = ["ann", "", "bob", "bob", ""]
    pseudo = [1, 1, 2, 2, 3]
    assert ami(true, pseudo) == pytest.approx(1)
    assert hungarian_mapping(true, pseudo) == {1: "ann", 2: "bob"}
    assert reliable(true, pseudo).tolist() == [True, False, True, True, False]
    # Nor does a label of -1 take a speaker from a cluster.
    assert reliable(["ann"] * 3, [-1, -1, 5]).tolist() == [False, False, True]
    assert not reliable(true, [-1] * 5).any()


def test_report_without_a_gate_and_with_one_that_selects_nothing():
    true, pseudo = noisy(100)
    assert "nmi_selected" not in clustering_report(true, pseudo)
    report = clustering_report(true, pseudo, np.zeros(100, bool))
    assert report["nmi_selected"] == report["gate_precision"] == 0
    assert report["gate_recall"] == 0


@pytest.mark.parametrize(
    "measure", [ami, hungarian_mapping, reliable, clustering_report]
)
def test_labels_that_cannot_be_compared(measure):
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        measure([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="none of the 2 .* spk_id"):
        measure(["", ""], [1, 2])


def test_masks_of_the_wrong_length():
    with pytest.raises(ValueError, match=r"\(2,\) for 3 utterances"):
        clustering_report([1, 1, 2], [1, 1, 2], [True, False])
