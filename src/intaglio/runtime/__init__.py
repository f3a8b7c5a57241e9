"""Run many adapters of one base at once: what the server is built on, without HTTP."""
