"""Combine the lists of several models into one list per user."""
