"""The HTTP server of one base and its adapters."""
