"""The release's number, which adapter folders record."""

__all__ = ["VERSION"]

VERSION = "0.1.0"
