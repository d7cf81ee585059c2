"""The version of the package; that of pyproject.toml, which `make quality` compares."""

__version__ = "0.6.0"
"""The version, as in the metadata of the package."""
