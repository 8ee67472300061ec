"""A verification as JUnit XML, which CI systems read: one test case a limit, and one for comparability.

What is not verified is a failure; what is inconclusive is an error: neither lets a gate pass.
"""

from __future__ import annotations

from xml.etree import ElementTree

from stallscope.tracer.analysis.compare.checks import INCONCLUSIVE, NOT_VERIFIED
from stallscope.tracer.analysis.compare.verify import Verification

SUITE = "stallscope verify"


def junit(result: Verification) -> str:
    """Return the document as text."""
    suite = ElementTree.Element("testsuite", name=SUITE)
    for check in result.checks:
        case = ElementTree.SubElement(suite, "testcase", classname="stallscope.verify", name=_legal(check.limit))
        if check.verdict == NOT_VERIFIED:
            _add(case, "failure", NOT_VERIFIED, check.text)
        elif check.verdict == INCONCLUSIVE:
            _add(case, "error", INCONCLUSIVE, check.text)
        else:
            ElementTree.SubElement(case, "system-out").text = _legal(check.text)
    case = ElementTree.SubElement(suite, "testcase", classname="stallscope.verify", name="comparable")
    if result.obstacles:
        _add(case, "error", "not comparable", "\n".join(f"{one.kind}: {one.text}" for one in result.obstacles))
    suite.set("tests", str(len(suite)))
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(name, str(len(suite.findall(f"testcase/{tag}"))))
    ElementTree.SubElement(suite, "system-out").text = _legal(result.paragraph)
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _add(case: ElementTree.Element, tag: str, kind: str, text: str) -> None:
    first = text.partition("\n")[0]
    ElementTree.SubElement(case, tag, type=kind, message=_legal(first)).text = _legal(text)


def _legal(text: str) -> str:
    """Return text without the characters that XML cannot hold."""
    return "".join(one if one.isprintable() or one == "\n" else "?" for one in text)
