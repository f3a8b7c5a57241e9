"""The kinds of methods: what all of them are, and those that share how they choose."""
