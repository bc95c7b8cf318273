"""Measurements against peers and against plain choices; each is a command."""
