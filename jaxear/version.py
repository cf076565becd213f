"""The version of jaxear."""

__version__ = "0.1.0"
