import pytest

from components.structure import COUNT, NUMBER, check_structure

STRUCTURE = {
    "count": COUNT,
    "seconds": NUMBER,
    "maybe": (None, {"name": str}),
    "rows": [{"right": bool}],
    "any": {int: str},
}
GOOD = {"count": 0, "seconds": 0.5, "maybe": None, "rows": [{"right": True}], "any": {3: "x"}, "more": object()}


def test_what_has_all_parts_passes():
    check_structure(GOOD, STRUCTURE, "file")
    check_structure({**GOOD, "maybe": {"name": "x"}, "rows": (), "any": {}, "seconds": 2}, STRUCTURE, "file")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("count", -1, "file.count: expected a whole number from 0, found -1."),
        ("count", 0.0, "file.count: expected a whole number from 0, found 0.0."),
        ("count", True, "file.count: expected a whole number from 0, found True."),
        ("count", 2**70, "file.count: expected a whole number from 0, found 1180591620717411303424."),
        ("seconds", "1", "file.seconds: expected int or float, found str."),
        ("seconds", False, "file.seconds: expected int or float, found bool."),
        ("maybe", [], "file.maybe: expected Mapping, found list."),
        ("maybe", {}, "file.maybe: expected name, found none."),
        ("maybe", {"name": None}, "file.maybe.name: expected str, found NoneType."),
        ("rows", {}, "file.rows: expected list or tuple, found dict."),
        ("rows", [{"right": True}, {"right": 1}], r"file.rows\[1\].right: expected bool, found int."),
        ("any", {"x": "x"}, "file.any, the name x: expected int, found str."),
        ("any", {3: 4}, "file.any.3: expected str, found int."),
    ],
)
def test_the_part_that_differs_is_named(part, value, message):
    with pytest.raises(ValueError, match=f"^{message}$".replace(".$", r"\.$")):
        check_structure({**GOOD, part: value}, STRUCTURE, "file")


def test_what_is_no_dictionary_or_lacks_a_part_is_named():
    with pytest.raises(ValueError, match=r"^file: expected Mapping, found list\.$"):
        check_structure([], STRUCTURE, "file")
    for part in STRUCTURE:
        with pytest.raises(ValueError, match=rf"^file: expected {part}, found none\.$"):
            check_structure({key: value for key, value in GOOD.items() if key != part}, STRUCTURE, "file")
