"""The Delta tables: what they hold (specs), how they are read and written (catalog), and which files a
version of a table consists of (snapshot).
"""
