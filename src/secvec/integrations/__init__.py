"""Conveniences for trainers that are not ours. Nothing else in secvec imports them."""
