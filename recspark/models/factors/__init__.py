"""Models whose score is the dot product of a user's vector and an item's vector."""
