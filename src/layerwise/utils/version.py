"""The version, read from the package's metadata: pyproject.toml is its only place."""


def version() -> str:
    """The installed version, or ``0+unknown`` for a copy that is not installed."""
    from importlib.metadata import PackageNotFoundError  # here: slow to import
    from importlib.metadata import version as of_package

    try:
        return of_package("layerwise")
    except PackageNotFoundError:
        return "0+unknown"
