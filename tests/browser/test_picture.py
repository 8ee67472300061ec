"""Pictures for tickets, made by the command itself."""

from __future__ import annotations

import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from opened import ARTEFACTS
from recordings import DATA

STALLSCOPE = str(Path(sys.executable).with_name("stallscope"))


@pytest.fixture(scope="module")
@staticmethod
def made(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with both pictures and nothing else; ``browser`` skips where there is none."""
    assert browser
    folder = tmp_path_factory.mktemp("pictures")
    words = ["report", str(DATA / "known-call.stall"), "--png", str(folder / "x.png"), "--svg", str(folder / "x.svg")]
    subprocess.run([STALLSCOPE, *words], check=True, capture_output=True, timeout=300)
    return folder


def test_only_the_pictures_are_left(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == ["x.png", "x.svg"]


def test_png(made: Path) -> None:
    data = (made / "x.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1920
    assert 1000 < height < 2000
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    (ARTEFACTS / "picture.png").write_bytes(data)


def test_svg_says_what_the_page_says(made: Path) -> None:
    text = " ".join("".join(node.itertext()) for node in ElementTree.parse(made / "x.svg").iter() if "text" in node.tag)
    assert "Redis was blocked for 620 ms" in text
    assert "Accept queue" in text
    assert "sdsRemoveFreeSpace" in text
