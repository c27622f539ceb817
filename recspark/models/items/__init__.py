"""Models that count items, or relate items to items or users to users.

They are popularity, own items, transitions, item-item matrices and similar users.
"""
