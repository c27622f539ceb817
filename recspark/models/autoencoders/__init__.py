"""Networks that rebuild a user's items, or an item's words, from a compressed form."""
