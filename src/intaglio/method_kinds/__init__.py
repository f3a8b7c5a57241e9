"""What a method can be: what all methods are, and the kinds of them that share how they choose."""
