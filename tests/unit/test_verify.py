"""Three verdicts: verified, not verified, inconclusive; by exposure, and never of what is not comparable."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pairs_made import CRON, HOST, SECONDS, recorded, side
from rich.console import Console

from stallscope.reports import verification_text
from stallscope.reports.junit import junit
from stallscope.tracer.analysis.compare import checks, limits
from stallscope.tracer.analysis.compare.checks import INCONCLUSIVE, NOT_VERIFIED, VERIFIED
from stallscope.tracer.analysis.compare.comparison import compare
from stallscope.tracer.analysis.compare.limits import parse_event, parse_max, parse_max_rate, parse_rate
from stallscope.tracer.analysis.compare.plan import plan
from stallscope.tracer.analysis.compare.verify import NO_OVERFLOW, Verification, verify
from stallscope.tracer.errors import UsageError
from stallscope.tracer.manifest import ProbeCounters

STALLSCOPE = str(Path(sys.executable).with_name("stallscope"))
OFTEN = [5.0 + 4 * number for number in range(14)]
SLOW = parse_max("serverCron<50ms")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recording with many slow ticks, two without, and one with a single one."""
    made = tmp_path_factory.mktemp("made")
    recorded(made / "before.stall", OFTEN)
    recorded(made / "after.stall")
    recorded(made / "again.stall")
    recorded(made / "bad.stall", [33.0])
    return made


def of(folder: Path, after: str, *limits_: limits.Limit, before: str = "before", **options: object) -> Verification:
    baseline = side(folder / f"{before}.stall") if before else None
    return verify(side(folder / f"{after}.stall"), baseline, limits_, **options)  # type: ignore[arg-type]


class TestVerified:
    def test_when_what_came_often_comes_no_more(self, folder: Path) -> None:
        result = of(folder, "after", SLOW)
        assert result.verdict == VERIFIED
        assert result.paragraph.startswith("Verified: redis 2.8.17, 1 recording of 60 s, against redis 2.8.17")
        (check,) = result.checks
        assert (check.count, check.before_count, check.exposure_s) == (0, len(OFTEN), SECONDS)
        assert check.high_per_s * 60 == pytest.approx(3.0, abs=0.01)
        assert (
            "0 slow calls (serverCron, at least 50 ms) in 60 s: the true rate is below 180 per hour at 95%"
            in check.text
        )
        assert "before it was 840 per hour" in check.text
        assert (
            "The load was alike: 100 and 100 clients, 20 and 20 connections/s, 500 and 500 commands/s."
            in result.paragraph
        )

    def test_without_a_limit_the_baselines_stalls_are_what_is_asked_for(self, folder: Path) -> None:
        result = of(folder, "after")
        assert [check.limit for check in result.checks] == [
            "stalls of at least 10 ms: at most 50% of the baseline's rate"
        ]
        assert result.verdict == VERIFIED

    def test_below_a_rate_without_a_baseline(self, folder: Path) -> None:
        assert of(folder, "after", parse_max_rate("stall>50ms: 181/h"), before="").verdict == VERIFIED
        assert of(folder, "after", parse_max_rate("stall>50ms: 179/h"), before="").verdict == INCONCLUSIVE

    def test_no_overflow(self, folder: Path) -> None:
        assert of(folder, "after", NO_OVERFLOW, before="", claim_per_s=parse_rate("4/min")).verdict == VERIFIED


class TestNotVerified:
    def test_when_what_may_never_come_came_once(self, folder: Path) -> None:
        result = of(folder, "bad", SLOW)
        assert result.verdict == NOT_VERIFIED
        assert result.checks[0].is_broken
        assert "none is allowed; the longest took 60.0 ms, 33 s into" in result.checks[0].text

    def test_when_a_rate_is_surely_above_the_limit(self, folder: Path) -> None:
        assert of(folder, "before", parse_max_rate("stall>50ms: 1/min"), before="").verdict == NOT_VERIFIED

    def test_when_it_comes_as_often_as_before(self, folder: Path) -> None:
        recorded(folder / "much.stall", [2.0 + 2 * number for number in range(28)])
        recorded(folder / "same.stall", [2.5 + 2 * number for number in range(28)])
        result = of(folder, "same", before="much")
        assert result.verdict == NOT_VERIFIED
        assert "of that" in result.checks[0].text

    def test_even_where_nothing_else_is_comparable(self, folder: Path) -> None:
        """What was seen was seen, whatever was lost beside it."""
        recorded(folder / "lossy.stall", [33.0], counters={CRON: ProbeCounters(hits=700, sent=600, lost=100)})
        result = of(folder, "lossy", SLOW)
        assert result.verdict == NOT_VERIFIED
        assert [one.kind for one in result.obstacles] == ["losses"]


class TestInconclusive:
    def test_when_too_short_it_says_how_much_more_is_needed(self, folder: Path) -> None:
        result = of(folder, "after", parse_max_rate("stall>50ms: 1/h"))
        assert result.verdict == INCONCLUSIVE
        (check,) = result.checks
        assert check.more_s == result.more_s
        assert check.more_s == pytest.approx(2.9957 * 3600 - 60, abs=1)
        assert "need 3 h more to claim below 1 per hour" in check.text

    def test_when_there_is_nothing_to_hold_it_against(self, folder: Path) -> None:
        result = of(folder, "after", SLOW, before="")
        assert result.verdict == INCONCLUSIVE
        assert "give --baseline, or --rate" in result.checks[0].text
        assert "the baseline has none either" in of(folder, "after", SLOW, before="again").checks[0].text

    def test_when_the_baseline_had_too_few(self, folder: Path) -> None:
        recorded(folder / "rare.stall", [20.0, 40.0])
        result = of(folder, "after", SLOW, before="rare")
        assert result.verdict == INCONCLUSIVE
        assert "need" in result.checks[0].text
        assert result.more_s == pytest.approx(60 * (2 * (1 - 0.05**0.5) / 0.05**0.5 - 1), abs=1)

    @pytest.mark.parametrize(
        ("changes", "kind"),
        [
            ({"stall_ns": 20_000_000}, "thresholds"),
            ({"info": {"connected_clients_end": "900"}}, "load"),
            ({"host": {**HOST, "cpus": "64"}}, "host"),
            ({"complete": False}, "cut-short"),
            ({"counters": {CRON: ProbeCounters(hits=601, sent=600, lost=1)}}, "losses"),
            ({"version": "8.0", "calls_of_trim": False}, "silent"),
        ],
    )
    def test_when_it_is_not_comparable(self, folder: Path, changes: dict[str, object], kind: str) -> None:
        recorded(folder / f"other-{kind}.stall", **changes)  # type: ignore[arg-type]
        result = of(folder, f"other-{kind}", SLOW)
        assert result.verdict == INCONCLUSIVE
        assert kind in {one.kind for one in result.obstacles}
        assert "Not comparable: " in result.paragraph
        assert result.more_s is None

    def test_unless_one_decides_otherwise_which_is_said(self, folder: Path) -> None:
        recorded(folder / "other.stall", host={**HOST, "cpus": "64"})
        result = of(folder, "other", SLOW, despite=("host",))
        assert result.verdict == VERIFIED
        assert "Overlooked on request: another host class, the number of CPUs differs" in result.paragraph

    def test_data_that_is_missing_cannot_be_overlooked(self, folder: Path) -> None:
        with pytest.raises(UsageError, match='"losses" cannot be overlooked; choose among thresholds'):
            of(folder, "after", SLOW, despite=("losses",))

    def test_when_the_function_never_fired(self, folder: Path) -> None:
        result = of(folder, "after", parse_max("freeClient<1ms"), before="", claim_per_s=1.0)
        assert result.verdict == INCONCLUSIVE
        assert "freeClient never fired, which says nothing" in result.checks[0].text

    def test_when_the_function_was_not_traced(self, folder: Path) -> None:
        result = of(folder, "after", parse_max("noSuchFunction<1ms"), before="", claim_per_s=1.0)
        assert "did not trace noSuchFunction" in result.checks[0].text
        assert result.verdict == INCONCLUSIVE

    def test_when_the_threshold_was_above_what_is_asked_for(self, folder: Path) -> None:
        result = of(folder, "after", parse_max_rate("stall>5ms: 10/s"), before="")
        assert result.verdict == INCONCLUSIVE
        assert "has stalls from 10.0 ms on only; record with --stall 5000us" in result.checks[0].text


def test_calls_of_one_tick_are_one_event(folder: Path) -> None:
    counted = checks.count(side(folder / "before.stall"), parse_event("clientsCronResizeQueryBuffer>=1ms"))
    assert (counted.count, counted.calls, counted.factor) == (len(OFTEN), len(OFTEN), 1.0)


def test_storms_make_every_bound_wider(tmp_path: Path) -> None:
    storms = [10.0 + 10 * storm + tick / 10 for storm in range(5) for tick in range(4)]
    single = [2.9 * number + 1 for number in range(20)]
    sides = [side(recorded(tmp_path / f"{name}.stall", slow)) for name, slow in (("a", storms), ("b", single))]
    found = [checks.check_limit(parse_max_rate("stall: 40/min"), one, None, 0.95) for one in sides]
    assert [check.count for check in found] == [20, 20]
    assert found[0].factor == 4.0
    assert found[0].high_per_s > found[1].high_per_s * 1.2
    assert [check.verdict for check in found] == [INCONCLUSIVE, VERIFIED]


class TestLimits:
    @pytest.mark.parametrize("text", ["", "stall", "stall>5ms", "overflow<1ms", "a b<1ms", "f<", "f<5", "5ms<f"])
    def test_a_maximum_that_cannot_be_read_says_how_to_write_it(self, text: str) -> None:
        with pytest.raises(UsageError, match="cannot read"):
            parse_max(text)

    @pytest.mark.parametrize(
        "text", ["stall>5ms", "stall>5ms:", "stall<5ms: 1/h", "overflow>1ms: 1/h", "stall: 1", "s: 0/h"]
    )
    def test_a_rate_limit_likewise(self, text: str) -> None:
        with pytest.raises(UsageError):
            parse_max_rate(text)

    def test_what_is_written_is_what_is_meant(self) -> None:
        assert parse_max("f<5ms").event.at_least_ns == 5_000_000
        assert parse_max("f<=5ms").event.at_least_ns == 5_000_001
        assert parse_event("f>5ms").at_least_ns == 5_000_001
        assert parse_event("overflow").plural == "overflows"
        assert parse_event("stall>50ms").plural == "stalls of over 50 ms"
        assert parse_max_rate(" stall > 50ms : 2/min ").per_s == pytest.approx(2 / 60)
        assert [parse_rate(text) for text in ("3600/h", "60 per minute", "1/s")] == pytest.approx([1, 1, 1])

    @pytest.mark.parametrize(
        ("per_s", "text"), [(31 / 3600, "31 per hour"), (4.493 / 3600, "4.49 per hour"), (2.0, "120 per minute")]
    )
    def test_rates_are_written_in_a_unit_that_suits(self, per_s: float, text: str) -> None:
        assert limits.rate_text(per_s) == text

    @pytest.mark.parametrize(
        ("seconds", "text"), [(12.04, "12 s"), (2400, "40 min"), (11_000, "3.1 h"), (9.5, "9.5 s")]
    )
    def test_exposures_likewise(self, seconds: float, text: str) -> None:
        assert limits.exposure_text(seconds) == text

    @pytest.mark.parametrize("text", ["95", "0.2", "100%", "", "-95%", "nan"])
    def test_a_confidence_that_is_none_is_refused(self, text: str) -> None:
        with pytest.raises(UsageError):
            limits.parse_confidence(text)
        assert limits.parse_confidence("95%") == limits.parse_confidence("0.95") == 0.95


class TestPlan:
    def test_says_how_long_to_record(self, folder: Path) -> None:
        found = plan(side(folder / "before.stall"), parse_event("stall>50ms"), parse_rate("1/h"))
        assert found.steps[0].exposure_s == pytest.approx(2.9957 * 3600, rel=1e-3)
        assert found.text.startswith(
            "To claim stalls of over 50 ms below 1 per hour at 95%, record 3 h without any, 4.8 h"
        )
        assert found.before_count == len(OFTEN)
        assert dict(found.steps[0].chances)[0.0] == 1.0

    def test_and_verify_agrees(self, folder: Path) -> None:
        """Of as long as the plan says, and a second longer, the claim is made."""
        step = plan(side(folder / "before.stall"), parse_event("stall>50ms"), parse_rate("4/min")).steps[0]
        recorded(folder / "long.stall", seconds=step.exposure_s + 1)
        recorded(folder / "short.stall", seconds=step.exposure_s - 1)
        limit = parse_max_rate("stall>50ms: 4/min")
        assert of(folder, "long", limit, before="").verdict == VERIFIED
        assert of(folder, "short", limit, before="").verdict == INCONCLUSIVE

    def test_of_a_baseline_that_has_none_needs_a_rate(self, folder: Path) -> None:
        with pytest.raises(UsageError, match="give the rate to claim with --rate"):
            plan(side(folder / "after.stall"))
        with pytest.raises(UsageError, match="the baseline does not tell about"):
            plan(side(folder / "after.stall"), parse_event("noSuchFunction>1ms"), 1.0)


class TestOutput:
    def test_of_a_gate_is_legal_junit(self, folder: Path) -> None:
        recorded(folder / "elsewhere.stall", [33.0], host={**HOST, "cpus": "64"})
        result = of(folder, "elsewhere", SLOW, parse_max_rate("stall>50ms: 1/h"), parse_max_rate("stall>50ms: 500/min"))
        suite = ElementTree.fromstring(junit(result))
        assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("4", "2", "1")
        cases = {case.get("name"): [part.tag for part in case] for case in suite.findall("testcase")}
        assert cases == {
            "serverCron<50ms": ["failure"],
            "stall>50ms: 1/h": ["failure"],
            "stall>50ms: 500/min": ["system-out"],
            "comparable": ["error"],
        }

    @pytest.mark.parametrize("width", [60, 80, 120])
    def test_fits_the_terminal(self, folder: Path, width: int) -> None:
        file = io.StringIO()
        verification_text.render(of(folder, "after", SLOW), Console(file=file, width=width))
        verification_text.render_plan(plan(side(folder / "before.stall")), Console(file=file, width=max(width, 80)))
        lines = file.getvalue().splitlines()
        assert max(map(len, lines)) <= max(width, 80)
        assert all(line == line.rstrip() for line in lines)
        assert "verified  serverCron<50ms" in lines

    @pytest.mark.parametrize(
        ("after", "words", "status"),
        [("after", ["--max", "serverCron<50ms"], 0), ("before", ["--max", "serverCron<50ms"], 1),
         ("after", ["--max-rate", "stall: 1/h"], 3), ("after", ["--max", "nonsense"], 2)],
    )  # fmt: skip
    def test_ends_with_the_verdicts_exit_code(self, folder: Path, after: str, words: list[str], status: int) -> None:
        command = [STALLSCOPE, "verify", str(folder / f"{after}.stall"), "--baseline", str(folder / "before.stall")]
        done = subprocess.run(
            [*command, *words, "--json", "--junit", str(folder / "v.xml")], capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        if status == 2:
            assert done.stdout == ""
            assert len(done.stderr.splitlines()) == 1
            return
        document = json.loads(done.stdout)
        assert document["verification_version"] == 1
        assert document["verdict"] == {0: VERIFIED, 1: NOT_VERIFIED, 3: INCONCLUSIVE}[status]
        assert ElementTree.parse(folder / "v.xml").getroot().get("tests") == "2"

    def test_is_plain_json(self, folder: Path) -> None:
        result = compare(side(folder / "before.stall"), side(folder / "after.stall"))
        for document in (
            result.to_json(),
            of(folder, "after").to_json(),
            plan(side(folder / "before.stall")).to_json(),
        ):
            assert json.loads(json.dumps(document, allow_nan=False)) is not None


def test_nothing_to_verify_is_a_usage_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="nothing to verify"):
        of(folder, "after", before="")
    with pytest.raises(UsageError, match="neither stalls nor overflows"):
        of(folder, "after", before="again")
