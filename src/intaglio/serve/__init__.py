"""Serve adapters: many users, one base."""
