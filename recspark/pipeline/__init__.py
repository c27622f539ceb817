"""The night: `run` opens it, `stages` holds its steps, `runlog` its log.

Only the modules of this package read and write tables.
"""
