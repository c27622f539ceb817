"""The stages of a night, one file each."""
