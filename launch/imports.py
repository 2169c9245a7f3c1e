"""Lightning without the packages that nothing here needs of it."""

from typing import Any

from lightning_utilities.core import imports

UNUSED = ("matplotlib", "scipy", "torchvision", "transformers")


def import_lightning() -> None:
    """Import Lightning in 3 s instead of 5; to be called before anything else imports it.

    It imports torchmetrics, which imports whatever its optional metrics of pictures and texts could make use of.
    It is told that these packages are not installed, as they need not be: in programs that begin with this, those
    metrics say that they are not available. All else, and everybody else, finds the packages as they are.
    """

    class WithoutUnused(imports.RequirementCache):
        def _check_requirement(self) -> None:
            super()._check_requirement()
            self.available &= not str(self.requirement).startswith(UNUSED)

    def available(name: str) -> bool:
        return name not in UNUSED and package_available(name)

    before: dict[str, Any] = {name: getattr(imports, name) for name in ("RequirementCache", "package_available")}
    package_available = before["package_available"]
    imports.RequirementCache, imports.package_available = WithoutUnused, available
    try:
        import lightning  # noqa: F401
    finally:
        imports.RequirementCache, imports.package_available = before.values()
