"""The version, read by the build and by patch manifests without importing torch."""

__version__ = "0.1.0"
