"""The commands over a run file, one file each, with its schema, its data and its folder."""
