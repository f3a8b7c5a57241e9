"""The artefact of a run: an adapter on disk, and on a live model."""
