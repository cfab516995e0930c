"""The report as text, JSON and HTML: harmless whatever is in an image, whole, and of bounded size."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from ipe_emu.integrity.facts import NO_FACTS
from ipe_emu.rehearse import events
from ipe_emu.rehearse.events import Event
from ipe_emu.rehearse.report import as_json, html, summarise
from ipe_emu.rehearse.report.text import lines_of
from tests.rehearse.report.boots import FINAL, failed, good_boot, hostile_boot, judged, with_denial, without_loading

BOOTS: dict[str, list[Event]] = {
    "good": good_boot(),
    "denied": with_denial(judged(0.3, b"/tmp/app", NO_FACTS, FINAL, dev="tmpfs")),
    "failed": without_loading(failed(126), switch=True),
    "hostile": hostile_boot(),
    "nothing": [],
    "at-once": [events.Panicked(0.0, None, "at once")],
}


class _Page(HTMLParser):
    """Notes what a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.values: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.values += [value or "" for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> _Page:
    parser = _Page()
    parser.feed(page)
    parser.close()
    return parser


@pytest.mark.parametrize("boot", BOOTS)
def test_the_page_needs_nothing_and_does_nothing(boot: str) -> None:
    page = html.page(summarise(BOOTS[boot]))
    seen = parsed(page)
    assert not seen.tags & {"script", "img", "link", "iframe", "object", "base", "form", "b", "u", "a"}
    assert not any(name.startswith("on") or name in {"href", "src"} for name in seen.attributes)
    assert not any("://" in value for value in seen.values if value != "http://www.w3.org/2000/svg")
    assert "url(" not in page
    assert "@import" not in page
    assert all(character.isprintable() or character == "\n" for character in page)
    page.encode("ascii", "xmlcharrefreplace")  # no surrogates


@pytest.mark.parametrize("boot", BOOTS)
def test_the_picture_is_well_formed(boot: str) -> None:
    page = html.page(summarise(BOOTS[boot]))
    found = re.search("<svg.*</svg>", page, re.DOTALL)
    assert found
    picture = ET.fromstring(found[0])
    width, height = map(float, picture.attrib["viewBox"].split()[2:])
    for element in picture.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.get(name, 0)) <= width
        for name in ("y", "y1", "y2", "cy"):
            assert 0 <= float(element.get(name, 0)) <= height


def test_the_picture_shows_policies_denials_and_numbered_marks() -> None:
    page = html.page(summarise(BOOTS["denied"]))
    assert page.count('class="active"') == 2
    assert page.count('class="denied"') == 1
    assert page.count('class="real-root"') == 1
    text = "".join(parsed(page).text)
    for line in (
        "policy loaded: Lockdown 1.0.0",
        "unverified file executed",
        "/tmp/app on tmpfs",
        "in force",
        "real root",
    ):
        assert line in text
    assert page.count("<circle") == 6


def test_the_first_line_is_the_headline() -> None:
    for happened in BOOTS.values():
        summary = summarise(happened)
        lines = list(lines_of(summary))
        assert lines[0].startswith(summary.verdict.result.value)
        assert all(line.isprintable() for line in lines)


def test_the_text_tells_all_there_is() -> None:
    text = "\n".join(lines_of(summarise(BOOTS["denied"])))
    for part in (
        "active at the end: Lockdown 1.0.0",
        "[0.101] loaded by cat (pid 17)",
        "[0.125] deleted by sh (pid 12)",
        "denied: 1",
        "EXECUTE BPRM_CHECK /tmp/app on tmpfs: unverified file executed",
        "by 'DEFAULT action=DENY' of Lockdown 1.0.0; asked by sh",
        "so `DEFAULT action=DENY` (line 2) decides: DENY",
        "the phase change: 2 file(s)",
        "2 of them because boot_verified alone allowed them",
        "  /bin/busybox on rootfs (EXECUTE BPRM_CHECK, POLICY POLICY_LOAD)",
    ):
        assert part in text


def test_the_json_has_every_event() -> None:
    for name, happened in BOOTS.items():
        report = json.loads(as_json.dump(summarise(happened), status=1))
        assert (report["version"], report["status"]) == (1, 1)
        assert len(report["events"]) == len(happened), name
    report = json.loads(as_json.dump(summarise(BOOTS["denied"]), status=1))
    assert report["result"] == "denied"
    assert report["active_at_end"] == "Lockdown 1.0.0"
    (denial,) = report["denials"]
    assert denial["file"]["path"] == "/tmp/app"
    assert denial["name"].startswith("unverified file executed")
    assert [one["file"]["path"] for one in report["phase_change"]] == ["/init", "/bin/busybox", "/bin/busybox"]
    judged_events = [event for event in report["events"] if event["event"] == "Judged"]
    assert judged_events[-1]["decision"] == {"errno": "EACCES", "by": "DEFAULT action=DENY"}


def test_a_very_long_boot_makes_a_page_of_bounded_size() -> None:
    happened: list[Event] = [judged(n / 1000, b"/tmp/app-%d" % n, NO_FACTS, FINAL, dev="tmpfs") for n in range(5000)]
    page = html.page(summarise([*good_boot(), *happened]))
    assert len(page) < 2_000_000
    assert "and 4800 more, which the JSON has" in page
    text = list(lines_of(summarise([*good_boot(), *happened])))
    assert len(text) < 300
    assert any("and 4980 more" in line for line in text)
