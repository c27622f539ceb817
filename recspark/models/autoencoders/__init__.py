"""Networks that rebuild what a user has, or an item's words."""
