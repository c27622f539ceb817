"""Pure transforms, DataFrame in and DataFrame out: events to sessions, histories, features,
queries.
"""
