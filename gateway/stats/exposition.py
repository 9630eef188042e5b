"""Metrics of several replicas in Prometheus' text format, put together with a label that tells them apart. Pure.

Text is cut and relabelled as it is: parsing and printing it with prometheus_client would take many times as long, in which the
event loop would stand still.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

OWN_PREFIX = b"peerkv_"
"""The gateway's metrics: a replica's of such a name would be the second family of that name."""
_NAME = rb"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = rb'[a-zA-Z_][a-zA-Z0-9_]*="[^"\\\n]*(?:\\.[^"\\\n]*)*"'
_VALUE = rb"(?:[-+]?(?:\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|Inf)|NaN)"
_LABELS = rb"\{(?:%b(?:,%b)*,?)?\}" % (_LABEL, _LABEL)
_SAMPLES_WITH_LABELS = re.compile(rb"(?:%b%b %b(?: -?\d+)?\n)+" % (_NAME, _LABELS, _VALUE))
_SAMPLES = re.compile(rb"(?:%b(?:%b)? %b(?: -?\d+)?\n)+" % (_NAME, _LABELS, _VALUE))
_FAMILY = re.compile(
    rb"^# HELP (%b)( [^\n]*)?\n# TYPE \1 (counter|gauge|histogram|summary|untyped)\n((?:[^#\n][^\n]*\n)+)" % _NAME, re.MULTILINE
)
_LABELLED = re.compile(rb"^(%b)\{" % _NAME, re.MULTILINE)
_BARE = re.compile(rb"^(%b) " % _NAME, re.MULTILINE)
_TAKEN = re.compile(rb'([{,])replica="')


class Family(NamedTuple):
    """One metric: `samples` are whole lines, and all begin with its name."""

    name: bytes
    about: bytes
    kind: bytes
    samples: bytes


def labelled_families(text: bytes, replica: str) -> Iterator[Family]:
    """The families in `text`, each sample with the label `replica`, whose value needs no escapes. Invalid ones are left out.

    A label of that name becomes `exported_replica`, as Prometheus would name it.
    """
    label = b'replica="%b"' % replica.encode()
    for name, about, kind, samples in _FAMILY.findall(text):
        all_have_labels = _SAMPLES_WITH_LABELS.fullmatch(samples) is not None
        if name.startswith(OWN_PREFIX) or not (all_have_labels or _SAMPLES.fullmatch(samples)):
            continue
        lines = samples.count(b"\n")
        if not samples.startswith(name) or samples.count(b"\n" + name) != lines - 1:
            continue
        if b'replica="' in samples:
            samples = _TAKEN.sub(rb'\1exported_replica="', samples)
        if all_have_labels and samples.count(b"{") == lines:  # the usual case, in a fifth of the time
            samples = samples.replace(b"{", b"{%b," % label)
        else:
            samples = _BARE.sub(rb"\1{%b} " % label, _LABELLED.sub(rb"\1{%b," % label, samples))
        yield Family(name, about, kind, samples)


def merged(replicas: Iterable[Iterable[Family]]) -> bytes:
    """All families, each once, with the samples of all replicas. The first replica's type of a family holds."""
    heads: dict[bytes, Family] = {}
    samples: dict[bytes, list[bytes]] = {}
    for families in replicas:
        for family in families:
            head = heads.setdefault(family.name, family)
            if head.kind == family.kind:
                samples.setdefault(family.name, []).append(family.samples)
    return b"".join(
        b"# HELP %b%b\n# TYPE %b %b\n%b" % (name, head.about, name, head.kind, b"".join(samples[name]))
        for name, head in heads.items()
    )
