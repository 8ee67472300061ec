"""The page in a real browser, driven as people do: mouse, keyboard, dark mode, paper."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from opened import DESKTOP, LAPTOP, Open, Opened
from pages import imported, several_servers, write_page
from recordings import DATA, PURGE, Builder, add_storm, manifest, quiet

from stallscope.tracer.imports.run import run_import

STALL = "stall with refused connections"
TRIM = "sdsRemoveFreeSpace"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the pages of all golden recordings."""
    folder = tmp_path_factory.mktemp("pages")
    for source in DATA.glob("*.stall"):
        write_page(Path(shutil.copy(source, folder)))
    return folder


@pytest.fixture
def storm(opened: Open, made: Path) -> Opened:
    return opened(made / "known-call.html")


def cell_texts(shown: Opened, selector: str) -> list[str]:
    return [text.strip() for text in shown.page.locator(selector).all_text_contents()]


class TestOpening:
    @pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("*.stall")))
    def test_every_golden_recording(self, opened: Open, made: Path, name: str) -> None:
        """The fixture asserts that there was no complaint and no request."""
        shown = opened(made / f"{name}.html")
        shown.window()
        shown.picture(f"golden-{name}", whole=True)

    def test_lanes_are_in_their_order(self, storm: Opened) -> None:
        titles = cell_texts(storm, "#chart .annotation-text")
        order = ["Refused", "Accept queue", "Connections per second", "Stalls", "Calls", "Latency heat map"]
        found = [next(index for index, title in enumerate(titles) if title.startswith(word)) for word in order]
        tops = [storm.page.locator("#chart .annotation-text").nth(index).bounding_box() for index in found]
        heights = [box["y"] for box in tops if box]
        assert heights == sorted(heights)
        assert len(heights) == len(order)

    def test_everything_is_drawn(self, storm: Opened) -> None:
        refused = storm.traces("refusals")
        assert sum(sum(trace["y"]) for trace in refused) == 43
        assert max(max(trace["y"]) for trace in storm.traces("queue")) == 512
        bars = {trace["name"]: len(trace["x"]) for trace in storm.traces("flame") if trace["type"] == "bar"}
        assert bars[TRIM] == 5
        assert storm.page.inner_text("#verdict").startswith("Redis was blocked for 620 ms")

    def test_a_recording_with_nothing_wrong_says_so(self, opened: Open, tmp_path: Path) -> None:
        recording = quiet(Builder().span(PURGE, 100, 1, 4096), 900).write(tmp_path / "quiet.stall", 1000)
        shown = opened(write_page(recording))
        assert shown.page.inner_text("h1.calm").startswith("Nothing wrong was seen in 1.00 s")
        assert "nothing was refused" in cell_texts(shown, "#chart .annotation-text")
        assert shown.page.is_disabled("#next")
        shown.page.keyboard.press("n")
        assert shown.page.is_hidden("#dock")
        shown.picture("nothing-wrong")

    def test_without_scripts_the_numbers_are_there(self, opened: Open, made: Path) -> None:
        shown = opened(made / "known-call.html", java_script_enabled=False)
        text = shown.page.inner_text("body")
        assert "Longest stall: 620 ms" in text
        assert "sdsRemoveFreeSpace" in shown.page.inner_text("#stalls")

    def test_what_is_thinned_is_counted(self, opened: Open, tmp_path: Path) -> None:
        builder = Builder()
        for index in range(400):
            builder.span(PURGE, index * 2.5, 0.5 + index / 1000, index)
        builder.span(PURGE, 1500, 30, 1)
        shown = opened(write_page(builder.write(tmp_path / "many.stall", 2000), budget=100))
        title = next(text for text in cell_texts(shown, "#chart .annotation-text") if text.startswith("Calls"))
        found = re.fullmatch(r"Calls: (\d+) calls? one by one, (\d+) shorter ones as density", title)
        assert found is not None, title
        assert int(found[1]) + int(found[2]) == 401
        assert "301 shorter calls are drawn as density" in shown.page.inner_text(".trust")
        (heat,) = [trace for trace in shown.traces("flame") if trace["type"] == "heatmap"]
        texts = " ".join(text for row in heat["hovertext"] for text in row)
        counts = [int(number) for number in re.findall(r"<b>(\d+) calls?</b>", texts)]
        assert sum(counts) == int(found[2])


class TestMouse:
    def test_hover_over_a_call(self, storm: Opened) -> None:
        storm.page.keyboard.press("n")
        text = storm.hover("flame", TRIM, 2)
        for part in (TRIM, "latency 118 ms, self 98.0 ms", "called by clientsCronResizeQueryBuffer (120 ms)",
                     "length_bytes 28.0 MB", "free_bytes 28.0 MB"):  # fmt: skip
            assert part in text
        storm.picture("hover")

    def test_hover_over_refused_connections(self, storm: Opened) -> None:
        storm.page.keyboard.press("n")
        text = storm.hover("refusals", "accept queue full, sampled")
        assert "refused" in text
        assert "cause: stall" in text

    def test_click_on_a_stall(self, storm: Opened) -> None:
        before = storm.window()
        storm.page.mouse.click(*storm.place_of("stalls", STALL))
        start, end = storm.until_zoomed(before)
        assert 0.9 < start < 1.0
        assert 1.62 < end < 1.75
        page = storm.page
        assert page.inner_text("#dock-title").startswith("Stall 1 of 1: 620 ms, 43 refused · at 1.0000 s")
        page.wait_for_selector("#icicle .slice")
        labels = cell_texts(storm, "#icicle .slicetext")
        assert {"stall 620 ms", "serverCron 618 ms", f"{TRIM} 590 ms"} <= set(labels)
        assert page.inner_text("#stall-calls-title") == "17 calls"
        assert page.locator("#stall-calls tbody tr").count() == 17
        assert cell_texts(storm, "#stall-calls tbody tr:first-child td")[1:4] == ["serverCron", "618 ms", "2.00 ms"]
        assert page.inner_text("#stall-refusals-title") == "43 refused"
        assert cell_texts(storm, "#stall-refusals tbody td:nth-child(2)") == ["11", "20", "10", "2"]
        storm.picture("stall")

    def test_stalls_of_one_by_one_refusals_name_the_clients(self, opened: Open, made: Path) -> None:
        shown = opened(made / "refused.html")
        shown.page.keyboard.press("n")
        clients = cell_texts(shown, "#stall-refusals tbody td:nth-child(3)")
        assert len(clients) == 43
        assert clients.count("127.0.0.1:40000") == 3
        ways = set(cell_texts(shown, "#stall-refusals tbody td:nth-child(4)"))
        assert ways == {"SYN refused: accept queue full", "third ACK refused silently: accept queue full"}

    def test_drag_zooms_all_lanes(self, storm: Opened) -> None:
        before = storm.window()
        box = storm.page.locator("#chart .nsewdrag").nth(1).bounding_box()
        assert box is not None
        y = box["y"] + box["height"] / 2
        storm.page.mouse.move(box["x"] + box["width"] / 4, y)
        storm.page.mouse.down()
        storm.page.mouse.move(box["x"] + box["width"] / 2, y, steps=4)
        storm.page.mouse.up()
        start, end = storm.until_zoomed(before)
        assert (start, end) == (pytest.approx(1.0, abs=0.02), pytest.approx(2.0, abs=0.02))
        assert "zoomed in" in storm.page.inner_text("#window")
        storm.page.mouse.dblclick(box["x"] + 20, y)
        assert storm.until_zoomed((start, end)) == before

    def test_click_on_a_call_zooms_to_it(self, storm: Opened) -> None:
        storm.page.keyboard.press("n")
        before = storm.window()
        storm.page.mouse.click(*storm.place_of("flame", TRIM, 1))
        start, end = storm.until_zoomed(before)
        assert start == pytest.approx(1.126 - 0.15 * 0.118, abs=1e-6)
        assert end == pytest.approx(1.244 + 0.15 * 0.118, abs=1e-6)

    def test_evidence_leads_to_its_place(self, storm: Opened) -> None:
        before = storm.window()
        storm.page.click("#findings details.cause summary")
        storm.page.click("#findings details.cause li button")
        start, end = storm.until_zoomed(before)
        assert start < 1.0 < 1.6 < end

    def test_tables_are_sorted(self, storm: Opened) -> None:
        page = storm.page
        page.click("#slowest th:nth-child(4) button")
        own = [float(key) for key in page.eval_on_selector_all(
            "#slowest tbody td:nth-child(4)", "cells => cells.map(cell => cell.dataset.key)")]  # fmt: skip
        assert own == sorted(own, reverse=True)
        assert page.get_attribute("#slowest th:nth-child(4)", "aria-sort") == "descending"
        page.click("#slowest th:nth-child(4) button")
        assert page.get_attribute("#slowest th:nth-child(4)", "aria-sort") == "ascending"
        assert cell_texts(storm, "#slowest tbody td:nth-child(4)")[0] == "1.50 ms"
        page.focus("#slowest th:nth-child(2) button")
        page.keyboard.press("Enter")
        names = cell_texts(storm, "#slowest tbody td:nth-child(2)")
        assert names == sorted(names)

    def test_clocks(self, storm: Opened) -> None:
        page = storm.page
        page.click("[data-clock=utc]")
        assert cell_texts(storm, "#stalls tbody td")[0] == "15:06:41.0000"
        assert page.inner_text("#window").startswith("15:06:40")
        labels = cell_texts(storm, "#chart .xaxislayer-above .xtick text")
        assert "15:06:41" in {label.rstrip("0").rstrip(".") for label in labels}
        page.click("[data-clock=start]")
        assert cell_texts(storm, "#stalls tbody td")[0] == "1.0000 s"

    def test_heat_map_of_one_function(self, storm: Opened) -> None:
        storm.page.select_option("#heat-function", label=TRIM)
        storm.page.wait_for_function(
            "[...document.querySelectorAll('#chart .annotation-text')].some(item => item.textContent.startsWith("
            "'Latency heat map: sdsRemoveFreeSpace'))"
        )
        (trace,) = [item for item in storm.traces("heat") if item["type"] == "heatmap"]
        assert sum("1 call" in text for row in trace["hovertext"] for text in row) == 5


class TestKeyboard:
    def test_stalls_one_after_the_other(self, opened: Open, made: Path) -> None:
        shown = opened(made / "two-stalls.html")
        title = shown.page.locator("#dock-title")
        for key, number in (("n", 1), ("n", 2), ("n", 1), ("p", 2)):
            shown.page.keyboard.press(key)
            assert title.inner_text().startswith(f"Stall {number} of 2")
        shown.page.keyboard.press("Escape")
        assert shown.page.is_hidden("#dock")
        shown.page.keyboard.press("w")
        assert title.inner_text().startswith("Stall 1 of 2"), "both are as bad"

    def test_zoom_and_reset(self, storm: Opened) -> None:
        page, whole = storm.page, storm.window()
        page.keyboard.press("+")
        near = storm.until_zoomed(whole)
        assert near[1] - near[0] == pytest.approx((whole[1] - whole[0]) / 2)
        page.keyboard.press("ArrowRight")
        right = storm.until_zoomed(near)
        assert right[0] > near[0]
        page.keyboard.press("-")
        assert storm.until_zoomed(right) == whole
        page.keyboard.press("+")
        page.keyboard.press("0")
        assert storm.window() == whole

    def test_a_stall_can_be_reached_with_tab(self, storm: Opened) -> None:
        page = storm.page
        page.focus("#chart g.point[data-stall]")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("stall of 620 ms")
        before = storm.window()
        page.keyboard.press("Enter")
        storm.until_zoomed(before)
        assert page.is_visible("#dock")

    def test_a_row_of_a_table(self, storm: Opened) -> None:
        before = storm.window()
        storm.page.focus("#stalls tbody tr")
        storm.page.keyboard.press("Enter")
        storm.until_zoomed(before)

    def test_help(self, storm: Opened) -> None:
        storm.page.keyboard.press("?")
        assert "next and previous stall" in storm.page.inner_text("#keys")
        before = storm.window()
        storm.page.keyboard.press("+")
        assert storm.window() == before, "keys of the chart are not for a dialog"
        storm.page.keyboard.press("Escape")
        assert storm.page.is_hidden("#keys")


class TestLooks:
    def test_dark(self, opened: Open, made: Path) -> None:
        shown = opened(made / "known-call.html", LAPTOP, color_scheme="dark")
        background = "document.getElementById('chart')._fullLayout.paper_bgcolor"
        assert shown.page.evaluate(background) == "#1a2028"
        shown.page.keyboard.press("n")
        shown.picture("dark")
        shown.page.keyboard.press("d")
        shown.page.wait_for_function(f"{background} === '#ffffff'")
        shown.page.emulate_media(color_scheme="light")
        shown.page.keyboard.press("d")
        shown.page.wait_for_function(f"{background} === '#1a2028'")

    def test_on_paper(self, opened: Open, made: Path) -> None:
        shown = opened(made / "known-call.html", color_scheme="dark")
        shown.page.emulate_media(media="print")
        shown.page.wait_for_function("document.getElementById('chart')._fullLayout.paper_bgcolor === '#ffffff'")
        assert shown.page.is_hidden("#toolbar")
        width = shown.page.evaluate("document.getElementById('chart')._fullLayout.width")
        assert width <= 1040, "a landscape page"
        scrolled = "document.querySelectorAll('.scroll')"
        assert shown.page.evaluate(f"[...{scrolled}].every(box => box.scrollHeight <= box.clientHeight + 1)")
        shown.picture("print", whole=True)

    @pytest.mark.parametrize("viewport", [DESKTOP, LAPTOP], ids=["1280", "laptop"])
    @pytest.mark.parametrize("name", ["known-call", "refused"])
    def test_nothing_is_wider_than_the_screen(
        self, opened: Open, made: Path, viewport: dict[str, int], name: str
    ) -> None:
        shown = opened(made / f"{name}.html", viewport)
        shown.page.keyboard.press("n")
        assert shown.page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        shown.picture(f"{name}-{viewport['width']}")

    def test_lane_titles_and_legends_do_not_overlap(self, storm: Opened) -> None:
        boxes = storm.page.evaluate(
            "['#chart .annotation-text', '#chart [class^=legend] .traces'].map(selector =>"
            "[...document.querySelectorAll(selector)].map(item => item.getBoundingClientRect())"
            ".map(({left, right, top, bottom}) => ({left, right, top, bottom})))"
        )
        titles, entries = boxes
        assert titles
        assert entries
        for title in titles:
            for entry in entries:
                beside = title["right"] <= entry["left"]
                apart = beside or title["bottom"] <= entry["top"] or entry["bottom"] <= title["top"]
                assert apart, (title, entry)


class TestSeveralServers:
    @pytest.fixture
    def shown(self, opened: Open, tmp_path: Path) -> Opened:
        return opened(write_page(several_servers(tmp_path / "several.stall")), LAPTOP)

    def test_are_told_apart(self, shown: Opened) -> None:
        labels = cell_texts(shown, "#chart .annotation-text")
        for name in ("127.0.0.1:6379, main thread", "127.0.0.1:6379, thread 4713", "127.0.0.1:6380, main thread"):
            assert name in labels
        stalls = [trace for trace in shown.traces("stalls") if trace["name"] == STALL]
        assert stalls[0]["y"] == [0, 1]
        queues = [trace["name"] for trace in shown.traces("queue")]
        assert {"127.0.0.1:6379", "127.0.0.1:6380"} <= set(queues)
        assert cell_texts(shown, "#stalls tbody td:nth-child(2)") == ["127.0.0.1:6379", "127.0.0.1:6380"]
        refused = {trace["name"]: sum(trace["y"]) for trace in shown.traces("refusals")}
        assert refused == {f"accept queue full, sampled, 127.0.0.1:{port}": 43 for port in (6379, 6380)}
        shown.picture("several-servers", whole=True)

    def test_a_stall_shows_the_calls_of_its_thread(self, shown: Opened) -> None:
        shown.page.keyboard.press("n")
        assert shown.page.inner_text("#stall-calls-title") == "17 calls"
        assert shown.page.inner_text("#stall-refusals-title") == "43 refused"

    def test_a_server_attached_later_has_a_band(self, shown: Opened) -> None:
        assert any("not attached" in text for text in cell_texts(shown, "#chart .annotation-text"))


class TestBands:
    def test_losses(self, opened: Open, made: Path) -> None:
        shown = opened(made / "with-losses.html")
        bands = shown.page.evaluate(
            "document.getElementById('chart').layout.shapes.filter(shape => shape.name?.startsWith('band'))"
            ".map(({name, x0, x1}) => [name, x0, x1])"
        )
        assert bands == [["band lost", 0, 4]]
        labels = cell_texts(shown, "#chart .annotation-text")
        assert any("events lost: 2 of sdsRemoveFreeSpace, 3 of je_pages_purge" in text for text in labels)
        assert shown.page.locator("#chart .shapelayer path").count() >= 2, "hatched, not only coloured"

    def test_cut_short(self, opened: Open, made: Path) -> None:
        shown = opened(made / "cut-short.html")
        assert shown.window()[1] > 1.505
        names = shown.page.evaluate("document.getElementById('chart').layout.shapes.map(shape => shape.name)")
        assert "band cut short" in names


class TestImported:
    def test_further_lanes(self, opened: Open, tmp_path: Path) -> None:
        shown = opened(write_page(imported(tmp_path / "all.stall")))
        packets = {trace["name"]: sum(trace["y"]) for trace in shown.traces("packets")}
        assert packets == {"SYN": 20, "SYN retransmitted": 20}
        (thin, bar) = shown.traces("spans")
        assert bar["x"] == [0.015]
        assert thin["x"][0] >= 1.0, "Redis tells whole seconds"
        assert "SLOWLOG 15.0 ms" in bar["hovertext"][0]
        (series,) = shown.traces("samples")
        assert series["y"] == [100, 107, 114, 121]
        shown.page.select_option("#sample", label="used_memory")
        shown.page.wait_for_function(
            "document.getElementById('chart').data.find(trace => trace.meta === 'samples').y[0] === 1e9"
        )
        shown.picture("imported", whole=True)

    def test_nothing_but_imported_rows(self, opened: Open, tmp_path: Path) -> None:
        imported(tmp_path / "all.stall")
        alone = tmp_path / "alone.stall"
        run_import((tmp_path / "storm.pcap",), None, alone, (6379,), 0, force=False, command=("stallscope", "import"))
        shown = opened(write_page(alone))
        assert {trace["name"] for trace in shown.traces("packets")} == {"SYN", "SYN retransmitted"}
        assert "Nothing was traced" in shown.page.inner_text("#verdict")
        shown.picture("imported-alone")


class TestText:
    def test_names_of_a_recording_are_only_text(self, opened: Open, tmp_path: Path) -> None:
        """The fixture asserts that nothing was loaded and nothing ran."""
        evil = "</script><img src=http://192.0.2.1/x onerror=alert(1)><a href='http://192.0.2.1'>x</a>"
        made = manifest()
        probes = tuple(replace(item, name=evil + item.name) if item.kind == "call" else item for item in made.probes)
        made = replace(made, probes=probes, listeners=(replace(made.listeners[0], address=evil),))
        recording = add_storm(Builder(made), 1000).write(tmp_path / "evil.stall", 2000)
        shown = opened(write_page(recording))
        dialogs: list[str] = []
        shown.page.on("dialog", lambda dialog: dialogs.append(dialog.message))
        shown.page.keyboard.press("n")
        assert evil in shown.hover("flame", evil.replace("<", "&lt;").replace(">", "&gt;") + TRIM, 1)
        assert shown.page.locator("img, #chart a, #dock a").count() == 0
        assert evil + TRIM in cell_texts(shown, "#stall-calls tbody td:nth-child(2)")
        assert dialogs == []


class TestSampledStacks:
    """The recording of three stalls, of which the first is keysCommand's."""

    @pytest.fixture
    def shown(self, opened: Open, made: Path) -> Opened:
        page = opened(write_page(made / "sampled.stall"), DESKTOP)
        page.page.click("#worst")
        page.page.wait_for_selector("#icicle .slice")
        return page

    def test_of_a_stall_are_a_flame_graph(self, shown: Opened) -> None:
        labels = cell_texts(shown, "#icicle .slicetext")
        assert "stall 400 ms, 35 samples" in labels
        assert "keysCommand 90.0%" in labels
        assert not [label for label in labels if label.startswith(("main", "aeMain"))]
        assert shown.page.get_attribute("[data-kind=samples]", "aria-pressed") == "true"
        shown.picture("sampled-stall")

    def test_give_way_to_traced_calls_and_come_back(self, shown: Opened) -> None:
        shown.page.click("[data-kind=calls]")
        shown.page.wait_for_function("!document.querySelector('#icicle').textContent.includes('keysCommand')")
        assert any(label.startswith("serverCron") for label in cell_texts(shown, "#icicle .slicetext"))
        shown.page.click("#dock-next")
        shown.page.wait_for_function("document.getElementById('dock-title').textContent.startsWith('Stall 2')")
        assert shown.page.get_attribute("[data-kind=calls]", "aria-pressed") == "true"
        shown.page.click("[data-kind=samples]")
        shown.page.wait_for_function("document.querySelector('#icicle').textContent.includes('debugCommand')")

    def test_are_a_table_too(self, shown: Opened) -> None:
        rows = shown.page.locator("#sampled tbody tr")
        names = [rows.nth(place).locator("td").first.text_content() for place in range(rows.count())]
        assert "keysCommand" in names
        assert "add --probe keysCommand" in (shown.page.text_content("#findings") or "")

    def test_are_not_offered_where_there_are_none(self, opened: Open, made: Path) -> None:
        page = opened(write_page(made / "known-call.stall"), DESKTOP)
        page.page.click("#worst")
        page.page.wait_for_selector("#icicle .slice")
        assert page.page.is_hidden("#icicle-kind")
        assert page.page.locator("#sampled-section").count() == 0
