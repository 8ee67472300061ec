"""The case's story, numbers and page, without recording anything."""

from __future__ import annotations

import ast
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "vagrant"))

from case import CaseError, CaseUsageError, examine, figures, record, run, study
from case.claims import CLAIMS, failing
from case.columns import STORM, cells, headings, transposed
from case.steps import load_steps

ROOT = Path(__file__).resolve().parents[2]
STORY = load_steps()
WRITTEN = json.loads((ROOT / "docs" / "case" / "run.json").read_text(encoding="utf-8"))


def a_function(name: str, calls: int, total_ns: int, max_ns: int | None, **totals: int) -> dict[str, Any]:
    fields = [{"name": field, "total": total} for field, total in totals.items()]
    return {"name": name, "calls": calls, "total_ns": total_ns, "max_ns": max_ns, "p50_ns": max_ns, "fields": fields}


def a_stall(duration_ns: int, trims: int, trim_ns: int) -> dict[str, Any]:
    inside = [
        {"name": "sdsRemoveFreeSpace", "calls": trims, "self_ns": trim_ns},
        {"name": "je_pages_purge_lazy", "calls": trims, "self_ns": duration_ns // 10},
    ]
    return {"duration_ns": duration_ns, "full_ns": 7, "overflows": 9, "functions": inside}


SUMMARY: dict[str, Any] = {
    "elapsed_ns": 10_000_000_000,
    "complete": True,
    "functions": [
        a_function("sdsRemoveFreeSpace", 50, 2_000_000_000, 40_000_000),
        a_function("clientsCron", 80, 2_500_000_000, 900_000_000),
        a_function("je_pages_purge_lazy", 30, 100_000_000, 5_000_000, purged_bytes=1_000),
        a_function("je_pages_purge_forced", 20, 50_000_000, 6_000_000, purged_bytes=500),
    ],
    "stalls": [a_stall(400_000_000, 20, 300_000_000), a_stall(1_000_000_000, 50, 800_000_000)],
    "loop": {"stalls": 2, "longest_ns": 1_000_000_000},
    "reconciliation": [{"observed": 11, "counted": 12}],
    "blame": {"causes": {"stall": 10}},
    "listeners": [{"queue_max": 512, "queue_limit": 511, "overflows": {"inside": 9, "drain": 1, "outside": 1}}],
    "losses": [{"lost": 3}],
    "cost": {"call_cost_ns": 14_000.0, "traced_process_ns": 1e8},
}
LOAD: dict[str, Any] = {
    "connections": {"attempted": 100, "connect_timeouts": 11, "reply_timeouts": 5},
    "ping": {"max_ms": 1_001.5},
}


class TestBorder:
    def test_the_case_uses_stallscope_by_its_command_line_only(self) -> None:
        sources = sorted((ROOT / "vagrant" / "case").glob("*.py"))
        assert len(sources) > 5
        for path in sources:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not [name for name in names if name.split(".")[0] == "stallscope"], path


class TestMeasure:
    def test_tells_what_happened_in_the_worst_stall_and_in_the_whole_recording(self) -> None:
        found = figures.measure(SUMMARY, LOAD)
        assert (found["worst_ns"], found["worst_trims"], found["worst_trim_share"]) == (1_000_000_000, 50, 0.8)
        assert (found["worst_refused"], found["refused"], found["refused_by_stall"]) == (9, 11, 10)
        assert (found["trims"], found["trims_per_s"], found["trim_ns_per_s"]) == (50, 5.0, 200_000_000)
        assert (found["ping_max_ms"], found["reply_timeouts"], found["lost"]) == (1_001.5, 5, 3)
        assert found["trim_stall_share"] == pytest.approx(1_100 / 1_400)

    def test_counts_purges_under_all_their_names(self) -> None:
        found = figures.measure(SUMMARY, LOAD)
        assert (found["purges"], found["purge_ns_per_s"]) == (50, 15_000_000)
        assert (found["purge_max_ns"], found["purged_bytes"]) == (6_000_000, 1_500)

    def test_what_was_not_seen_is_none_and_not_zero(self) -> None:
        calm = {**SUMMARY, "functions": [], "stalls": [], "loop": {"stalls": 0, "longest_ns": None}}
        found = figures.measure(calm, LOAD)
        unknown = ("trims", "trim_ns_per_s", "purges", "purge_max_ns", "worst_ns", "worst_trim_share", "tick_max_ns")
        assert [found[name] for name in unknown] == [None] * len(unknown)

    def test_probed_but_never_called_is_zero_calls_and_no_longest(self) -> None:
        never = {
            **SUMMARY,
            "functions": [a_function(name, 0, 0, None) for name in ("sdsRemoveFreeSpace", "je_pages_purge")],
        }
        found = figures.measure(never, LOAD)
        assert (found["trims"], found["purges"], found["trim_max_ns"], found["purge_max_ns"]) == (0, 0, None, None)


class TestInterval:
    def test_is_the_median_and_the_range_of_what_is_known(self) -> None:
        assert figures.spread([3, None, 1, 2, 10]) == figures.Spread(2.5, 1, 10, 4)
        assert figures.spread([None, None]) == figures.Spread(None, None, None, 0)

    def test_holds_the_median_unless_all_runs_fall_on_one_side(self) -> None:
        # both sides: 2 * 0.5 ** n
        assert [figures.confidence(n) for n in (1, 2, 3, 5)] == [0.0, 0.5, 0.75, 0.9375]

    @pytest.mark.parametrize(
        ("kind", "value", "text"),
        [
            ("count", 2_857, "2,857"),
            ("duration", 1_427_000_000, "1.43 s"),
            ("duration", 999_700_000, "1.00 s"),
            ("duration", 999_400_000, "999 ms"),
            ("duration", 12_040_000, "12.0 ms"),
            ("duration", 850, "850 ns"),
            ("milliseconds", 16.32, "16.3 ms"),
            ("size", 163_840_000, "164 MB"),
            ("size", 10_000, "10.0 KB"),
            ("percent", 0.883, "88%"),
            ("percent", 0.0213, "2.1%"),
            ("percent", 0, "0%"),
            ("percent", 0.0004, "< 0.1%"),
            ("rate", 0, "0/s"),
            ("number", 410.0, "410"),
            ("rate", 1_437.2, "1,437/s"),
            ("share of time", 213_404_351, "21%"),
        ],
    )
    def test_is_written_with_three_digits_and_its_unit(self, kind: str, value: float, text: str) -> None:
        assert figures.KINDS[kind](value) == text

    def test_is_one_number_where_all_runs_agree(self) -> None:
        assert figures.interval(figures.spread([512, 512]), "count") == "512"
        assert figures.interval(figures.spread([1e9, 2e9, 4e9]), "duration") == "2.00 s [1.00 s to 4.00 s]"
        assert figures.interval(figures.spread([None]), "duration", "no stall", 1) == "no stall"

    def test_says_how_many_runs_know_the_number(self) -> None:
        some = figures.spread([None, 3e6, None])
        assert figures.interval(some, "duration", "no stall", 3) == "3.00 ms in 1 of 3 runs"


class TestChange:
    FOUND: ClassVar[dict[str, Any]] = {"ratio": 0.107, "low": 0.084, "high": 0.135, "significant": True, "why_not": ""}

    def test_is_told_with_its_interval(self) -> None:
        assert figures.change(self.FOUND) == "-89% [-91.6% to -86%]"
        assert (
            figures.change({**self.FOUND, "ratio": 3.07, "low": 1.74, "high": 5.76})
            == "3.07 times [+74% to 5.76 times]"
        )

    def test_that_may_be_chance_says_so_first(self) -> None:
        found = {**self.FOUND, "ratio": 0.0, "low": 0.0, "high": 1.0, "significant": False}
        assert figures.change(found) == "not shown, -100% [-100% to no change]"

    def test_that_cannot_be_told_says_why(self) -> None:
        assert figures.change({**self.FOUND, "why_not": "too few to tell"}) == "too few to tell"
        assert figures.change(None) == "-"


class TestStory:
    def test_has_a_recipe_a_build_and_runs_for_every_variant(self) -> None:
        assert {"baseline", "backlog", "patched", "upgrade-3", "upgrade-5", "small", "small-patched"} <= set(
            STORY.variants
        )
        assert all(one.runs >= 3 for one in STORY.variants.values() if not one.kernel)
        assert {one.build for one in STORY.variants.values() if one.optional} == {"2.8.19", "4.0.9"}

    def test_shows_the_command_that_is_run(self) -> None:
        assert record.command_shown(STORY.variants["backlog"]) == (
            "vagrant/lab/incident.py --build 2.8.17 --recipe full --rate 2000 --attach 9 --duration 40 --backlog 2048 "
            "--interrupt --load-json backlog.load.json -- stallscope record -p {pid} -o backlog.stall"
        )
        shown = record.command_shown(STORY.variants["kernel-delay"])
        assert shown.startswith("vagrant/vm run --kernel 6.1 --out . -- 'vagrant/lab/incident.py --build 2.8.17 ")
        assert ' -- bash -c "tc qdisc add dev lo root netem delay ' in shown
        assert shown.endswith(" && exec stallscope record -p {pid} -o $STALLSCOPE_OUT/kernel-delay.stall\"'")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ('build = "2.8.17"', 'there is no build 9; see'),
            ('recipe = "full"', "there is no recipe 9; see"),
            ("load = { rate = 2000, attach = 9, duration = 40 }", "incident.py has no option --speed"),
            ('about = "as it was"', "unexpected keyword argument 'colour'"),
        ],
    )  # fmt: skip
    def test_refuses_what_does_not_exist(self, tmp_path: Path, change: str, message: str) -> None:
        wrong = {
            'build = "2.8.17"': 'build = "9"',
            'recipe = "full"': 'recipe = "9"',
            "load = { rate = 2000, attach = 9, duration = 40 }": "load = { speed = 9 }",
            'about = "as it was"': 'about = "as it was"\ncolour = "red"',
        }[change]
        text = (ROOT / "vagrant" / "case" / "steps.toml").read_text(encoding="utf-8")
        assert change in text
        path = tmp_path / "steps.toml"
        path.write_text(text.replace(change, wrong, 1), encoding="utf-8")
        with pytest.raises(CaseUsageError, match=message):
            load_steps(path)

    def test_asks_only_about_variants_that_there_are(self, tmp_path: Path) -> None:
        text = (ROOT / "vagrant" / "case" / "steps.toml").read_text(encoding="utf-8")
        path = tmp_path / "steps.toml"
        path.write_text(text.replace("{all:patched}", "{all:mended}"), encoding="utf-8")
        with pytest.raises(CaseUsageError, match="'mended'"):
            load_steps(path)


class TestRecord:
    def make(self, one: record.Run, command: str) -> None:
        one.folder.mkdir(parents=True, exist_ok=True)
        for path in (one.recording, one.load):
            path.write_text("")
        one.made.write_text(json.dumps({"command": command}))

    def test_is_made_once_and_again_when_the_story_changed(self, tmp_path: Path) -> None:
        baseline = STORY.variants["baseline"]
        first = record.runs_of(baseline, tmp_path)[0]
        assert not first.is_made
        self.make(first, record.command_shown(baseline))
        assert first.is_made
        assert not replace(first, variant=replace(baseline, load={"rate": 1})).is_made
        first.load.unlink()
        assert not first.is_made

    def test_takes_turns_and_leaves_out_what_is_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[str, int]] = []
        monkeypatch.setattr(record, "_record", lambda one: asked.append((one.variant.name, one.number)))
        variants = [replace(STORY.variants["baseline"], runs=2), replace(STORY.variants["backlog"], runs=3)]
        self.make(record.runs_of(variants[1], tmp_path)[0], record.command_shown(variants[1]))
        record.record_missing(variants, tmp_path, lambda _: None)
        assert asked == [("baseline", 1), ("baseline", 2), ("backlog", 2), ("backlog", 3)]

    def test_tries_again_and_says_so_and_gives_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        failures = [CaseError("too late")] * (record.ATTEMPTS - 1)
        tried, notes = [], []

        def fail(one: record.Run) -> None:
            tried.append(one.number)
            if failures:
                raise failures.pop()

        monkeypatch.setattr(record, "_record", fail)
        one = replace(STORY.variants["baseline"], runs=1)
        record.record_missing([one], tmp_path, notes.append)
        assert (len(tried), notes.count("once more: too late")) == (record.ATTEMPTS, record.ATTEMPTS - 1)
        failures += [CaseError("too late")] * record.ATTEMPTS
        with pytest.raises(CaseError, match="too late"):
            record.record_missing([one], tmp_path, notes.append)

    def test_a_recorder_that_attached_too_late_counts_for_nothing(self, tmp_path: Path) -> None:
        one = record.runs_of(STORY.variants["baseline"], tmp_path)[0]
        self.make(one, record.command_shown(one.variant))
        one.load.write_text(json.dumps({"started_ns": 1_000_000_000, "recipe": {"attach_s": 2}}))
        one.summary.write_text(json.dumps({"targets": [{"start_ns": 3_500_000_000}]}))
        with pytest.raises(CaseError, match=r"baseline, run 1: the probes were attached 2\.5 s after the load's start"):
            record.summarise(one)
        assert not one.is_made


class TestExamine:
    def test_the_typical_run_is_the_one_nearest_to_the_median(self) -> None:
        runs = [{"refused": refused, "worst_ns": worst} for refused, worst in ((9, 1), (5, 8), (5, 4), (0, 2))]
        assert examine.typical_run(runs) == 2
        assert examine.typical_run([{"refused": 0, "worst_ns": None}]) == 0

    def test_cuts_out_the_sections_asked_for(self) -> None:
        output = "Blocked.\n\nStalls: two\n  one\n\nFunctions\n  f\n"
        assert examine.cut_out(output, ()) == output.rstrip()
        assert examine.cut_out(output, ("", "Functions")) == "Blocked.\n\nFunctions\n  f"
        with pytest.raises(CaseError, match='no section that begins with "Queues"'):
            examine.cut_out(output, ("Queues",))

    def test_nothing_recorded_is_one_line_with_the_remedy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("STALLSCOPE_CASE", str(tmp_path))
        assert run.main(["write"]) == 1
        assert capsys.readouterr().err == (
            f"run.py: nothing is recorded in {tmp_path}; run vagrant/case/run.py record\n"
        )


class TestTable:
    def test_has_a_cell_for_every_column(self) -> None:
        runs = [figures.measure(SUMMARY, LOAD), figures.measure({**SUMMARY, "elapsed_ns": 5_000_000_000}, LOAD)]
        variant = {"name": "baseline", "about": "as it was", "build": "2.8.17", "runs": runs}
        row = cells(variant, STORM)
        assert len(row) == len(headings(STORM))
        assert row[:3] == ["baseline", "2.8.17", "2"]
        assert row[headings(STORM).index("connections refused")] == "11"
        assert row[headings(STORM).index("time in trims")] == "30% [20% to 40%]"
        shown = transposed([variant], STORM).splitlines()
        assert shown[0] == "baseline (as it was)"
        assert len(shown) == len(headings(STORM))


class TestStudy:
    def test_is_what_its_document_and_its_template_make(self) -> None:
        assert (ROOT / "CASE-STUDY.md").read_text(encoding="utf-8") == study.render(WRITTEN)

    def test_shows_pictures_that_are_there_and_small(self) -> None:
        for picture in WRITTEN["pictures"].values():
            path = ROOT / study.PICTURES / picture["file"]
            assert path.stat().st_size <= examine.MAX_PICTURE_BYTES
            assert f"]({study.PICTURES}/{picture['file']})" in (ROOT / "CASE-STUDY.md").read_text(encoding="utf-8")

    def test_a_typed_figure_is_refused(self, tmp_path: Path) -> None:
        template = tmp_path / "study.j2"
        template.write_text("It took {{ 1 + 1 }} s\nand {% if 3 %}4 s{% endif %}.\n{# 5\n6 #}\n", encoding="utf-8")
        assert study.typed_figures(template.read_text(encoding="utf-8")) == [(2, "and {% if 3 %}4 s{% endif %}.")]
        with pytest.raises(
            CaseError, match=r"^study\.j2:2 has a typed figure: and .*; take it from the run's document"
        ):
            study.render(WRITTEN, template)

    def test_a_name_that_was_not_measured_is_refused(self, tmp_path: Path) -> None:
        template = tmp_path / "study.j2"
        template.write_text("{{ variants.baseline.colour }}\n", encoding="utf-8")
        with pytest.raises(CaseError, match=r"study\.j2 needs what was not measured: .*colour"):
            study.render(WRITTEN, template)

    def test_prose_that_the_run_does_not_bear_out_is_refused(self) -> None:
        document = copy.deepcopy(WRITTEN)
        document["variants"]["baseline"]["runs"][0]["refused"] = 0
        with pytest.raises(
            CaseError, match="in this run it is not so that in every run of the old server connections are"
        ):
            study.render(document)

    @pytest.mark.parametrize(
        ("claim", "variant", "metric", "value"),
        [
            ("every refused connection of the old server", "baseline", "refused_by_stall", 0),
            ("the kernel counted the refusals", "baseline", "counted", 0),
            ("with the larger backlog the server stalls", "backlog", "worst_ns", 1),
            ("the larger backlog makes more clients", "backlog", "reply_timeouts", 0),
            ("the larger backlog holds a shorter storm", "shorter-backlog", "refused", 1),
            ("with the patch the longest PING", "small-patched", "ping_max_ms", 0),
            ("in no recording of the newest server", "upgrade-5", "worst_ns", 2e8),
            ("the patched server refuses connections", "patched", "refused", 0),
            ("the patched server never trims", "small-patched", "trims", 1),
            ("small buffers alone refuse nobody", "article", "refused", 1),
            ("with small buffers alone the longest", "article", "tick_max_ns", 1e9),
            ("je_pages_purge still runs", "patched", "purges", 0),
            ("the newer servers visit more", "upgrade-3", "visits_per_tick", 50),
            ("the newer servers refuse nobody", "upgrade-5", "refused", 1),
            ("the newer servers still trim small", "small-5", "trims", 0),
        ],
    )
    def test_every_claim_fails_on_a_run_that_contradicts_it(
        self, claim: str, variant: str, metric: str, value: float
    ) -> None:
        assert failing(WRITTEN) == []
        document = copy.deepcopy(WRITTEN)
        for one in document["variants"][variant]["runs"]:
            one[metric] = value
        assert [says for says in failing(document) if says.startswith(claim)], failing(document)

    def test_claims_about_the_kernel_fail_when_a_refusal_was_not_seen_or_seen_elsewhere(self) -> None:
        document = copy.deepcopy(WRITTEN)
        typical = document["variants"]["kernel"]["typical"]
        typical["reconciliation"][0]["matches"][0]["observed"] -= 1
        typical["requests"]["listeners"][0]["events"].append({"name": "SYN refused otherwise", "count": 1, "rows": 1})
        assert [says for says in failing(document) if says.startswith("in the machine every refusal was seen")]
        assert [says for says in failing(document) if says.startswith("on loopback every refusal was decided")]

    def test_claims_about_the_whole_run_fail_too(self) -> None:
        document = copy.deepcopy(WRITTEN)
        document["conditions"]["lost"] = 1
        for one in document["memory"]:
            one["settled"] |= {"used_bytes": 1, "resident_bytes": 1}
        document["variants"]["baseline"]["typical"]["worst"]["clients"] = 51
        general = {claim.says for claim in CLAIMS if not claim.variants} | {failing(document)[1]}
        assert general <= set(failing(document))
        assert len(failing(document)) >= 4

    def test_leaves_out_what_was_not_run(self) -> None:
        document = copy.deepcopy(WRITTEN)
        for name in ("kernel", "kernel-delay"):
            document["variants"].pop(name, None)
        written = study.render(document)
        assert "Every refusal, in the kernel" not in written
        assert "netem" not in written
