import pytest

from components.wording import counted, size


@pytest.mark.parametrize(
    ("count", "expected"), [(0, "0 threads"), (1, "1 thread"), (2, "2 threads"), (1234, "1,234 threads")]
)
def test_nouns_agree_with_their_number(count, expected):
    assert counted(count, "thread") == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (78_400, "78.4 kB"),
        (169_000_000, "169 MB"),
        (999_600, "1 MB"),
        (1.234e9, "1.23 GB"),
        (25e9, "25 GB"),
        (3.2e15, "3200 TB"),
    ],
)
def test_sizes_have_the_unit_that_suits_them(number, expected):
    assert size(number) == expected
