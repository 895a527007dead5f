"""Report of all findings: a table with the remedy below each fault, or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mvd_scale.doctor.findings import GROUPS, Finding, Outcome
from mvd_scale.utils.markdown import counted

SCHEMA = 1
"""Number of the form of the JSON: raised when a key changes its name or meaning."""

_MARKS: dict[Outcome, str] = {"ok": "OK", "warning": "WARNING", "fail": "FAIL", "left out": "-"}
_WIDTH = max(map(len, _MARKS.values()))

_ROWS = 4
"""Rows of one check whose details differ among hosts; of more hosts the first is shown."""

Painter = Callable[[str, Outcome], str]
"""Function that colours a mark by its outcome."""


@dataclass(frozen=True)
class Report:
    """All findings of one examination."""

    version: str
    """Release of mvd-scale."""
    time: str
    """Beginning, UTC, ISO 8601."""
    seconds: float
    hosts: tuple[str, ...]
    """Labels of the hosts that came."""
    ranks: int
    """Number of ranks that came."""
    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> Outcome:
        """The worst outcome: `fail`, `warning` or `ok`."""
        outcomes = {finding.outcome for finding in self.findings}
        return "fail" if "fail" in outcomes else "warning" if "warning" in outcomes else "ok"

    def to_json(self) -> str:
        """Format as one line of JSON."""
        return json.dumps({"schema": SCHEMA, "outcome": self.outcome, **asdict(self)})

    def to_text(self, paint: Painter = lambda text, outcome: text) -> str:
        """Format as a table, in the order of groups, with the remedy below each fault."""
        rows = list(self._rows())
        checks = max((len(check) for _, check, _, _ in rows), default=0)
        hosts = max((len(host) for _, _, host, _ in rows), default=0)
        lines, group = [], ""
        for row_group, check, host, finding in rows:
            if row_group != group:
                group = row_group
                lines += ["", group]
            mark = paint(f"{_MARKS[finding.outcome]:{_WIDTH}}", finding.outcome)
            lines.append(f"  {mark}  {check:{checks}}  {host:{hosts}}  {finding.detail}".rstrip())
            if finding.remedy:
                lines.append(f"  {'':{_WIDTH}}  -> {finding.remedy}")
        return "\n".join([*lines[1:], "", self._summary()])

    def _summary(self) -> str:
        counts = {outcome: sum(finding.outcome == outcome for finding in self.findings) for outcome in _MARKS}
        return (
            f"{counts['fail']} failed, {counted(counts['warning'], 'warning')}, {counts['ok']} OK, "
            f"{counts['left out']} left out (-); {counted(len(self.hosts), 'host')}, {counted(self.ranks, 'rank')}, "
            f"{self.seconds:.0f} s"
        )

    def _rows(self) -> Iterator[tuple[str, str, str, Finding]]:
        """Yield group, check, host and finding of each row: rows that say the same are one."""
        for group in GROUPS:
            found = [finding for finding in self.findings if finding.group == group]
            made = [finding for finding in found if finding.outcome != "left out"]
            for check in dict.fromkeys(finding.check for finding in made):
                for same in _rows_of_check([finding for finding in made if finding.check == check]):
                    yield group, check, self._hosts_of(same), same[0]
            for same in _alike(finding for finding in found if finding.outcome == "left out"):
                checks = dict.fromkeys(finding.check for finding in same)
                yield group, ", ".join(checks), self._hosts_of(same), same[0]

    def _hosts_of(self, findings: Sequence[Finding]) -> str:
        hosts = list(dict.fromkeys(finding.host for finding in findings if finding.host))
        # Hosts that did not come have findings, too.
        named = {*self.hosts, *(finding.host for finding in self.findings if finding.host)}
        if not hosts or len(named) == 1:
            return ""
        if len(hosts) == len(named):
            return "all"
        return ", ".join(hosts) if len(hosts) <= 2 else f"{len(hosts)} hosts, as {hosts[0]}"


def _rows_of_check(findings: Sequence[Finding]) -> list[list[Finding]]:
    """Group the findings of one check into rows; many sound hosts whose details differ are one row."""
    faults = _alike(finding for finding in findings if finding.outcome != "ok")
    sound = _alike(finding for finding in findings if finding.outcome == "ok")
    return [*faults, *(sound if len(sound) <= _ROWS else [[finding for same in sound for finding in same]])]


def _alike(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Group findings of the same outcome, detail and remedy."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.outcome, finding.detail, finding.remedy), []).append(finding)
    return list(groups.values())


def report_from_json(text: str) -> Report:
    """Read the JSON that `Report.to_json` writes."""
    values: dict[str, Any] = json.loads(text)
    findings = tuple(Finding(**finding) for finding in values["findings"])
    fields = {key: values[key] for key in ("version", "time", "seconds", "ranks")}
    return Report(**fields, hosts=tuple(values["hosts"]), findings=findings)
