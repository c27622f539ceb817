"""Delta tables: what they hold (specs), how they are read and written (catalog), their files
(snapshot).
"""
