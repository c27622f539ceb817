"""The night: its stages (`run`, `stages`), its log (`runlog`), and the only code that touches
tables.
"""
