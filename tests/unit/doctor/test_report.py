"""The table shows each fault with its remedy, hosts that agree as one row, and JSON keeps its form."""

from __future__ import annotations

import json

import pytest

from mvd_scale.doctor.findings import Finding
from mvd_scale.doctor.report import SCHEMA, Report, report_from_json


def report(*findings: Finding, hosts: tuple[str, ...] = ("a", "b", "c")) -> Report:
    return Report("1.0", "2026-11-30T10:00:00+00:00", 12.5, hosts, 2 * len(hosts), findings)


def ok(host: str, detail: str = "8 CPUs", check: str = "CPUs") -> Finding:
    return Finding(check, "ok", detail, host=host, group="machine")


FAULT = Finding("clock", "fail", "9 s ahead", "start chrony", {"ahead": 9.0}, host="b", group="network")
WARNING = Finding("NVLink", "warning", "one is down", "reset it", host="c", group="gpus")
LEFT_OUT = Finding("Xid", "left out", "there is no nvidia-smi", host="a", group="gpus")


def test_the_table() -> None:
    text = report(ok("a"), FAULT, ok("b"), WARNING, ok("c"), LEFT_OUT).to_text()
    assert text == (
        "machine\n"
        "  OK       CPUs    all  8 CPUs\n"
        "\n"
        "gpus\n"
        "  WARNING  NVLink  c    one is down\n"
        "           -> reset it\n"
        "  -        Xid     a    there is no nvidia-smi\n"
        "\n"
        "network\n"
        "  FAIL     clock   b    9 s ahead\n"
        "           -> start chrony\n"
        "\n"
        "1 failed, 1 warning, 3 OK, 1 left out (-); 3 hosts, 6 ranks, 12 s"
    )


def test_marks_are_painted_and_stay_aligned() -> None:
    text = report(ok("a"), FAULT).to_text(lambda text, outcome: f"<{outcome}>{text}</>")
    assert "<ok>OK     </>  CPUs " in text
    assert "<fail>FAIL   </>  clock" in text


def test_a_few_hosts_that_differ_have_their_rows() -> None:
    text = report(ok("a", "8 CPUs"), ok("b", "16 CPUs"), ok("c", "8 CPUs")).to_text()
    assert "CPUs  a, c  8 CPUs" in text
    assert "CPUs  b     16 CPUs" in text


def test_many_hosts_that_differ_are_one_row_and_faults_are_not_hidden() -> None:
    hosts = tuple(f"n{number}" for number in range(100))
    fault = Finding("CPUs", "fail", "1 CPU", "more", host="n7", group="machine")
    text = report(*(ok(host, f"{host} CPUs") for host in hosts if host != "n7"), fault, hosts=hosts).to_text()
    assert "FAIL     CPUs  n7               1 CPU" in text
    assert "OK       CPUs  99 hosts, as n0  n0 CPUs" in text
    assert text.count("CPUs  ") == 2


def test_a_single_host_is_not_named() -> None:
    assert "  OK       CPUs    8 CPUs" in report(ok("a"), hosts=("a",)).to_text()


def test_hosts_that_did_not_come_are_named() -> None:
    apart = Finding("meeting", "fail", "it does not meet rank 0", "open the port", host="b", group="hosts")
    text = report(ok("a"), apart, hosts=("a",)).to_text()
    assert "OK       CPUs     a  8 CPUs" in text
    assert "FAIL     meeting  b  it does not" in text


def test_checks_that_are_left_out_for_one_reason_are_one_row() -> None:
    others = [Finding(name, "left out", "no GPU", host=host, group="gpus") for name in ("x", "y") for host in "abc"]
    assert "  -        x, y  all  no GPU" in report(*others).to_text()


@pytest.mark.parametrize(
    ("findings", "outcome"),
    [((), "ok"), ((ok("a"), LEFT_OUT), "ok"), ((ok("a"), WARNING), "warning"), ((WARNING, FAULT, ok("a")), "fail")],
)
def test_the_worst_outcome_counts(findings: tuple[Finding, ...], outcome: str) -> None:
    assert report(*findings).outcome == outcome


def test_json_keeps_its_form() -> None:
    values = json.loads(report(FAULT).to_json())
    assert (SCHEMA, values["schema"]) == (1, 1)
    # A change of these keys needs another number of the schema.
    assert list(values) == ["schema", "outcome", "version", "time", "seconds", "hosts", "ranks", "findings"]
    assert values["findings"] == [
        {
            "check": "clock",
            "outcome": "fail",
            "detail": "9 s ahead",
            "remedy": "start chrony",
            "figures": {"ahead": 9.0},
            "host": "b",
            "group": "network",
        }
    ]


def test_json_is_one_line_that_reads_back() -> None:
    whole = report(ok("a"), FAULT, LEFT_OUT)
    assert "\n" not in whole.to_json()
    assert report_from_json(whole.to_json()) == whole
