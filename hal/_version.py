"""One numeric parser for every version there is: torch, CUDA, HIP, MUSA, drivers, Triton, packages.

Parsing never raises. What cannot be read is an *unknown* version that keeps its text and a reason; comparing it is
always false, and :meth:`Version.satisfies` answers ``None``.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from hal_ops import record

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version as PublicVersion

__all__ = ["Version"]

_BARE_LETTER = r"[0-9][a-zA-Z]\Z"
_LEADING = re.compile(r"\s*[vV]?([0-9]+(?:\.[0-9]+)*)", re.ASCII)


@record(frozen=True)
class Version:
    """A version as numbers, with the text that it came from.

    ``release`` holds the leading numbers (``(12, 10)`` for ``"12.10"``); trailing zeros do not matter to comparisons.
    Texts outside PEP 440 (``12.8a``, ``6.4.43482-0f2d60242``) compare by their leading numbers.
    """

    text: str
    release: tuple[int, ...] = ()
    reason: str = ""

    @classmethod
    def parse(cls, value: Any) -> Version:
        """Read a version from a string, a number tuple, a ``Version`` or None. Never raises."""
        if isinstance(value, Version):
            return value
        if value is None:
            return cls("", reason="no version is given")
        if isinstance(value, (tuple, list)):
            value = ".".join(str(part) for part in value)
        return _parse(str(value).strip())

    @classmethod
    def unknown(cls, reason: str) -> Version:
        """A version that could not be found, and why."""
        return cls("", reason=reason)

    @property
    def known(self) -> bool:
        """Whether there is a number to compare."""
        return bool(self.release)

    @functools.cached_property
    def _public(self) -> PublicVersion | None:
        return _public(self.text) if self.known else None

    def satisfies(self, specifier: str) -> bool | None:
        """Whether the version meets a specifier such as ``">=12.3,<14"``; ``None`` when it is unknown.

        Pre-releases count as what they are: ``2.10.0a0`` comes before ``2.10``.

        Raises:
            ValueError: ``specifier`` is not a PEP 440 specifier.
        """
        least = _plain(specifier[2:].lstrip()) if specifier.startswith(">=") else None
        if least is None:
            wanted = _specifier(specifier)
            return None if self._public is None else wanted.contains(self._public, prereleases=True)
        if not self.known:
            return None
        if _plain(self.text.partition("+")[0]) is not None:
            return _trimmed(self.release) >= _trimmed(least)
        return _public(str(self._public).partition("+")[0]) >= _public(specifier[2:])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Version):
            return NotImplemented
        if self._public is None or other._public is None:
            return self._public is other._public and self.text == other.text
        return self._public == other._public

    def __lt__(self, other: Version) -> bool:
        if not isinstance(other, Version):
            return NotImplemented
        return self._public is not None and other._public is not None and self._public < other._public

    def __le__(self, other: Version) -> bool:
        if not isinstance(other, Version):
            return NotImplemented
        return self._public is not None and other._public is not None and self._public <= other._public

    def __gt__(self, other: Version) -> bool:
        return NotImplemented if not isinstance(other, Version) else other < self

    def __ge__(self, other: Version) -> bool:
        return NotImplemented if not isinstance(other, Version) else other <= self

    def __hash__(self) -> int:
        return hash(self.text if self._public is None else self._public)

    def __str__(self) -> str:
        return self.text if self.known else "unknown"


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Version:
    match = _LEADING.match(text)
    if match is None:
        return Version(text, reason=f"no number at the start of {text!r}" if text else "the version is empty")
    if len(match[1]) > 200:
        return Version(text, reason="the version is longer than any real one")
    epoch = text.startswith("!", match.end())
    return Version(text, _public(text).release if epoch else tuple(map(int, match[1].split("."))))


def _public(text: str) -> PublicVersion:
    """As PEP 440 reads a text that starts with numbers; they alone count where it does not."""
    from packaging.version import InvalidVersion
    from packaging.version import Version as PublicVersion

    leading = _LEADING.match(text)
    assert leading is not None
    try:
        return PublicVersion(leading[1] if re.search(_BARE_LETTER, text) else text)
    except InvalidVersion:
        return PublicVersion(leading[1])


def _plain(text: str) -> tuple[int, ...] | None:
    """The numbers of a text that is nothing else, as most versions and bounds are. These are compared here, by PEP 440's
    rule: ``packaging`` takes milliseconds to import, and most processes need it for nothing else."""
    parts = text.split(".")
    return tuple(map(int, parts)) if text.isascii() and all(map(str.isdecimal, parts)) else None


def _trimmed(release: tuple[int, ...]) -> tuple[int, ...]:
    while release and release[-1] == 0:
        release = release[:-1]
    return release


@functools.lru_cache(maxsize=1024)
def _specifier(text: str) -> SpecifierSet:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        return SpecifierSet(text)
    except InvalidSpecifier as error:
        raise ValueError(f"{text!r} is not a version specifier such as '>=12.3,<14'") from error
