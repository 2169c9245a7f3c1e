"""Numbers as they stand in sentences."""


def counted(count: int, noun: str) -> str:
    """`1 update`, `2,000 updates`; of nouns that only take an s."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def size(number_of_bytes: float) -> str:
    """`78 kB`, `1.23 GB`: three digits of the largest decimal unit that leaves at least one."""
    value, unit = float(number_of_bytes), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 99.95 else f"{value:.3g} {unit}"
