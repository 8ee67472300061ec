"""Which functions of a server are reached, and from where: by direct calls, and by copies in other functions.

The catalogue names the callers a function is expected to have. They may be inlined themselves, so what is
looked for is the functions whose code holds the expected callers in this binary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stallscope.probes import catalogue
from stallscope.tracer.capture.binary import Binary
from stallscope.tracer.capture.bypass import Site
from stallscope.tracer.capture.symbol_table import Found, base_name


@dataclass(frozen=True)
class Candidate:
    """A symbol that may be probed for a function.

    Attributes:
        name: the symbol's name, without what marks a clone.
        binary: the file it is in.
        found: the symbol and its clones; empty when the name has no symbol there.
        wraps: names it may only pass the work on to.
    """

    name: str
    binary: Binary
    found: list[Found]
    wraps: tuple[str, ...] = ()


@dataclass
class CallPaths:
    """The callers and the inlined copies of functions, as far as they matter for the server's binary.

    Attributes:
        exe: the server's binary.
        full: confirm every caller by decoding the function it is in.
    """

    exe: Binary
    full: bool
    _places: dict[tuple[str, ...], frozenset[str]] = field(default_factory=dict)
    _holders: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)

    def is_reached(self, candidate: Candidate, wanted: frozenset[str]) -> bool:
        """Return whether one of the wanted functions, or anything if none is known, calls a candidate."""
        if candidate.binary is not self.exe:
            wanted = frozenset()
        if not wanted and candidate.binary.exports(candidate.name):
            return True
        return self._is_called(candidate, wanted)

    def callers(self, candidate: Candidate) -> set[str]:
        """Return the functions that call a candidate or take its address, other than by a short jump."""
        return {base_name(site.function) for site in self._sites(candidate) if site.function}

    def places_of(self, callers: tuple[str, ...]) -> frozenset[str]:
        """Return the functions whose code holds the expected callers and is itself reached."""
        if callers not in self._places:
            self._places[callers] = frozenset()  # a loop in the catalogue ends here
            places: set[str] = set()
            for name in callers:
                above = self._above(name)
                found = self.exe.find(name)
                if found and self.is_reached(Candidate(name, self.exe, found), above):
                    places.add(name)
                    continue
                holders = self.inlined_into(self.exe, name)
                on_path = {holder for holder in holders if holder in above}
                places |= on_path or set(holders) or above
            self._places[callers] = frozenset(places)
        return self._places[callers]

    def inlined_into(self, binary: Binary, name: str) -> tuple[str, ...]:
        """Return the reached functions that hold a copy of a function, by debug information."""
        key = (binary.path, name)
        if key not in self._holders:
            self._holders[key] = ()
            names = {base_name(binary.function_at(at)) for at in binary.dwarf.inlined_at(name)} - {"", name}
            reached = []
            for holder in sorted(names):
                above = self._above(holder) if binary is self.exe else frozenset()
                if self.is_reached(Candidate(holder, binary, binary.find(holder)), above):
                    reached.append(holder)
            self._holders[key] = tuple(reached)
        return self._holders[key]

    def is_wrapper(self, candidate: Candidate, reached: list[Candidate]) -> bool:
        """Return whether a candidate only passes the work on to another one that is reached."""
        own = frozenset([candidate.name])
        inner = [one for one in reached if one.name in candidate.wraps and one.binary is candidate.binary]
        return any(self._is_called(one, own) for one in inner)

    def working(self, candidate: Candidate) -> list[Found]:
        """Return the candidate's symbols, without a head that only jumps on to its own ``.part``.

        With both probed every call would be two spans; other functions that hold a copy of the head call
        the part directly, so the part alone sees every call that does some work.
        """
        parts = [one for one in candidate.found if ".part" in one.symbol]
        binary = candidate.binary
        heads = {site.function for part in parts for site in (*binary.callers(part), *binary.near_callers(part))}
        return [one for one in candidate.found if ".part" in one.symbol or one.symbol not in heads]

    def _above(self, name: str) -> frozenset[str]:
        listed = catalogue.functions().get(name)
        return self.places_of(listed.callers) if listed else frozenset()

    def _is_called(self, candidate: Candidate, wanted: frozenset[str]) -> bool:
        return _counts(self._sites(candidate), wanted) or _counts(self._near_sites(candidate), wanted)

    def _sites(self, candidate: Candidate) -> list[Site]:
        """Return who refers to a candidate from outside: neither itself nor one of its clones."""
        return [
            site
            for one in candidate.found
            for site in candidate.binary.callers(one, confirm=self.full)
            if base_name(site.function) != candidate.name
        ]

    def _near_sites(self, candidate: Candidate) -> list[Site]:
        """Return the short jumps to a candidate; they cost decoding, so they are asked for last."""
        return [
            site
            for one in candidate.found
            for site in candidate.binary.near_callers(one)
            if base_name(site.function) != candidate.name
        ]


def _counts(sites: list[Site], wanted: frozenset[str]) -> bool:
    return any(base_name(site.function) in wanted for site in sites) if wanted else bool(sites)
