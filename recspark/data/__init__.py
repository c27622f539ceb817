"""Pure transforms from DataFrame to DataFrame: events become sessions, histories, features and
queries.
"""
