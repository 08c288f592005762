"""Writes the page of `lgl adapt`: error rates before and after each rung."""

import pathlib
from collections.abc import Iterator, Sequence

from lgl_plugin.adaptation.ladder import Ladder
from lgl_plugin.adaptation.rungs import HEADER, Rung
from lgl_plugin.report.page import Block, Command, Page, Summary, Table


def conclusion(rungs: Sequence[Rung]) -> str:
    """Returns the outcome of all rungs in a sentence."""
    kept = [rung for rung in rungs if rung.kept]
    if not kept:
        number = rungs[0].verdict.recordings
        if any(rung.verdict.sign == 0 for rung in rungs):
            return (
                f"Nothing was changed: these {number} recordings do not show "
                "that another encoder is better. More of them might."
            )
        return (
            "Your encoder is best as it is: each rung loses on pseudo-trials "
            f"of {number} recordings. Nothing was changed."
        )
    return " ".join(
        f"Better with {rung.name}: the equal error rate on pseudo-trials of "
        f"{rung.verdict.recordings} recordings falls from "
        f"{rung.verdict.before:.1f} % to {rung.verdict.after:.1f} %."
        for rung in kept
    )


def write_page(ladder: Ladder, exported: pathlib.Path) -> pathlib.Path:
    """Writes a ladder's page into its folder, and returns the path."""
    page = Page(ladder.folder / "report", f"{ladder.source.name}, adapted")
    introduction = page.collect(_introduction, ladder, exported)
    sections = {
        "Rungs": page.collect(_rungs, ladder),
        "How far to trust this": page.collect(_limits, ladder),
    }
    return page.write(introduction, sections, "lgl adapt")


def _introduction(ladder, exported) -> Iterator[Block]:
    """Yields the outcome and the facts."""
    yield Summary(True, conclusion(ladder.rungs))
    facts = {
        "encoder": str(ladder.source),
        "audio": str(ladder.audio),
        "recordings": f"{len(ladder.manifest):,}",
        "minutes": f"{ladder.manifest.durations.sum() / 60:,.0f}",
        "judged on": f"{len(ladder.judged):,}",
        "speakers, estimated": f"{ladder.n_speakers:,}",
    }
    if ladder.given is not None:
        number = len(ladder.given.rows)
        speakers = len(ladder.given.speakers)
        facts["labels given"] = f"{number:,} of {speakers:,} speakers"
    yield facts
    if ladder.kept:
        command = f"lgl compare {exported} one.wav other.wav"
        yield Command("To use the adapted encoder:", command)


def _rungs(ladder) -> Iterator[Block]:
    """Yields the table of rungs."""
    yield Table(
        "Equal error rates on pseudo-trials; before is the best rung so far, "
        "or the encoder as it came where two back-ends are even",
        HEADER,
        [rung.cells() for rung in ladder.rungs],
    )
    yield (
        "The change has a 95 % interval, from drawing recordings. A rung is "
        "kept if the whole interval is below 0, and fewer clusters do not say "
        "the opposite. AS-norm is no part of an "
        "encoder's folder: `lgl verify --cohort` applies it to trials."
    )


def _limits(ladder) -> Iterator[Block]:
    """Yields the limits of the verdict."""
    labels = "No labels were read."
    if ladder.given is not None:
        labels = "Training read the labels that you gave; no verdict does."
    yield [
        f"{labels} Each side clusters the recordings. Pairs that both put into "
        "one cluster are targets, pairs that both put into different clusters "
        "are non-targets.",
        "Mistakes that both sides make count as the truth.",
        "If many more speakers are estimated than there are, the clusters are "
        "sessions, and an encoder wins by knowing rooms and lines. A half and "
        "a quarter of the clusters must not say the opposite.",
        "Training is judged by recordings of clusters that it never read; a "
        "cluster stands for a speaker, but may hold a part of one only.",
        "These error rates are not those of real trials. "
        "docs/adapt_measured.md says "
        "how often the verdict was right where labels exist.",
    ]
