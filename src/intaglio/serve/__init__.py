"""Serve one base and its adapters over HTTP."""
