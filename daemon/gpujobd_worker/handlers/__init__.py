"""Handlers shipped with the package, one file each."""
