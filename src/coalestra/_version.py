"""The version of the package: the one place that the build and the code read it from."""

__version__ = "0.6.0"
