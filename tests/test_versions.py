"""One numeric parser for every version there is."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet

from hal._version import Version

ORDERED = [
    # Each text is older than the next one of its row.
    ("0.2.3", "0.2.10"),
    ("12.2", "12.3", "12.10", "13.0"),
    ("2.9.0", "2.10.0a0+git1234", "2.10.0"),
    ("2.13.0.dev20261001", "2.13.0"),
    ("6.4.43482-0f2d60242", "7.0"),
    ("535.129.03", "550.54.15", "580.159.04"),
    ("2.7.1", "2.11.0.post2+musa5.2.0"),
    ("3.6.0", "3.10.0"),
    ("4.3.0", "4.3.6", "5.2.0"),
]

PARSED = [
    ("12.10.1", (12, 10, 1)),
    ("13", (13,)),
    ("12.8a", (12, 8)),
    ("12.4+cu", (12, 4)),
    ("v1.2", (1, 2)),
    ("6.4.43482-0f2d60242", (6, 4, 43482)),
    ("6.18.44-generic", (6, 18, 44)),
    ("2.10.0a0+git", (2, 10, 0)),
    ((12, 10), (12, 10)),
    ([9, 0], (9, 0)),
    (" 3.6.0 ", (3, 6, 0)),
]


@pytest.mark.parametrize("row", ORDERED, ids=lambda row: row[0])
def test_versions_are_ordered_by_number(row: tuple[str, ...]) -> None:
    # requirement E1, E2, P21
    versions = [Version.parse(text) for text in row]
    assert all(older < newer for older, newer in itertools.pairwise(versions))
    assert max(versions) is versions[-1]


@pytest.mark.parametrize(("text", "release"), PARSED, ids=[str(text) for text, _ in PARSED])
def test_release_numbers(text: object, release: tuple[int, ...]) -> None:
    # requirement E1, E2
    version = Version.parse(text)
    assert version.known
    assert version.release == release


@pytest.mark.parametrize("text", [None, "", "unknown", "git-main", "N/A", "cu12", [], "1" * 300])
def test_what_has_no_number_is_unknown_and_says_why(text: object) -> None:
    # requirement E1
    version = Version.parse(text)
    assert not version.known
    assert version.reason
    assert str(version) == "unknown"
    assert version.satisfies(">=1") is None


@pytest.mark.parametrize(
    ("text", "specifier", "met"),
    [
        ("12.10", ">=12.3", True),
        ("12.3", ">=12.3", True),
        ("12.2", ">=12.3", False),
        ("13.0", ">=12.3,<14", True),
        ("2.10.0a0+git", ">=2.10", False),
        ("2.10.0a0+git", ">=2.9", True),
        ("12.8a", ">=12.8", True),
        ("0.2.10", ">0.2.3", True),
        ("3.0.0", "==3.0.0", True),
    ],
)
def test_specifiers(text: str, specifier: str, met: bool) -> None:
    # requirement E1, P21
    assert Version.parse(text).satisfies(specifier) is met


def test_a_bad_specifier_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a version specifier"):
        Version.parse("1.0").satisfies("newest")


def test_trailing_zeros_do_not_matter() -> None:
    assert Version.parse("12") == Version.parse("12.0.0")
    assert hash(Version.parse("12")) == hash(Version.parse("12.0.0"))


def test_an_unknown_version_is_neither_older_nor_newer() -> None:
    # requirement E1
    unknown, known = Version.unknown("no driver"), Version.parse("1.0")
    assert not unknown < known
    assert not unknown > known
    assert unknown != known
    assert unknown == Version.unknown("another reason")


@given(st.one_of(st.text(), st.none(), st.integers(), st.floats(), st.lists(st.integers()), st.binary()))
def test_parsing_never_raises(value: object) -> None:
    # requirement E1, E2
    version = Version.parse(value)
    assert version.known or version.reason
    assert version == version
    assert isinstance(hash(version), int)


_NUMBERS = st.lists(st.integers(0, 10**6), min_size=1, max_size=4).map(tuple)


@given(_NUMBERS, _NUMBERS)
def test_the_order_is_that_of_the_numbers(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    # requirement E1
    width = max(len(left), len(right))
    padded = [(*number, *(0,) * (width - len(number))) for number in (left, right)]
    one, other = Version.parse(left), Version.parse(".".join(map(str, right)))
    assert (one < other) == (padded[0] < padded[1])
    assert (one == other) == (padded[0] == padded[1])
    assert one.satisfies(f">={other}") == (padded[0] >= padded[1])


@given(st.text(alphabet="0123456789.abrcdevpost+-", max_size=20), st.text(alphabet="0123456789.abrc+-", max_size=20))
def test_any_two_texts_compare_one_way_or_not_at_all(left: str, right: str) -> None:
    # requirement E1
    one, other = Version.parse(left), Version.parse(right)
    outcomes = [one < other, one == other, one > other]
    assert sum(outcomes) == (1 if one.known and other.known else int(one == other))


@given(
    st.from_regex(
        r"[0-9]{1,2}(\.[0-9]{1,2}){0,3}((a|b|rc)[0-9])?(\.post[0-9])?(\.dev[0-9])?(\+cu[0-9]{3})?", fullmatch=True
    ),
    _NUMBERS,
)
def test_a_lower_bound_alone_is_judged_as_packaging_does(text: str, least: list[int]) -> None:
    # requirement E1
    bound = f">={'.'.join(map(str, least))}"
    assert Version.parse(text).satisfies(bound) is SpecifierSet(bound).contains(text, prereleases=True)
