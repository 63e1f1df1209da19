"""Checkpoint folders: find, open, cut, load, write, convert and check them."""
